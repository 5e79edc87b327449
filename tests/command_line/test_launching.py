"""Launches: what a process may import, what is said of its end, and that it ends with its launcher.

Scripts here import no torch, so that a launch costs little more than the launcher's own start.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from llmmix import cli

COMMAND = [sys.executable, "-m", "llmmix.cli"]
SCRIPT = r"""
import json, os, signal, sys, threading
from importlib.util import find_spec

import sibling

rank, mode = os.environ.get("RANK", "0"), sys.argv[1]
found = {name: find_spec(name).origin for name in ("peft", "math_verify", "sibling")}
report = json.dumps({"rank": rank, "flags": sys.argv[1:], **found})
os.write(1, f"{report}\n".encode())  # at once, since ranks share the pipe
if mode == "raise" and rank == "1":
    raise RuntimeError("only here")
if mode == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "exit":
    sys.exit(3)
if mode != "report":
    threading.Event().wait()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, which holds what must not be imported, and a script in another one."""
    for name in ("peft", "math_verify", "sitecustomize", "accelerate", "torch"):
        text = f"open({str(tmp_path / 'imported')!r}, 'a').write('{name} ')\n"
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "mine.py").write_text(SCRIPT)
    (tmp_path / "user" / "sibling.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def run(*argv):
    done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def check_reports(said, folder, count):
    """Each process has the installed packages, and the module beside the script."""
    reports = sorted(map(json.loads, said), key=lambda report: report["rank"])
    assert [report["rank"] for report in reports] == [str(rank) for rank in range(count)]
    for report in reports:
        assert report["sibling"] == str(folder / "user" / "sibling.py")
        assert not {report["peft"], report["math_verify"]} & set(map(str, folder.iterdir()))
    assert not (folder / "imported").exists()
    return reports


def test_one_process_imports_nothing_from_the_current_folder(folder):
    status, said, errors = run("run", "user/mine.py", "report", "--n", "3")
    assert (status, errors) == (0, [])
    (report,) = check_reports(said, folder, 1)
    assert report["flags"] == ["report", "--n", "3"]


def test_an_error_of_one_rank_is_told_once(folder):
    """And what the ranks import, and the flags that reach them."""
    status, said, errors = run("run", "--num_processes", "2", "user/mine.py", "raise", "--n", "3")
    for report in check_reports(said, folder, 2):
        assert report["flags"] == ["raise", "--n", "3"]
    assert status == 1
    assert errors[0] == "llmmix run user/mine.py: process 1 failed."
    assert errors[-1] == "RuntimeError: only here"
    assert sum("Traceback" in line for line in errors) == 1


def test_a_mistake_is_one_line_of_all_ranks(folder):
    argv = ["pass_at_n", "--model_name_or_path", "m", "--temperature", "nan"]
    status, said, errors = run("eval", "--num_processes", "2", *argv)
    assert status == 2 and said == []
    assert errors == ["llmmix eval pass_at_n: `temperature` must be a finite number, got [nan]."]
    assert not (folder / "imported").exists()


@pytest.mark.parametrize(
    ("mode", "status", "end"),
    [
        ("kill", 137, "process 1 was ended by SIGKILL."),
        pytest.param("exit", 3, "ended with status 3.", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_ends_without_an_error_is_named(folder, mode, status, end):
    found, _, errors = run("run", "--num_processes", "2", "user/mine.py", mode)
    assert found == status and errors[0].endswith(end)
    assert all(line.startswith("llmmix run user/mine.py: process ") for line in errors)


def test_deepspeed_ranks_import_nothing_from_the_current_folder(folder, monkeypatch):
    """Accelerate puts it on PYTHONPATH for DeepSpeed, of which a stand-in is enough to launch."""
    installed = folder / "installed"
    for name in ("deepspeed/__init__.py", "deepspeed/launcher/__init__.py"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text("__version__ = '0.18.0'\n")
    (installed / "deepspeed/launcher/runner.py").write_text("DEEPSPEED_ENVIRONMENT_NAME = ''\n")
    metadata = installed / "deepspeed-0.18.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.0\n")
    monkeypatch.setenv("PYTHONPATH", str(installed))  # which the user named, and which stays
    options = ["--accelerate_config", "deepspeed_zero2", "--num_processes", "2"]
    status, said, errors = run("run", *options, "user/mine.py", "report")
    assert (status, errors) == (0, [])
    check_reports(said, folder, 2)


def test_what_accelerate_refuses_is_one_line(folder):
    (folder / "mine.yaml").write_text("compute_environment: LOCAL_MACHINE\n")
    status, _, errors = run("run", "--accelerate_config", "mine.yaml", "user/mine.py", "report")
    assert status == 2 and len(errors) == 1
    assert errors[0].startswith("llmmix: `--accelerate_config` mine.yaml: ")


@contextmanager
def waiting(processes):
    """A launch whose processes all wait. Its pipes end when the last of them has ended."""

    def as_in_a_terminal_left_by_nohup():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = [*COMMAND, "run", "--num_processes", str(processes), "user/mine.py", "wait"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=as_in_a_terminal_left_by_nohup, **pipes) as launcher:
        try:
            for _ in range(processes):
                json.loads(launcher.stdout.readline())
            yield launcher
        finally:
            launcher.kill()


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_is_one_line(folder, processes):
    with waiting(processes) as launcher:
        launcher.send_signal(signal.SIGINT)
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert errors == "llmmix run user/mine.py: interrupted.\n"


def test_a_killed_launcher_leaves_no_rank(folder):
    with waiting(2) as launcher:
        launcher.kill()
        assert launcher.communicate(timeout=60) == ("", "")


def test_a_terminated_launcher_leaves_no_rank_and_a_hangup_is_ignored_as_nohup_asks(folder):
    with waiting(2) as launcher:
        launcher.send_signal(signal.SIGHUP)
        launcher.terminate()
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    assert errors == "llmmix run user/mine.py: ended by SIGTERM.\n"


POOL = """
import os, threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from llmmix.command_line.launching import end_with_caller

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_caller)
    print(pool.submit(os.getpid).result(), flush=True)
    threading.Event().wait()
"""


def test_a_process_of_a_pool_ends_with_its_caller(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, str(tmp_path / "pool.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert int(caller.stdout.readline()) != caller.pid
        caller.kill()
        caller.communicate(timeout=60)


@pytest.mark.parametrize(
    "line",
    [
        "from llmmix.head import attach_head; attach_head(1)",  # TypeError
        "from llmmix.files import read_record; read_record('nowhere')",  # FileNotFoundError
        "from llmmix.cli import parse_args; parse_args((), __file__, ['--x'])",  # ValueError
    ],
)
def test_what_a_raise_line_of_ours_states_has_no_traceback(line, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(line)
    assert cli.main(["run", str(tmp_path / "mine.py")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"llmmix run {tmp_path / 'mine.py'}: ")


def test_a_bug_keeps_its_traceback(tmp_path):
    path = list(sys.path)
    for line in ("raise ValueError('mine')", "from llmmix.trainers import x", "{}['key']"):
        (tmp_path / "mine.py").write_text(line)
        with pytest.raises((ValueError, ImportError, KeyError)):
            cli.main(["run", str(tmp_path / "mine.py")])
    assert sys.path == path and "PYTHONSAFEPATH" not in os.environ
