"""A time limit for a function that runs in this process.

The alarm clock of Unix interrupts Python code and regular expressions. There is one clock in a
process, for its main thread: elsewhere, and where the clock is in use, the function runs unlimited.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

REPEAT = 0.1  # seconds until it is told again, should its own `except` have swallowed the first


class Overdue(BaseException):
    """The time is up. Not an `Exception`, which the function may well catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs inside after so many seconds.

    Raises:
        Overdue: The time was up.
    """
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
        or signal.getitimer(signal.ITIMER_REAL)[0]
    ):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Overdue

    before = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
