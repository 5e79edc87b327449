"""The tables of a sweep: whole lines count, and a kill leaves the old table or the new one."""

import csv

import pytest

from llmmix.laws.sweep import add, finished
from llmmix.laws.tables import read_runs
from tests.dying import dies_at

NAMES = ["a", 'b, "c"', "two\nlines"]
RUNS = {f"run-{i:04d}": dict(zip(NAMES, (5.8123 + i, 0.25, 1e-7), strict=True)) for i in range(3)}


@pytest.fixture
def table(tmp_path):
    for run, values in RUNS.items():
        add(tmp_path / "metrics.csv", run, values)
    return tmp_path / "metrics.csv"


def read(table) -> list[dict]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_cut_at_any_byte_is_completed_to_the_same_table(table):
    whole = table.read_bytes()
    ends = [i + 2 for i in range(len(whole)) if whole[i : i + 2] == b"\r\n"]
    for length in range(len(whole)):
        table.write_bytes(whole[:length])
        kept = [run for run in RUNS if finished(table, run)]
        assert kept == list(RUNS)[: max(0, sum(end <= length for end in ends) - 1)]
        for run in RUNS:
            if run not in kept:
                add(table, run, RUNS[run])
        assert table.read_bytes() == whole, length


def test_a_cut_number_does_not_count_and_is_told(table, caplog):
    whole = table.read_bytes()
    table.write_bytes(whole[: whole.index(b"7.8123") + 3])  # ends in 7.8
    assert finished(table, "run-0001")["a"] == "6.8123" and not finished(table, "run-0002")
    assert f"{table}: not whole and left out: 1 of its lines" in caplog.text


def test_a_line_written_behind_half_a_line_does_not_count(table):
    """As an earlier version went on after a kill."""
    whole = table.read_bytes()
    at = whole.index(b"7.8123")
    table.write_bytes(whole[: at + 3] + b"run-0003,run-0003,1,2,3\r\n")
    assert [run for run in (*RUNS, "run-0003") if finished(table, run)] == list(RUNS)[:2]
    add(table, "run-0002", RUNS["run-0002"])
    assert table.read_bytes() == whole


@pytest.mark.parametrize("full_disk", [False, True], ids=["kill", "full disk"])
def test_a_kill_while_a_line_is_added_leaves_the_table(full_disk, table):
    whole = table.read_bytes()
    for byte in range(0, len(whole) + 20, 7):
        assert dies_at(byte, lambda: add(table, "run-0003", RUNS["run-0000"]), full_disk)
        assert table.read_bytes() == whole
    add(table, "run-0003", RUNS["run-0000"])
    assert len(read(table)) == 4


def test_values_go_below_their_names(tmp_path):
    table = tmp_path / "t.csv"
    add(table, "run-0000", {"a": 1.0, "b": 2.0})
    add(table, "run-0001", {"b": 4.0, "a": 3.0})
    add(table, "run-0002", {"a": 5.0, "c": 6.0})
    add(table, "run-0003", {"a": 7.0, "b": None})
    assert [(row["a"], row["b"], row["c"]) for row in read(table)] == [
        ("1.0", "2.0", ""),
        ("3.0", "4.0", ""),
        ("5.0", "", "6.0"),
        ("7.0", "", ""),
    ]


def test_the_laws_read_what_a_sweep_wrote(tmp_path):
    for i in range(3):
        add(tmp_path / "ratios.csv", f"run-{i:04d}", {"x": i / 4, "y": 1 - i / 4})
        add(tmp_path / "metrics.csv", f"run-{i:04d}", {"x_val_loss": 1.0 + i, "y_val_loss": 2.0})
    runs = read_runs(tmp_path / "ratios.csv", tmp_path / "metrics.csv")
    assert runs.ids == ["run-0000", "run-0001", "run-0002"]
    assert runs.losses.tolist() == [[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]]
