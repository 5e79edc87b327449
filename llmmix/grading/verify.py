r"""Is this completion right? A verdict on each sampled answer, from a process that may be killed.

    Verifier("math")      math-verify: LaTeX, numbers, sets, intervals, compared as mathematics
    Verifier("exact")     the last \boxed{...} is the reference, spaces aside
    Verifier("normalized")  \boxed{...}, or all that was said, is the reference once case,
                          punctuation and articles are gone; a number keeps its point and sign
    Verifier("choice")    the letter chosen is the reference's
    Verifier("module:function")  your own (completion, answer) -> bool, or None if unparsable

A verdict is "right", "wrong", "unparsable" (no answer was found in the completion) or "failed" (the
verifier raised, crashed or ran out of time: the sample is not judged, and not counted as wrong).
"""

import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from llmmix.grading.alarm import Overdue, time_limit
from llmmix.grading.answers import BUILT_IN, RULES, Verdict, verdict_of
from llmmix.grading.worker import Worker
from llmmix.grading.written import boxed_answer, final_text

if TYPE_CHECKING:
    from llmmix.sampling.requests import Completion

BACKLOG = 512  # completions that may wait for a verdict
REMEMBERED = 10_000  # pairs whose verdicts are kept


class Verifier:
    """Judges completions; safe to call from several threads.

    What has a name runs in processes of its own, each call under a time limit: a process that
    overstays is killed and another started. Pairs seen lately are not judged again.

    Args:
        function: A name of this module's docstring, "module:function" (found in the current folder
            too), or a callable, which runs in this process: there the time limit holds on Unix, in
            the main thread, and unless the callable sets alarms of its own.
        timeout: Seconds an answer may take.
        workers: Processes, for what has a name.

    Attributes:
        name: The name, or module:function of a callable.
        rules: Version of the rules of a built-in verifier, and of math-verify for "math"; None for
            a function of the user's.

    Raises:
        ValueError: The name is unknown, the function cannot be imported, `timeout` is not positive
            or `workers` is below 1.
    """

    def __init__(
        self,
        function: str | Callable[[str, str], Any] = "math",
        *,
        timeout: float = 10.0,
        workers: int = 1,
    ):
        if not timeout > 0 or workers < 1:
            raise ValueError(
                f"`timeout` must be positive and `workers` 1 or more, got {timeout} and {workers}."
            )
        self.name = function if isinstance(function, str) else _name(function)
        self.rules = _rules(self.name)
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[str, str], Future[Verdict]] = OrderedDict()
        self._errors: dict[tuple[str, str], str] = {}
        self._local: Callable[[str, str], Any] | None = None
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(workers)
        self._idle: list[Worker] = []
        if not isinstance(function, str):
            self._local = function
        else:
            path = f"llmmix.grading.answers:{function}" if function in BUILT_IN else function
            if not re.fullmatch(r"[\w.]+:[\w.]+", path):
                raise ValueError(
                    f"`verifier`: no {function!r}; there are {', '.join(BUILT_IN)}, or name a "
                    "function of yours as module:function."
                )
            self._idle = [Worker(path, timeout) for _ in range(workers)]

    def __call__(self, completion: str, answer: str) -> Verdict:
        """The verdict on one completion."""
        return self.submit(completion, answer).result()

    def submit(self, completion: str, answer: str) -> Future[Verdict]:
        """A future of the verdict."""
        if self._local:
            return _done(self._judge_here(self._local, completion, str(answer)))
        key = (self._text_that_counts(completion), str(answer))
        with self._lock:
            if key not in self._seen:
                self._seen[key] = self._pool.submit(self._judge_outside, *key)
                if len(self._seen) > REMEMBERED:
                    self._seen.popitem(last=False)
            self._seen.move_to_end(key)
            return self._seen[key]

    def forget(self, futures: Iterable[Future[Verdict]]) -> None:
        """Cancel verdicts that nobody has begun to judge."""
        given_up = {id(future) for future in futures if future.cancel()}
        with self._lock:
            for key in [key for key, future in self._seen.items() if id(future) in given_up]:
                del self._seen[key]

    def why(self, completion: str, answer: str) -> str | None:
        """The error of a verification that failed, or None."""
        return self._errors.get((self._text_that_counts(completion), str(answer)))

    def close(self) -> None:
        """End the processes of the verifier."""
        self._pool.shutdown(cancel_futures=True)
        for worker in self._idle:
            worker.kill()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _text_that_counts(self, completion: str) -> str:
        # Many samples box one answer: it is judged once
        by_box = self.name in BUILT_IN and self.name != "choice"
        given = boxed_answer(final_text(completion)) if by_box else None
        return completion if given is None else f"\\boxed{{{given}}}"

    def _judge_here(
        self, function: Callable[[str, str], Any], completion: str, answer: str
    ) -> Verdict:
        try:
            with time_limit(self._timeout):
                return verdict_of(function(completion, answer))
        except Overdue:
            return self._failed(completion, answer, f"no verdict within {self._timeout:g} s")
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
        # It may quote the completion, and is printed: no control characters of a model's making
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in error[:200])
        self._errors[completion, answer] = "".join(shown)
        return "failed"


def judge(
    completions: Iterable["Completion"], answers: Mapping[int, str], verifier: Verifier
) -> Iterator[tuple["Completion", Verdict]]:
    """Each completion with its verdict, judged while the next ones are sampled.

    Args:
        completions: Completions, as they are sampled.
        answers: The reference of each prompt, by its number.
        verifier: The verifier to judge by.
    """
    pending: deque[tuple[Completion, Future[Verdict]]] = deque()
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
        # Stopped half way: nobody needs the rest, and the interpreter must not wait for it to exit
        verifier.forget([verdict for _, verdict in pending])


def _done(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


def _rules(name: str) -> str | None:
    if name == "math":
        return f"{RULES}, math-verify {version('math-verify')}"
    return str(RULES) if name in BUILT_IN else None


def _name(function: Callable) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
