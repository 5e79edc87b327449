r"""Is this completion right? A verdict on each sampled answer, from a process that may be killed.

    Verifier("math")      math-verify: LaTeX, numbers, sets, intervals, compared as mathematics
    Verifier("exact")     the last \boxed{...} is the reference, spaces aside
    Verifier("normalized")  \boxed{...}, or all that was said, is the reference once case,
                          punctuation and articles are gone
    Verifier("choice")    the letter chosen is the reference's
    Verifier("module:function")  your own (completion, answer) -> bool, or None if unparsable

A verdict is "right", "wrong", "unparsable" (no answer was found in the completion) or "failed" (the
verifier raised, crashed or ran out of time: the sample is not judged, and not counted as wrong).
"""

import json
import logging
import os
import re
import string
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llmmix.sampling import Completion

Verdict = Literal["right", "wrong", "unparsable", "failed"]
VERDICTS = ("right", "wrong", "unparsable", "failed")

BACKLOG = 4096  # completions that may wait for a verdict
MEMORY_LIMIT = 4 * 2**30  # bytes of address space in a verifier's process


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of a completion, braces matched, or None.

    Example:
        >>> boxed_answer(r"so x is \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, start = 1, start + len("\\boxed{")
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def exact(completion: str, answer: str) -> bool | None:
    """Whether the boxed answer equals the reference, spaces aside; None without one."""
    given = boxed_answer(completion)
    return None if given is None else _squeeze(given) == _squeeze(str(answer))


def normalized(completion: str, answer: str) -> bool | None:
    """Whether the boxed answer, or the whole completion, equals the reference as plain words.

    Case, punctuation, articles and spaces do not count, as in SQuAD's exact match.
    """
    given = boxed_answer(completion)
    words = _words(completion if given is None else given)
    return words == _words(str(answer)) if words else None


def choice(completion: str, answer: str) -> bool | None:
    r"""Whether the letter chosen is the reference's: boxed, after "answer", or the last one alone.

    Args:
        completion: Such as "The answer is (B)", "\boxed{B}" or "B. Paris".
        answer: A letter, with or without brackets.
    """
    wanted = re.search(r"[A-Za-z]", str(answer))
    if wanted is None:
        raise ValueError(f"the reference {answer!r} has no letter")
    given = _chosen(completion)
    return None if given is None else given.upper() == wanted[0].upper()


def math(completion: str, answer: str) -> bool | None:
    """Whether math-verify finds the answer equal to the reference; None if it finds no answer.

    The boxed answer counts where there is one; else what math-verify extracts from the text. It is
    meant for a process of its own: an expression may take for ever.
    """
    from math_verify import parse, verify

    given = boxed_answer(completion)
    if given is not None and _squeeze(given) == _squeeze(str(answer)):
        return True
    if given is not None and not given.strip():
        return None
    # The time limit is the caller's: math-verify's own needs the main thread's signals
    options = {"parsing_timeout": None}
    found = parse(completion if given is None else f"\\boxed{{{given}}}", **options)
    if not found:
        return None
    reference = parse(f"${answer}$", **options)
    if not reference:
        raise ValueError(f"math-verify cannot read the reference {answer!r}")
    return verify(reference, found, timeout_seconds=None, raise_on_error=True)


BUILT_IN: dict[str, Callable[[str, str], bool | None]] = {
    "math": math,
    "exact": exact,
    "normalized": normalized,
    "choice": choice,
}


class Verifier:
    """Judges completions; safe to call from several threads.

    `math` and functions of your own run in processes of their own, each call under a time limit: a
    process that overstays is killed and another started. Pairs seen before are not judged again.

    Args:
        function: A name above, "module:function", or a callable, which runs in this process without
            a time limit.
        timeout: Seconds an answer may take.
        workers: Processes, for what runs outside.

    Raises:
        ValueError: An unknown name, or a function that cannot be imported.
    """

    def __init__(self, function="math", *, timeout: float = 10.0, workers: int = 1):
        if not timeout > 0 or workers < 1:
            raise ValueError(
                f"`timeout` must be positive and `workers` 1 or more, got {timeout} and {workers}."
            )
        self.name = function if isinstance(function, str) else _name(function)
        self.timeout = timeout
        self.errors: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], Future] = {}
        self._local: Callable | None = None
        self._pool = ThreadPoolExecutor(workers)
        self._idle: list[_Worker] = []
        if not isinstance(function, str):
            self._local = function
        elif function in BUILT_IN and function != "math":
            self._local = BUILT_IN[function]
        else:
            path = "llmmix.verify:math" if function == "math" else function
            if not re.fullmatch(r"[\w.]+:[\w.]+", path):
                raise ValueError(
                    f"`verifier`: no {function!r}; there are {', '.join(BUILT_IN)}, or name a "
                    "function of yours as module:function."
                )
            self._idle = [_Worker(path) for _ in range(workers)]

    def __call__(self, completion: str, answer: str) -> Verdict:
        """The verdict on one completion."""
        return self.submit(completion, answer).result()

    def submit(self, completion: str, answer: str) -> Future:
        """A future of the verdict."""
        key = (self._text_that_counts(completion), str(answer))
        with self._lock:
            if key not in self._seen:
                self._seen[key] = (
                    _done(self._judge_here(*key))
                    if self._local
                    else self._pool.submit(self._judge_outside, *key)
                )
            return self._seen[key]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)
        for worker in self._idle:
            worker.kill()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _text_that_counts(self, completion: str) -> str:
        # Many samples box one answer: it is judged once
        if self.name == "math" and (given := boxed_answer(completion)) is not None:
            return f"\\boxed{{{given}}}"
        return completion

    def _judge_here(self, completion: str, answer: str) -> Verdict:
        try:
            return _verdict(self._local(completion, answer))
        except Exception as error:
            return self._failed(f"{type(error).__name__}: {error}")

    def _judge_outside(self, completion: str, answer: str) -> Verdict:
        with self._lock:
            worker = self._idle.pop()
        try:
            verdict, error = worker.judge(completion, answer, self.timeout)
        finally:
            with self._lock:
                self._idle.append(worker)
        return self._failed(error) if error else verdict

    def _failed(self, error: str) -> Verdict:
        self.errors[error[:200]] += 1
        return "failed"


def judge(
    completions: Iterable["Completion"], answers: Mapping[int, str], verifier: Verifier
) -> Iterator[tuple["Completion", Verdict]]:
    """Each completion with its verdict, judged while the next ones are sampled.

    Args:
        completions: As they come.
        answers: The reference of each prompt, by its number.
        verifier: Who judges.
    """
    pending: deque[tuple[Completion, Future]] = deque()
    for completion in completions:
        pending.append((completion, verifier.submit(completion.text, answers[completion.prompt])))
        while pending and (pending[0][1].done() or len(pending) > BACKLOG):
            done, verdict = pending.popleft()
            yield done, verdict.result()
    for done, verdict in pending:
        yield done, verdict.result()


def stated_answer(completion: str, verifier: str) -> str | None:
    """What a completion votes for under maj@N, None if it gives no answer.

    The letter for `choice`, else the boxed answer, else the last number for `math` and all words
    for the others. Answers written differently are different votes.
    """
    if verifier == "choice":
        return _chosen(completion)
    if (given := boxed_answer(completion)) is not None:
        return _squeeze(given) or None
    if verifier == "math":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion)
        return numbers[-1].replace(",", "") if numbers else None
    return _words(completion) or None


class _Worker:
    """A process that answers one question a line, started anew when it dies."""

    def __init__(self, path: str):
        self.path = path
        self._start()

    def judge(self, completion: str, answer: str, timeout: float) -> tuple[Verdict, str | None]:
        """The verdict, and what went wrong if anything did."""
        if self.process.poll() is not None:
            self._start()
        overdue = threading.Event()
        timer = threading.Timer(timeout, lambda: (overdue.set(), self.process.kill()))
        timer.start()
        try:
            self.process.stdin.write(json.dumps([completion, answer]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # it died between two questions
            line = ""
        finally:
            timer.cancel()
        if line:
            return tuple(json.loads(line))
        self.kill()
        return "failed", f"no verdict within {timeout:g} s" if overdue.is_set() else "it crashed"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmmix.verify", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
        )
        # The first line says that the function was found, so that imports are not timed
        problem = json.loads(self.process.stdout.readline() or '"its process did not start"')
        if problem:
            self.kill()
            raise ValueError(f"`verifier` {self.path!r}: {problem}")


def serve(path: str) -> None:
    """Answer questions from standard input until it ends; `python -m llmmix.verify` does this.

    Args:
        path: module:function.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints must not be taken for a verdict

    def say(message) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    module, _, name = path.partition(":")
    try:
        function = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        if path == "llmmix.verify:math":
            import math_verify  # noqa: F401  takes a second or two, which are not the first answer's

            logging.getLogger("math_verify").setLevel(logging.ERROR)  # that time limits are off
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        return
    _limit_memory()
    say(None)
    for line in sys.stdin:
        try:
            say([_verdict(function(*json.loads(line))), None])
        except Exception as error:  # RecursionError and MemoryError among them
            say(["failed", f"{type(error).__name__}: {error}"])


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _verdict(given) -> Verdict:
    if isinstance(given, str):
        if given not in VERDICTS:
            raise ValueError(f"a verifier returns a bool, None or one of {VERDICTS}, got {given!r}")
        return given
    return "unparsable" if given is None else "right" if given else "wrong"


def _done(verdict: Verdict) -> Future:
    future: Future = Future()
    future.set_result(verdict)
    return future


def _name(function: Callable) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _words(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _chosen(completion: str) -> str | None:
    if (given := boxed_answer(completion)) is not None:
        completion = re.sub(r"\\text\w*\{|\}", "", given)
        found = re.match(r"\W*([A-Za-z])\b", completion)
        return found[1] if found else None
    patterns = (
        r"(?i:answer)(?:\s+(?i:is|would be|should be))?\s*:?\s*\**\(?([A-Z])\b(?!')",
        r"^\W*([A-Z])(?=[).:]|\s*$)",
        r"(?:^|[\s(*])([A-Z])(?=[\s).,*:]|$)",
    )
    for pattern in patterns[:2]:
        if found := re.findall(pattern, completion.strip(), flags=re.MULTILINE):
            return found[-1]
    # A letter alone somewhere: "A" and "I" are words too
    found = [c for c in re.findall(patterns[2], completion) if c not in "AI"]
    return found[-1] if found else None


if __name__ == "__main__":
    serve(sys.argv[1])
