"""Timing calls against one another, and the memory that each takes: A B A B, medians, ratios.

The contenders of a row take turns, so that what slows the machine slows both. Peak memory is what
one call adds to what its inputs take, in a process that has done nothing else. Nothing else should
run on the machine.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llmmix.command_line.launching import end_with_caller
from llmmix.models import free_memory

# Imported before a call is measured, so that it is no part of what the call adds in memory
PRELOADED = [
    "trl.trainer.dpo_trainer",
    "llmmix.sftmix",
    "llmmix.token_losses.trainer",
    "llmmix.timing.padding",
    "peft",
]


@dataclass(frozen=True)
class Case:
    """One thing to time: picklable, so that it can be built again in a process of its own.

    Attributes:
        row: What is timed, the name of a row of the table.
        contender: Name of what does it, a line below the row.
        build: A function of a module, which makes the call from `options`.
        options: Plain values.
    """

    row: str
    contender: str
    build: Callable[..., Callable[[], dict | None]]
    options: dict[str, Any]

    def built(self) -> Callable[[], dict | None]:
        """The call to time, which may return figures of its own."""
        return self.build(**self.options)


def measure(cases: list[Case], *, rounds: int, device: str, memory: bool = True) -> dict:
    """One row of a table: the contenders in turns, then each alone for its memory.

    Args:
        cases: Ours first, then its peers.
        rounds: Timed calls of each, after one that warms up.
        device: "cpu" or "cuda".
        memory: Whether to measure peak memory too.

    Returns:
        The row's name, and `seconds`, `range`, `peak_mib` and our ratio to it by contender.
    """
    calls = [case.built() for case in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds + 1):
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            _synchronize(device)
            if turn:
                taken.append(time.perf_counter() - started)
    del call, calls
    free_memory()
    peaks = [_in_its_own_process(case, device)[1] if memory else None for case in cases]
    return _row(cases, seconds, peaks, [{} for _ in cases])


def measure_apart(cases: list[Case], *, rounds: int, device: str) -> dict:
    """One row of long calls, each in a process of its own that yields its time and its memory.

    Arguments and result are those of `measure`; a call may add figures of its own.
    """
    runs = [[_in_its_own_process(case, device) for case in cases] for _ in range(rounds)]
    by_case = list(zip(*runs, strict=True))
    seconds = [[run[0] for run in of_case] for of_case in by_case]
    peaks = [statistics.median(run[1] for run in of_case) for of_case in by_case]
    return _row(cases, seconds, peaks, [of_case[-1][2] for of_case in by_case])


def _row(
    cases: list[Case],
    seconds: Sequence[Sequence[float]],
    peaks: Sequence[float | None],
    figures: Sequence[dict],
) -> dict:
    contenders: dict[str, dict[str, Any]] = {}
    for case, taken, peak, more in zip(cases, seconds, peaks, figures, strict=True):
        contenders[case.contender] = {
            "seconds": statistics.median(taken),
            "range": [min(taken), max(taken)],
            "peak_mib": peak,
            **more,
        }
    ours, *peers = contenders.values()
    for peer in peers:
        peer["time_ratio"] = ours["seconds"] / peer["seconds"]
        # None too where a call fits into what the process holds already
        peer["memory_ratio"] = ours["peak_mib"] / peer["peak_mib"] if peer["peak_mib"] else None
    return {"row": cases[0].row, "contenders": contenders}


def _in_its_own_process(case: Case, device: str) -> tuple[float, float, dict]:
    # Forked from a process that has imported everything and computed nothing
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, context, initializer=end_with_caller) as pool:
        return pool.submit(_first_call, case, device).result()


def _first_call(case: Case, device: str) -> tuple[float, float, dict]:
    """Seconds, MiB that the call adds at its peak to what its inputs take, and its own figures."""
    import torch

    quiet()
    call = case.built()
    gc.collect()
    if device == "cpu":
        before = _resident_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="ascii"
        )  # resets the high-water mark
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    started = time.perf_counter()
    figures = call()
    _synchronize(device)
    seconds = time.perf_counter() - started
    peak = _resident_mib("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return seconds, peak - before, figures if isinstance(figures, dict) else {}


def _resident_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(
        int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name)
    )


def _synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def machine(device: str) -> dict:
    """What the figures were measured on."""
    import torch
    import transformers
    import trl

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "CPU")


def quiet() -> None:
    """No warnings and no progress bars between the rows."""
    import logging
    import warnings

    import datasets
    import transformers.utils.logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # such as that every row fills `max_length`
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
