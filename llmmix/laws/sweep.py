"""Which mixtures a sweep trains, and its tables: a line a run, joined by `run_id`."""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmmix.laws.inputs import check_mixtures


@dataclass
class SweepArguments:
    """Which mixtures."""

    mixtures: int = field(default=16, metadata={"help": "How many, of a sample."})
    sample: str = field(
        default="dirichlet",
        metadata={"help": "dirichlet, grid, or a table of mixtures (.csv), a line a run."},
    )
    concentration: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={"help": "Of the Dirichlet draws, in turn, times the --weights scaled to mean 1."},
    )
    grid_steps: int = field(default=4, metadata={"help": "Of a grid: shares in steps of 1 / this."})
    keep_models: bool = field(default=False, metadata={"help": "Keep every trained model."})


def choose_mixtures(
    args: SweepArguments, prior: np.ndarray, seed: int, domains: Sequence[str] = ()
) -> np.ndarray:
    """(runs, m) mixtures to train.

    Args:
        args: How many, and of what sample.
        prior: (m,) around which a sample is drawn.
        seed: Of it.
        domains: m names, for a table's columns.

    Raises:
        ValueError: A sample of another name, no mixture, or a table of other domains.
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
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    known = set(rows[0]) - {"run_id", "name"} if rows else set()
    if known != set(domains):
        raise ValueError(
            f"`sample`: {table} must have a column for each of {domains}, and the names of runs "
            f"alone beside; got {sorted(known)}."
        )
    return check_mixtures([[row[name] for name in domains] for row in rows], domains, "sample")


def finished(table: Path, run: str) -> dict | None:
    """A run's line in a table."""
    if not table.exists():
        return None
    with table.open() as file:
        return next((row for row in csv.DictReader(file) if row["run_id"] == run), None)


def check_same(row: dict, weights: dict[str, float], table: Path) -> None:
    """Refuse to go on with a sweep of other mixtures.

    Raises:
        ValueError: A line has other domains or shares.
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
