"""What is written is whole or absent, and a folder has one run."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from llmmix.files import (
    CLAIM,
    STALE,
    built_once,
    claim,
    read_json,
    read_json_lines,
    read_record,
    release,
    replacing,
    write_whole,
)
from tests.dying import another_process_in, dies_at

OLD, NEW = {"old": [1, 2]}, {"new": ["é"] * 9}


@pytest.mark.parametrize("full_disk", [False, True], ids=["kill", "full disk"])
def test_a_writer_that_dies_at_any_byte_leaves_the_old_file(full_disk, tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps(NEW)
    for byte in [*range(0, len(text), 9), len(text) - 1]:
        write_whole(path, json.dumps(OLD))
        assert dies_at(byte, lambda: write_whole(path, text), full_disk)
        assert read_json(path) == OLD
    assert bool(list(tmp_path.glob(".a.json.*.partial"))) != full_disk  # an error cleans up
    assert not dies_at(len(text), lambda: write_whole(path, text), full_disk)
    assert read_json(path) == NEW


def test_a_failure_within_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_whole(path, "old\n")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old\n" and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_link_is_followed_and_the_mode_is_as_of_any_file(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    write_whole(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "disk" / "a").read_bytes() == b"x"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path):
    for name in (".a.json.old.partial", ".a.json.new.partial", ".b.json.old.partial"):
        (tmp_path / name).write_text("{")
        if "old" in name:
            written = (tmp_path / name).stat().st_mtime - STALE - 1
            os.utime(tmp_path / name, (written, written))
    write_whole(tmp_path / "a.json", "{}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.json", ".a.json.new.partial", ".b.json.old.partial"}


def test_half_a_document_counts_as_absent_with_a_word(tmp_path, caplog):
    path = tmp_path / "finished.json"
    whole = json.dumps(NEW, ensure_ascii=False).encode()
    assert read_json(path) is None and not caplog.records
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_json(path, absent="none") == "none"
    (record,) = caplog.records  # once, not each time
    assert str(path) in record.getMessage() and "not whole" in record.getMessage()
    path.write_bytes(whole)
    assert read_json(path) == NEW


def test_lines_that_are_not_whole_are_left_out_with_a_word(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    lines = [{"n": n, "text": "é\u2028"} for n in range(3)]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        caplog.clear()
        found = read_json_lines(path)
        assert found == lines[: len(found)]
        assert len(found) >= whole[:length].count(b"\n")
    path.write_bytes(whole[:9] + b"\n" + whole + b"[1]\n\x00\x00\n")
    assert read_json_lines(path) == lines
    assert f"{path}: not whole and left out: line 1, 5, 6" in caplog.text


def test_a_record_cut_off_at_any_byte_is_read_as_far_as_it_goes(tmp_path):
    lines = [{"domains": ["a"]}, {"step": 1, "counts": [3]}, {"step": 2, "counts": [4]}]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    first = whole.index("\n")
    for length in range(len(whole) + 1):
        (tmp_path / "mixture.jsonl").write_text(whole[:length])
        if length < first:
            with pytest.raises(FileNotFoundError, match="lacks its first line"):
                read_record(tmp_path)
        else:
            header, entries = read_record(tmp_path)
            assert header == lines[0] and entries == lines[1 : 1 + len(entries)]
    assert len(entries) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path))

    def build(out):
        (out / "half").write_text("x")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        built_once("thing", build)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert (built_once("thing", lambda out: (out / "a").touch()) / "a").exists()


def test_a_folder_has_one_run_until_it_ends(tmp_path):
    folder = tmp_path / "out"
    with another_process_in(folder) as other:
        with pytest.raises(ValueError, match="`--output_dir` .*out is in use .* Name another"):
            claim(folder)
        assert claim(tmp_path / "out" / "inner").is_dir()  # the runs within are its own
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert claim(folder) == folder and claim(str(folder)) == folder  # as often as it likes
    code = "import sys; from llmmix.files import claim; claim(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    assert b"is in use" in subprocess.run(command, capture_output=True).stderr
    release(folder)
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_children_of_a_killed_run_do_not_hold_its_folder(tmp_path):
    """As the workers of a loader, which are forked and may outlive it."""
    code = (
        "import os, sys; from llmmix.files import claim; claim(sys.argv[1])\n"
        "if not os.fork(): print(flush=True)\n"
        "sys.stdin.read()"  # both wait, the child until this test closes the pipe
    )
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=read, stdout=subprocess.PIPE
    )
    os.close(read)
    process.stdout.readline()
    process.kill()
    process.wait()
    try:
        assert claim(tmp_path) == tmp_path
    finally:
        os.close(write)
        process.stdout.close()


def test_ranks_other_than_the_first_claim_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with another_process_in(tmp_path):
        assert claim(tmp_path / "out") == tmp_path / "out" and not (tmp_path / "out").exists()
        assert claim(tmp_path) == tmp_path


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(code, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert claim(tmp_path) == tmp_path and (tmp_path / CLAIM).exists()
    assert "cannot be locked" in caplog.text and str(tmp_path) in caplog.text
