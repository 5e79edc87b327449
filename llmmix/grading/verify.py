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
import signal
import string
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llmmix.sampling.requests import Completion

Verdict = Literal["right", "wrong", "unparsable", "failed"]
VERDICTS = ("right", "wrong", "unparsable", "failed")

TAIL = 200  # characters at the end of a text in which an answer without a box is looked for
BACKLOG = 512  # completions that may wait for a verdict
REMEMBERED = 10_000  # pairs whose verdicts are kept
SECONDS_TO_START = 120
MEMORY_LIMIT = 4 * 2**30  # bytes that a verifier's process may take besides its imports


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
    given, wanted = boxed_answer(completion), _words(str(answer))
    if not wanted:
        raise ValueError(f"the reference {answer!r} has no word left once it is normalized")
    words = _words(completion if given is None else given)
    return words == wanted if words else None


def choice(completion: str, answer: str) -> bool | None:
    r"""Whether the letter chosen is the reference's: boxed, after "answer", or the last one alone.

    Args:
        completion: Such as "The answer is (B)", "\boxed{B}" or "B. Paris".
        answer: A letter, with or without brackets.
    """
    wanted = re.fullmatch(r"\W*([A-Za-z])\W*", str(answer))
    if wanted is None:
        raise ValueError(f"the reference {answer!r} is not a letter")
    given = _chosen(completion)
    return None if given is None else given.upper() == wanted[1].upper()


def math(completion: str, answer: str) -> bool | None:
    """Whether math-verify finds the answer equal to the reference; None if it finds no answer.

    The boxed answer counts where there is one; else what math-verify extracts from the end of the
    text: further up stands the question's own expression as often as not, which it would evaluate.
    It is meant for a process of its own: an expression may take for ever.
    """
    from math_verify import parse, verify

    given = boxed_answer(completion)
    if given is not None and _squeeze(given) == _squeeze(str(answer)):
        return True
    if given is not None and not given.strip():
        return None
    # The time limit is the caller's: math-verify's own needs the main thread's signals
    options = {"parsing_timeout": None}
    text = completion.strip()[-TAIL:] if given is None else f"\\boxed{{{given}}}"
    found = parse(text, **options)
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
    process that overstays is killed and another started. Pairs seen lately are not judged again.

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
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[str, str], Future] = OrderedDict()
        self._errors: dict[tuple[str, str], str] = {}
        self._local: Callable | None = None
        self._pool = ThreadPoolExecutor(workers)
        self._idle: list[_Worker] = []
        if not isinstance(function, str):
            self._local = function
        elif function in BUILT_IN and function != "math":
            self._local = BUILT_IN[function]
        else:
            path = "llmmix.grading.verify:math" if function == "math" else function
            if not re.fullmatch(r"[\w.]+:[\w.]+", path):
                raise ValueError(
                    f"`verifier`: no {function!r}; there are {', '.join(BUILT_IN)}, or name a "
                    "function of yours as module:function."
                )
            self._idle = [_Worker(path, timeout) for _ in range(workers)]

    def __call__(self, completion: str, answer: str) -> Verdict:
        """The verdict on one completion."""
        return self.submit(completion, answer).result()

    def submit(self, completion: str, answer: str) -> Future:
        """A future of the verdict."""
        if self._local:
            return _done(self._judge_here(completion, str(answer)))
        key = (self._text_that_counts(completion), str(answer))
        with self._lock:
            if key not in self._seen:
                self._seen[key] = self._pool.submit(self._judge_outside, *key)
                if len(self._seen) > REMEMBERED:
                    self._seen.popitem(last=False)
            self._seen.move_to_end(key)
            return self._seen[key]

    def forget(self, futures: Iterable[Future]) -> None:
        """Give up verdicts that have not been begun."""
        given_up = {id(future) for future in futures if future.cancel()}
        with self._lock:
            for key in [key for key, future in self._seen.items() if id(future) in given_up]:
                del self._seen[key]

    def why(self, completion: str, answer: str) -> str | None:
        """What went wrong where the verdict was "failed"."""
        return self._errors.get((self._text_that_counts(completion), str(answer)))

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
        if (
            self.name == "math"
            and not self._local
            and (given := boxed_answer(completion)) is not None
        ):
            return f"\\boxed{{{given}}}"
        return completion

    def _judge_here(self, completion: str, answer: str) -> Verdict:
        try:
            return _verdict(self._local(completion, answer))
        except Exception as error:
            return self._failed(completion, answer, f"{type(error).__name__}: {error}")

    def _judge_outside(self, completion: str, answer: str) -> Verdict:
        with self._lock:
            worker = self._idle.pop()
        try:
            verdict, error = worker.judge(completion, answer)
        finally:
            with self._lock:
                self._idle.append(worker)
        return self._failed(completion, answer, error) if error else verdict

    def _failed(self, completion: str, answer: str, error: str) -> Verdict:
        self._errors[completion, answer] = error[:200]
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
    try:
        for completion in completions:
            answer = answers[completion.prompt]
            pending.append((completion, verifier.submit(completion.text, answer)))
            while pending and (pending[0][1].done() or len(pending) > BACKLOG):
                done, verdict = pending.popleft()
                yield done, verdict.result()
        while pending:
            done, verdict = pending.popleft()
            yield done, verdict.result()
    finally:
        # Left half way: nobody waits for the rest, and the interpreter must not at its end
        verifier.forget([verdict for _, verdict in pending])


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
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion.strip()[-TAIL:])
        return numbers[-1].replace(",", "") if numbers else None
    return _words(completion) or None


class _Worker:
    """A process that answers one question a line, started anew when it dies."""

    def __init__(self, path: str, timeout: float):
        self.path, self.timeout = path, timeout
        self._start()

    def judge(self, completion: str, answer: str) -> tuple[Verdict, str | None]:
        """The verdict, and what went wrong if anything did."""
        try:
            if not self.alive or self.process.poll() is not None:
                self._start()
        except ValueError as error:  # it started before
            return "failed", str(error)
        question = json.dumps([completion, answer]) + "\n"
        line, overdue = self._exchange(question, self.timeout)
        if overdue or not line:
            self.kill()  # even if a reply came at the last moment: it has been told to end
        if line:
            return tuple(json.loads(line))
        return "failed", f"no verdict within {self.timeout:g} s" if overdue else "it crashed"

    def _exchange(self, question: str, timeout: float) -> tuple[str, bool]:
        """The reply to a question, and whether the process has been told to end."""
        process, overdue = self.process, threading.Event()
        timer = threading.Timer(timeout, lambda: (overdue.set(), _kill(process)))
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it died between two questions
            line = ""
        timer.cancel()
        timer.join()
        return line, overdue.is_set()

    def kill(self) -> None:
        """End it; the next question starts another."""
        self.alive = False
        _kill(self.process)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what it did not read can no longer be written
                pipe.close()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmmix.grading.verify", self.path, str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        self.alive = True
        # The first line says that the function was found, so that imports are not timed
        line, _ = self._exchange("", SECONDS_TO_START)
        problem = json.loads(line) if line else f"no answer within {SECONDS_TO_START} s of starting"
        if problem:
            self.kill()
            raise ValueError(f"`verifier` {self.path!r}: {problem}")


def _kill(process: subprocess.Popen) -> None:
    """End a process and what it has started."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def serve(path: str, timeout: float) -> None:
    """Answer questions from standard input until it ends: `python -m llmmix.grading.verify`.

    Args:
        path: module:function.
        timeout: Seconds that the asker waits. Who asked may be gone: well after it, this ends.
    """
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the function reads or prints must not be taken for a question or a verdict
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def say(message) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    module, _, name = path.partition(":")
    try:
        function = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        if path == "llmmix.grading.verify:math":
            import math_verify  # noqa: F401  takes a second or two, which are not the first answer's

            logging.getLogger("math_verify").setLevel(logging.ERROR)  # that time limits are off
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        return
    _limit_memory()
    alarm = getattr(signal, "alarm", lambda seconds: None)
    say(None)
    for question in questions:
        alarm(int(timeout) + 60)
        try:
            say([_verdict(function(*json.loads(question))), None])
        except Exception as error:  # RecursionError and MemoryError among them
            say(["failed", f"{type(error).__name__}: {error}"])
        alarm(0)


def _limit_memory() -> None:
    """Let the process grow by `MEMORY_LIMIT` from what its imports have taken."""
    statm = "/proc/self/statm"
    if not os.path.exists(statm):  # Linux alone tells, and keeps, such a limit
        return
    import resource

    with open(statm) as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + MEMORY_LIMIT
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
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
        bare = re.sub(r"\\(?:text|math)\w*\s*\{|[{}]", "", given)
        found = re.match(r"\W*([A-Za-z])(?![A-Za-z])", bare)
        return found[1] if found else None
    # "the answer is (B)", "**Answer:** option B"; but not "Answer: I think"
    named = re.findall(
        r"(?i:answer)(?:\s+(?i:is|would be|should be))?[\s:*$(]*(?:(?i:option|choice)[\s*$(]*)?"
        r"([A-Z])(?=[\s).,:*$]*(?:$|[\n).,:*$]))",
        completion,
        flags=re.MULTILINE,
    )
    if named:
        return named[-1]
    # A line that opens with a letter, "B. Paris": the answer, unless several do and restate options
    opening = set(re.findall(r"^\W*([A-Z])(?=[).:]|\s*$)", completion.strip(), flags=re.MULTILINE))
    if len(opening) == 1:
        return opening.pop()
    # A letter alone somewhere; "A" and "I" are words too
    alone = re.findall(r"(?:^|[\s(*])([B-HJ-Z]|A(?=[).,:*]))(?=[\s).,*:]|$)", completion)
    return alone[-1] if alone else None


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
