"""The record of a run, line by line."""

import numpy as np
import pytest

from llmmix.files import RECORD, read_record
from llmmix.mixing.record import MixtureRecord, drawn_shares

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


def test_other_processes_count_and_do_not_write(tmp_path):
    record = MixtureRecord(tmp_path, writes=False)
    record.start(HEADER)
    record.write({"step": 1})
    assert record.lines == 2 and not (tmp_path / RECORD).exists()
    with pytest.raises(FileNotFoundError, match="holds no mixture.jsonl"):
        read_record(tmp_path)
