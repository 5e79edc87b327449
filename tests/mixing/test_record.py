"""The record of a run, line by line."""

import numpy as np
import pytest

from llmmix.files import RECORD, read_record
from llmmix.mixing.record import MixtureRecord, drawn_shares
from tests.dying import dies_at

HEADER = {"domains": ["a", "b"]}


def test_what_is_not_finite_is_null(tmp_path):
    record = MixtureRecord(tmp_path / "new")
    record.start(HEADER)
    record.write({"step": 1, "measured": {"train": np.array([1.5, np.nan])}})
    record.write({"step": 1, "counts": [3, 1]})
    header, entries = read_record(tmp_path / "new")
    assert header == HEADER and record.lines == 3
    assert entries[0] == {"step": 1, "measured": {"train": [1.5, None]}}
    assert drawn_shares(tmp_path / "new") == {"a": 0.75, "b": 0.25}


def test_what_was_written_after_a_checkpoint_is_forgotten(tmp_path):
    record = MixtureRecord(tmp_path)
    record.start(HEADER)
    for step in range(1, 6):
        record.write({"step": step, "counts": [1, 1]})
    again = MixtureRecord(tmp_path)
    again.go_on(4, 3, HEADER)
    assert [e["step"] for e in read_record(tmp_path)[1]] == [1, 2, 3] and again.lines == 4
    again.go_on(4, 2, HEADER)  # the lines of a run begun elsewhere are fewer than its checkpoint's
    assert [e["step"] for e in read_record(tmp_path)[1]] == [1, 2]


def test_a_run_goes_on_from_a_record_cut_at_any_byte(tmp_path):
    def write(steps):
        for step in steps:
            record.write({"step": step, "counts": [step, 1]})

    record = MixtureRecord(tmp_path)
    record.start(HEADER)
    write(range(1, 4))
    whole = (tmp_path / RECORD).read_bytes()
    for length in range(len(whole)):
        (tmp_path / RECORD).write_bytes(whole[:length])
        kept = whole[:length].count(b"\n")
        record = MixtureRecord(tmp_path)
        record.go_on(max(kept, 1), max(kept - 1, 0), HEADER)  # the checkpoint of the last step
        assert record.lines == max(kept, 1)
        write(range(max(kept, 1), 4))
        assert (tmp_path / RECORD).read_bytes() == whole


def test_a_kill_while_a_record_is_cut_back_leaves_it_whole(tmp_path):
    record = MixtureRecord(tmp_path)
    record.start(HEADER)
    for step in range(1, 6):
        record.write({"step": step, "counts": [1, 1]})
    whole = (tmp_path / RECORD).read_bytes()
    for byte in range(0, 60, 7):
        assert dies_at(byte, lambda: MixtureRecord(tmp_path).go_on(4, 3, HEADER))
        assert dies_at(min(byte, 20), lambda: MixtureRecord(tmp_path).start(HEADER))
        assert (tmp_path / RECORD).read_bytes() == whole


def test_other_processes_count_and_do_not_write(tmp_path):
    record = MixtureRecord(tmp_path, writes=False)
    record.start(HEADER)
    record.write({"step": 1})
    assert record.lines == 2 and not (tmp_path / RECORD).exists()
    with pytest.raises(FileNotFoundError, match="holds no mixture.jsonl"):
        read_record(tmp_path)
