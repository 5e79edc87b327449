"""Writers that die at a byte: a child process whose files may not grow beyond it."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager

HOLD = "import sys; from llmmix.files import claim; claim(sys.argv[1]); print(flush=True)\n"
HOLD += "sys.stdin.read()"


def dies_at(byte: int, write: Callable[[], object], full_disk: bool = False) -> bool:
    """Whether `write`, in a child, was killed at a byte of a file, or failed there: a full disk."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN if full_disk else signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            write()
            os._exit(0)
        except OSError:
            os._exit(3)
        finally:
            os._exit(4)
    _, status = os.waitpid(pid, 0)
    if full_disk:
        return {0: False, 3: True}[os.waitstatus_to_exitcode(status)]
    return {0: False, -signal.SIGXFSZ: True}[os.waitstatus_to_exitcode(status)]


@contextmanager
def another_process_in(folder):
    """A process that has claimed a folder; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()  # it says when it has it
        yield process
    finally:
        process.kill()
        process.communicate()
