"""The mixtures of a sweep, and its tables: a line for each run, joined by `run_id`.

recipes/mixture_sweep.py trains the mixtures; llmmix/laws/tables.py reads the tables.
"""

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
        default=16, metadata={"help": "Number of mixtures to draw (--sample dirichlet)."}
    )
    sample: str = field(
        default="dirichlet",
        metadata={
            "help": "Mixtures to train: dirichlet (random draws), grid, or a table of mixtures "
            "(.csv) with a line for each run."
        },
    )
    concentration: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={
            "help": "Concentrations of the Dirichlet draws, used in turn. Each is multiplied by "
            "the --weights, scaled to a mean of 1."
        },
    )
    grid_steps: int = field(
        default=4,
        metadata={"help": "Number of steps of the grid: shares are multiples of 1 / grid_steps."},
    )
    keep_models: bool = field(
        default=False, metadata={"help": "Keep the trained model of every run."}
    )


def choose_mixtures(
    args: SweepArguments, prior: np.ndarray, seed: int, domains: Sequence[str] = ()
) -> np.ndarray:
    """(runs, m) mixtures to train.

    Args:
        args: Options of the sweep.
        prior: (m,) mixture around which mixtures are drawn.
        seed: Seed of the draws.
        domains: m names, which are the columns of a table of mixtures.

    Raises:
        ValueError: `sample` is unknown, `mixtures` or `grid_steps` is below 1, a concentration is
            not positive, or the table has other domains.
    """
    if args.sample.endswith(".csv"):
        return _listed(Path(args.sample), list(domains))
    if args.sample == "grid":
        if args.grid_steps < 1:
            raise ValueError(f"`grid_steps` must be at least 1, got {args.grid_steps}.")
        steps = range(args.grid_steps + 1)
        every = itertools.product(steps, repeat=len(prior))
        found = [point for point in every if sum(point) == args.grid_steps]
        return np.array(found) / args.grid_steps
    if args.sample != "dirichlet" or args.mixtures < 1:
        raise ValueError(
            f"`sample` must be dirichlet (with `mixtures` of at least 1), grid or a .csv; got "
            f"{args.sample!r} and `mixtures` {args.mixtures}."
        )
    if not all(0 < c < np.inf for c in args.concentration) or not args.concentration:
        raise ValueError(
            f"`concentration` must be positive numbers, one or more, got {args.concentration}."
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
            f"`sample`: {table} must have a column for each of {domains}, and no others but run_id "
            f"and name; got {sorted(known)}."
        )
    return check_mixtures(rows[domains].to_numpy(), domains, "sample")


def _read(table: Path) -> pd.DataFrame:
    """A table as text, so that a run 007 keeps its name; a byte-order mark is skipped."""
    try:
        return pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=["run_id"])


def finished(table: Path, run: str) -> dict[str, str] | None:
    """The line of a run in a table, as text; None if the table has no such line."""
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
    """Append the line of a run; a new table gets a header first."""
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["run_id", "name", *values])
        if new:
            writer.writeheader()
        writer.writerow({"run_id": run, "name": run, **values})
