"""Which mixtures a sweep trains, and its tables: a line a run, joined by `run_id`."""

import csv
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class SweepArguments:
    """Which mixtures."""

    mixtures: int = field(default=16, metadata={"help": "How many, of a sample."})
    sample: str = field(default="dirichlet", metadata={"help": "dirichlet, or grid."})
    concentration: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={"help": "Of the Dirichlet draws, in turn, times the --weights scaled to mean 1."},
    )
    grid_steps: int = field(default=4, metadata={"help": "Of a grid: shares in steps of 1 / this."})
    keep_models: bool = field(default=False, metadata={"help": "Keep every trained model."})


def choose_mixtures(args: SweepArguments, prior: np.ndarray, seed: int) -> np.ndarray:
    """(runs, m) mixtures to train.

    Args:
        args: How many, and of what sample.
        prior: (m,) around which a sample is drawn.
        seed: Of it.

    Raises:
        ValueError: A sample of another name, or no mixture.
    """
    if args.sample == "grid":
        steps = range(args.grid_steps + 1)
        every = itertools.product(steps, repeat=len(prior))
        found = [point for point in every if sum(point) == args.grid_steps]
        return np.array(found) / args.grid_steps
    if args.sample != "dirichlet" or args.mixtures < 1:
        raise ValueError(
            f"`sample` must be dirichlet, of at least one of `mixtures`, or grid; got "
            f"{args.sample!r}, {args.mixtures}."
        )
    rng = np.random.default_rng(seed)
    strengths = itertools.cycle(args.concentration)
    scaled = prior * len(prior)
    drawn = [rng.dirichlet(next(strengths) * scaled) for _ in range(args.mixtures)]
    return np.round(drawn, 4) / np.round(drawn, 4).sum(1, keepdims=True)


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
