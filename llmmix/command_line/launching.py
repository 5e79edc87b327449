"""Run a script here, or on several processes, each of which runs it as one alone would.

A script imports what is installed, and a script of the user's own the modules beside it too; never
what happens to be in the current folder. Several processes are one run: they end with the one that
started them, and what ends the run is told once.
"""

import json
import logging
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from llmmix.command_line.boundary import explain, shows_traceback

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LIBRARY = Path(__file__).resolve().parents[1]
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where a process leaves what the launcher is to tell
SAFE_PATH = "PYTHONSAFEPATH"
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # as torchrun


class UsageError(ValueError):
    """A mistake on the command line, shown without a traceback."""


def command_line(command: str, name: str, flags: Sequence[str]) -> list[str]:
    """The command by which this process starts another: `llmmix COMMAND NAME FLAGS`.

    The process imports nothing from the current folder, and ends when this one has ended.
    """
    python = [sys.executable, "-u", "-P", "-m", "llmmix.cli"]
    return [*python, command, "--launcher", str(os.getpid()), name, *flags]


def end_with(parent: int) -> None:
    """End this process once `parent`, which started it, has ended, even by a kill.

    Args:
        parent: Id of the process. On Windows nothing is seen of its end.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_with_caller() -> None:
    """As the `initializer` of a process pool: end with the caller, and at Ctrl-C without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with(os.getppid())


def run_script(script: Path, title: str, *, shipped: bool, launcher: int | None = None) -> int:
    """Run a script in this process, with the flags in `sys.argv`.

    Args:
        script: Its path.
        title: How a message names the run: `llmmix run dco`.
        shipped: Whether it is one of ours. One of the user's imports from its own folder.
        launcher: Id of the process that started this one for the run, and tells how it ended.

    Returns:
        The exit status: 2 after an error of the user's (see boundary.py), 130 after Ctrl-C.

    Raises:
        Exception: The script failed in another way, and there is no launcher to tell.
    """
    error_file = None
    if launcher is not None:
        error_file = os.environ.pop(ERROR_FILE, None)
        # `mpirun`, or DeepSpeed's launcher for several machines, may stand between the two
        end_with(launcher if error_file else os.getppid())
    # It raises what it logs, and that is told once
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    try:
        with _imports(script, shipped):
            runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        if launcher is None:
            _say_ended(title, signal.SIGINT)
        return 128 + signal.SIGINT
    except Exception as error:
        ours = [LIBRARY, script.resolve()] if shipped else [LIBRARY]
        told = explain(error, ours)
        if told is None and error_file is None:
            raise
        lines = [] if told and not shows_traceback() else [traceback.format_exc()]
        text = "".join([*lines, *([f"{title}: {told}"] if told else [])])
        if error_file is None:
            print(text, file=sys.stderr)
        else:
            _leave(Path(error_file), text, status=2 if told else 1)
        return 2 if told else 1
    return 0


def _say_ended(title: str, by: signal.Signals) -> None:
    how = "interrupted" if by == signal.SIGINT else f"ended by {by.name}"
    below = "\n" if sys.stderr.isatty() else ""  # the progress bar, and the terminal's ^C
    print(f"{below}{title}: {how}.", file=sys.stderr)


@contextmanager
def _imports(script: Path, shipped: bool) -> Iterator[None]:
    """Where the script, and the Python processes that it starts, import from."""
    path, safe = list(sys.path), os.environ.get(SAFE_PATH)
    if shipped:
        os.environ[SAFE_PATH] = "1"
    else:
        sys.path.insert(0, str(script.resolve().parent))  # as `python SCRIPT` does
    try:
        yield
    finally:
        sys.path[:] = path
        if safe is None:
            os.environ.pop(SAFE_PATH, None)
        else:
            os.environ[SAFE_PATH] = safe


def _leave(error_file: Path, text: str, status: int) -> None:
    """Write down what ended this process, as torchrun expects it."""
    from llmmix.files import write_whole

    left = {"message": text, "timestamp": time.time(), "status": status}
    write_whole(error_file, json.dumps(left))


def run_processes(command: list[str], title: str, count: int | None, config: str | None) -> int:
    """Run a command on several processes, by torchrun or by `accelerate launch`.

    Args:
        command: As `command_line` gives it.
        title: How a message names the run.
        count: The number of processes; None leaves it to `config`.
        config: A file that `accelerate config` wrote; None for torchrun.

    Returns:
        The exit status: that of the process that failed first, or 128 and the signal that ended
        the launcher or that process.

    Raises:
        UsageError: accelerate refuses `config`.
    """
    with tempfile.TemporaryDirectory(prefix="llmmix_") as folder:
        try:
            return _run_processes(command, title, count, config, folder)
        except KeyboardInterrupt:  # before there are processes: torchrun has its own handler
            _say_ended(title, signal.SIGINT)
            return 128 + signal.SIGINT


def _run_processes(
    command: list[str], title: str, count: int | None, config: str | None, folder: str
) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _hush()
    try:
        if config is None:
            _torchrun(command, count or 1, folder)
        else:
            _accelerate(command, count, config, folder)
    except ChildFailedError as error:
        return _tell(error.failures, title)
    except subprocess.CalledProcessError as error:  # one process alone, which has told why
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except SignalException as error:
        _say_ended(title, error.sigval)
        return 128 + error.sigval
    return 0


def _torchrun(command: list[str], count: int, folder: str) -> None:
    # On a CPU, `accelerate launch` starts one process whatever it is told; torchrun starts all
    from torch.distributed.run import parse_args, run

    options = ["--standalone", f"--nproc_per_node={count}", f"--log_dir={folder}", "--no_python"]
    # Without the dashes torchrun takes a flag such as `--n` for the start of one of its own
    args = parse_args([*options, "--", *command])
    args.signals_to_handle = _signals()  # not every version has a flag for it
    run(args)


def _accelerate(command: list[str], count: int | None, config: str, folder: str) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--config_file", config]
    if count is not None:
        options += ["--num_processes", str(count)]
    # For DeepSpeed accelerate adds the current folder to it
    path = f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"
    parser = launch_command_parser()
    args = parser.parse_args([*options, "--no_python", "env", path, *command])
    args.log_dir, args.signals_to_handle = folder, _signals()  # torchrun's, which it hands on
    try:
        launch_command(args)
    except (ValueError, ImportError, OSError, AssertionError) as error:
        raise UsageError(f"`--accelerate_config` {config}: {error}") from error


def _signals() -> str:
    """What ends the launcher: not what it was told to ignore, as `nohup` does with SIGHUP."""
    known = [name for name in SIGNALS if hasattr(signal, name)]
    return ",".join(n for n in known if signal.getsignal(getattr(signal, n)) != signal.SIG_IGN)


def _hush() -> None:
    """Leave it to `_tell` to say how processes ended, unless torchrun's own variable is set."""
    import torch.distributed.run  # noqa: F401  makes the loggers

    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed."):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def _tell(failures: "Mapping[int, ProcessFailure]", title: str) -> int:
    """Print what failed first, and return its status: the others failed because of it."""
    # The launcher ends the others by SIGTERM when one has failed
    failed = {r: f for r, f in failures.items() if f.exitcode != -signal.SIGTERM} or failures
    left = {rank: f.error_file_data for rank, f in failed.items() if "status" in f.error_file_data}
    for rank, failure in failed.items():
        status = failure.exitcode
        if rank not in left:
            how = (
                f"ended with status {status}"
                if status > 0
                else f"was ended by {failure.signal_name()}"
            )
            print(f"{title}: process {rank} {how}.", file=sys.stderr)
    if not left:
        status = next(iter(failed.values())).exitcode
        return status if status > 0 else 128 - status
    rank, first = min(left.items(), key=lambda item: item[1]["timestamp"])
    if first["status"] == 1:
        print(f"{title}: process {rank} failed.", file=sys.stderr)
    print(first["message"].rstrip(), file=sys.stderr)
    return first["status"]


def is_unread(stream: TextIO) -> bool:
    """Whether who read a stream has gone, as `head` does; then the rest of it is dropped."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True
