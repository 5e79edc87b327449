import pytest

from llmmix.grading import SampleLog
from tests.dying import dies_at

SETTINGS = {"seed": 0}
RECORDS = [{"problem": 0, "sample": n, "completion": "é\n" * n} for n in range(3)]


def test_a_log_reads_the_first_of_two(tmp_path):
    log = SampleLog(tmp_path, {"seed": 0})
    log.append([{"problem": 0, "sample": 0, "x": 1}])
    log.append([{"problem": 0, "sample": 0, "x": 2}, {"problem": 0, "sample": 1, "x": 3}])
    log.append([])
    assert [r["x"] for r in SampleLog(tmp_path, {"seed": 0}).read()] == [1, 3]
    log.replace([{"problem": 0, "sample": 0, "x": 5}])
    assert [r["x"] for r in log.read()] == [5]


@pytest.mark.parametrize("full_disk", [False, True], ids=["kill", "full disk"])
def test_a_log_whose_writer_died_at_any_byte_is_completed(full_disk, tmp_path):
    size = len("".join(map(str, RECORDS))) + 40
    for byte in [*range(0, size, 19), size]:
        folder = tmp_path / str(byte)
        died = dies_at(byte, lambda f=folder: SampleLog(f, SETTINGS).append(RECORDS), full_disk)
        log = SampleLog(folder, SETTINGS)
        kept = list(log.read())
        assert kept == RECORDS[: len(kept)] and died == (len(kept) < 3)
        log.append(RECORDS[len(kept) :])
        assert list(SampleLog(folder, SETTINGS).read()) == RECORDS
    assert not died


def test_a_line_that_is_not_whole_is_drawn_again(tmp_path, caplog):
    log = SampleLog(tmp_path, SETTINGS)
    log.append(RECORDS)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    log = SampleLog(tmp_path, SETTINGS)
    assert list(log.read()) == [RECORDS[0], RECORDS[2]]
    assert "samples.jsonl: not whole and left out: line 2" in caplog.text
    log.append([RECORDS[1]])
    assert [r["sample"] for r in log.read()] == [0, 2, 1]


def test_a_kill_while_samples_are_judged_again_leaves_the_old_verdicts(tmp_path):
    log = SampleLog(tmp_path, SETTINGS)
    log.append(RECORDS)
    for byte in range(0, 60, 7):
        assert dies_at(
            byte,
            lambda: SampleLog(tmp_path, SETTINGS).replace(
                [r | {"verdict": "right"} for r in RECORDS]
            ),
        )
        assert list(log.read()) == RECORDS


def test_half_the_settings_without_samples_are_written_anew(tmp_path):
    SampleLog(tmp_path, SETTINGS)
    whole = (tmp_path / "settings.json").read_text()
    (tmp_path / "settings.json").write_text(whole[:5])
    SampleLog(tmp_path, SETTINGS)
    assert (tmp_path / "settings.json").read_text() == whole


def test_samples_whose_settings_are_lost_are_refused(tmp_path):
    SampleLog(tmp_path, SETTINGS).append(RECORDS)
    for lose in (lambda file: file.write_text("{"), lambda file: file.unlink()):
        lose(tmp_path / "settings.json")
        with pytest.raises(ValueError, match="settings.json .* missing or not whole. Name another"):
            SampleLog(tmp_path, SETTINGS)
