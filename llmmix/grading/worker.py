"""A process that judges answers, under limits of time and memory; killed with what it started.

The caller holds a `Worker`, whose process runs `serve`, which reads a question a line on standard
input and writes a verdict a line on standard output. It imports neither torch nor the calling
program, and a new one takes its place after a hang or a crash. It imports from the current folder
only what the user names: no `math_verify.py` or `sitecustomize.py` that happens to lie there.

Pools on multiprocessing (pebble's among them) do not serve here: each of their processes imports
the calling program, and what a crashed answer has started lives on.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast

from llmmix.grading.answers import Verdict, verdict_of

SECONDS_TO_START = 120
# What the process runs: the path is set once Python has started, and the function found after that
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from llmmix.grading.worker import serve
serve(sys.argv[2], float(sys.argv[3]))
"""
MEMORY_LIMIT = 4 * 2**30  # bytes that a verifier's process may take besides its imports


class Worker:
    """The caller's side of one process, which is started at once, and again when it has died.

    Args:
        path: The function that judges, as module:function.
        timeout: Seconds an answer may take.

    Raises:
        ValueError: The function cannot be imported, or the process does not start.
    """

    process: subprocess.Popen[str]

    def __init__(self, path: str, timeout: float):
        self.path, self.timeout = path, timeout
        self._start()

    def judge(self, completion: str, answer: str) -> tuple[Verdict, str | None]:
        """The verdict, and what went wrong if anything did."""
        try:
            if not self.alive or self.process.poll() is not None:
                self._start()
        except ValueError as error:  # though it has started before
            return "failed", str(error)
        question = json.dumps([completion, answer]) + "\n"
        line, overdue = self._exchange(question, self.timeout)
        if overdue or not line:
            self.kill()  # even if a reply came at the last moment: it was told to end
        if line:
            verdict, problem = json.loads(line)
            return verdict, problem
        return "failed", f"no verdict within {self.timeout:g} s" if overdue else "it crashed"

    def kill(self) -> None:
        """End the process; the next question starts another."""
        self.alive = False
        _kill(self.process)
        self.process.wait()
        for pipe in (self._questions, self._replies):
            with suppress(OSError):  # what it did not read can no longer be written
                pipe.close()

    def _exchange(self, question: str, timeout: float) -> tuple[str, bool]:
        """The reply to a question, and whether the process has been told to end."""
        process, overdue = self.process, threading.Event()

        def end() -> None:
            overdue.set()
            _kill(process)

        timer = threading.Timer(timeout, end)
        timer.daemon = True
        timer.start()
        try:
            self._questions.write(question)
            self._questions.flush()
            line = self._replies.readline()
        except OSError:  # it died between two questions
            line = ""
        timer.cancel()
        timer.join()
        return line, overdue.is_set()

    def _start(self) -> None:
        python = [sys.executable, "-P", "-c", START]
        self.process = subprocess.Popen(
            [*python, json.dumps(_import_path()), self.path, str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # so that what it starts can be ended with it
        )
        # Popen declares that both may be None
        self._questions = cast(IO[str], self.process.stdin)
        self._replies = cast(IO[str], self.process.stdout)
        self.alive = True
        # The first line says that the function was found, so that imports are not timed
        line, _ = self._exchange("", SECONDS_TO_START)
        problem = json.loads(line) if line else f"no answer within {SECONDS_TO_START} s of starting"
        if problem:
            self.kill()
            raise ValueError(f"`verifier` {self.path!r}: {problem}")


def _import_path() -> list[str]:
    """Where a process imports from: as this one, the current folder left out."""
    here = os.getcwd()
    path = [entry for entry in sys.path if entry and os.path.abspath(entry) != here]
    return [*path, str(Path(__file__).parents[2])]  # the last for an llmmix that is not installed


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and what it has started."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def serve(path: str, timeout: float) -> None:
    """Answer questions from standard input until it ends.

    Args:
        path: module:function.
        timeout: Seconds that the caller waits. The caller may be gone: the process ends itself a
            minute later.
    """
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the function reads or prints must not be taken for a question or a verdict
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def say(message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        function = _function(path)
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        return
    _limit_memory()
    alarm = getattr(signal, "alarm", lambda seconds: None)
    say(None)
    for question in questions:
        alarm(int(timeout) + 60)
        try:
            say([verdict_of(function(*json.loads(question))), None])
        except Exception as error:  # RecursionError and MemoryError among them
            say(["failed", f"{type(error).__name__}: {error}"])
        alarm(0)


def _function(path: str) -> Any:
    """The function that module:function names."""
    module, _, name = path.partition(":")
    if not module.startswith("llmmix."):
        sys.path.insert(0, os.getcwd())
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if path == "llmmix.grading.answers:math":
        import math_verify  # noqa: F401  takes a second or two, not to be counted against the first answer

        logging.getLogger("math_verify").setLevel(
            logging.ERROR
        )  # it warns that time limits are off
    return found


def _limit_memory() -> None:
    """Let the process grow by `MEMORY_LIMIT` from what its imports have taken."""
    statm = "/proc/self/statm"
    if not os.path.exists(statm):  # only Linux reports the size and keeps the limit
        return
    import resource

    with open(statm, encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + MEMORY_LIMIT
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
