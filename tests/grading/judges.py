"""Functions that verifiers run in processes of their own; each process imports this module."""

import os
import subprocess
import sys
import time
from pathlib import Path


def yes(completion, answer):
    return True


def broken(completion, answer):
    raise RuntimeError("[/b] not today")


def raises(completion, answer):
    raise KeyError("oh")


def hangs(completion, answer):
    while completion == "hang":
        time.sleep(60)
    return True


def dies(completion, answer):
    print("this is no verdict")
    return os._exit(3) if completion == "die" else answer == completion


def eats(completion, answer):
    return len(bytearray(5 * 2**30)) > 0  # which the machine has, and the process may not take


def forks(completion, answer):
    """Start a child that never ends, and write its number to the path; then hang or crash."""
    how, _, path = completion.partition(" ")
    if path:
        child = subprocess.Popen(["sleep", "3600"])
        Path(path).write_text(str(child.pid))
        return child.wait() if how == "hang" else os._exit(3)
    return sys.stdin.read() == ""  # not the next question


calls = 0


def counts(completion, answer):
    global calls
    calls += 1
    return calls == 1


def waits(completion, answer):
    """Note that the completion, a path, was judged; all but the first wait for a file `go`."""
    path = Path(completion)
    path.touch()
    while path.name != "0" and not (path.parent / "go").exists():
        time.sleep(0.01)
    return True


def modules(completion, answer):
    return completion not in sys.modules
