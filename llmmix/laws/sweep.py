"""The mixtures of a sweep, and its tables: a line for each run, joined by `run_id`.

recipes/mixture_sweep.py trains the mixtures; llmmix/laws/tables.py reads the tables. A line counts
if it is whole: it ends with a line end, and has a cell for each name of the header.
"""

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmmix.files import warn_not_whole
from llmmix.laws.inputs import check_mixtures
from llmmix.laws.reading import load_table
from llmmix.laws.tables import write_table


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
            "(.csv, .tsv or .jsonl, .gz or not) with a line for each run."
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
    if args.sample.removesuffix(".gz").endswith((".csv", ".tsv", ".jsonl")):
        return _listed(args.sample, list(domains))
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


def _listed(path: str, domains: list[str]) -> np.ndarray:
    table = load_table("sample", path)
    if set(table.header) - {"run_id", "name"} != set(domains):
        raise ValueError(
            f"{table.at()} must have a column for each of {domains}, and no others but run_id and "
            f"name; got {table.header}."
        )
    columns = [table.cells(table.header.index(domain)) for domain in domains]
    return check_mixtures(np.transpose(columns), domains, "sample")


def finished(table: Path, run: str) -> dict[str, str] | None:
    """The line of a run in a table, as text; None if the table has no such line that is whole."""
    header, lines = _whole_lines(table)
    rows = (dict(zip(header, line, strict=True)) for line in lines)
    return next((row for row in rows if row.get("run_id") == run), None)


def _whole_lines(table: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the lines below it that are whole; a word on the others."""
    if not table.exists():
        return [], []
    text = table.read_bytes().decode("utf-8-sig", errors="replace")
    whole, end, rest = text.rpartition("\n")  # what is cut within a number looks like a number
    lines = [line for line in csv.reader(io.StringIO(whole + end, newline="")) if line]
    header = lines.pop(0) if lines else []
    kept = [line for line in lines if len(line) == len(header)]
    if torn := len(lines) - len(kept) + bool(rest):
        warn_not_whole(f"{table}: not whole and left out: {torn} of its lines")
    return header, kept


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
    """Add the line of a run, in one step; the table is begun if there is none.

    A value goes below its name, whatever the order. A new name gets a column, which is empty for
    the runs before. Lines that are not whole are dropped.
    """
    header, lines = _whole_lines(table)
    cells = {"run_id": run, "name": run, **values}
    names = list(dict.fromkeys([*(header if lines else []), *cells]))
    lines = [line + [""] * (len(names) - len(line)) for line in lines]
    write_table(table, [names, *lines, [cells.get(name, "") for name in names]])
