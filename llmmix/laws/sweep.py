"""Which mixtures a sweep trains, and its tables: a line a run, joined by `run_id`."""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from llmmix.laws.inputs import check_mixtures


@dataclass
class SweepArguments:
    """Which mixtures a sweep trains."""

    mixtures: int = field(
        default=16, metadata={"help": "Number of mixtures that are drawn (--sample dirichlet)."}
    )
    sample: str = field(
        default="dirichlet",
        metadata={
            "help": "Which mixtures are trained: dirichlet (drawn), grid, or a table of mixtures "
            "(.csv) with a line for each run."
        },
    )
    concentration: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={
            "help": "Concentrations of the Dirichlet draws, used in turn, each times the --weights "
            "scaled to a mean of 1."
        },
    )
    grid_steps: int = field(
        default=4,
        metadata={"help": "Number of steps of a grid: its shares are multiples of 1 / grid_steps."},
    )
    keep_models: bool = field(
        default=False, metadata={"help": "Keep the trained model of every run."}
    )


def choose_mixtures(
    args: SweepArguments, prior: np.ndarray, seed: int, domains: Sequence[str] = ()
) -> np.ndarray:
    """(runs, m) mixtures to train.

    Args:
        args: How many mixtures, and which sample of them.
        prior: (m,) mixture around which a sample is drawn.
        seed: Seed of the draws.
        domains: m names, for a table's columns.

    Raises:
        ValueError: `sample` is no known name, `mixtures` is below 1, or a table has other domains.
    """
    if args.sample.endswith(".csv"):
        return _listed(Path(args.sample), list(domains))
    if args.sample == "grid":
        steps = range(args.grid_steps + 1)
        every = itertools.product(steps, repeat=len(prior))
        found = [point for point in every if sum(point) == args.grid_steps]
        return np.array(found) / args.grid_steps
    if args.sample != "dirichlet" or args.mixtures < 1:
        raise ValueError(
            f"`sample` must be dirichlet, of at least one of `mixtures`, grid or a .csv; got "
            f"{args.sample!r}, {args.mixtures}."
        )
    rng = np.random.default_rng(seed)
    strengths = itertools.cycle(args.concentration)
    scaled = prior * len(prior)
    drawn = [rng.dirichlet(next(strengths) * scaled) for _ in range(args.mixtures)]
    return np.round(drawn, 4) / np.round(drawn, 4).sum(1, keepdims=True)


def _listed(table: Path, domains: list[str]) -> np.ndarray:
    rows = _read(table)
    known = set(rows.columns) - {"run_id", "name"} if len(rows) else set()
    if known != set(domains):
        raise ValueError(
            f"`sample`: {table} must have a column for each of {domains}, and the names of runs "
            f"alone beside; got {sorted(known)}."
        )
    return check_mixtures(rows[domains].to_numpy(), domains, "sample")


def _read(table: Path) -> pd.DataFrame:
    """A table as text, so that a run 007 keeps its name; a byte-order mark is no part of it."""
    try:
        return pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=["run_id"])


def finished(table: Path, run: str) -> dict[str, str] | None:
    """A run's line in a table, as text; None where there is none."""
    if not table.exists():
        return None
    rows = _read(table)
    found = rows[rows["run_id"] == run].to_dict("records")
    return {str(name): cell for name, cell in found[0].items()} if found else None


def check_same(row: dict, weights: dict[str, float], table: Path) -> None:
    """Refuse to go on with a sweep of other mixtures.

    Raises:
        ValueError: `row` has other domains or shares than `weights`.
    """
    there = {name: float(value) for name, value in row.items() if name not in ("run_id", "name")}
    if there.keys() != weights.keys() or any(abs(there[n] - weights[n]) > 1e-9 for n in weights):
        raise ValueError(
            f"`output_dir`: {table} holds a sweep of other mixtures ({row['run_id']}: {there}, now "
            f"{weights}). Name another folder, or the same domains, seed and sample."
        )


def add(table: Path, run: str, values: dict[str, float]) -> None:
    """Append a run's line, below a header where there is none."""
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["run_id", "name", *values])
        if new:
            writer.writeheader()
        writer.writerow({"run_id": run, "name": run, **values})
