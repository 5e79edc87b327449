"""Tables of finished runs: the mixture and the losses of each run, joined by the run's id.

    run_id,name,code,docs            run_id,name,code_val_loss,docs_val_loss
    run-0000,run-0000,0.25,0.75      run-0000,run-0000,3.1,2.7

It reads the tables of recipes/mixture_sweep.py, of RegMix (`index`, `train_the_pile_*`,
`metric/the_pile_*_val_loss`) and of Olmix (`run` or `run_id`, `name`, `index`, metrics by their
path). Cells are separated by commas, semicolons or tabs, or each line is a JSON object.
llmmix/laws/reading.py reads a single table.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from llmmix.files import write_whole
from llmmix.laws.inputs import check_mixtures, listed
from llmmix.laws.names import shorten_names
from llmmix.laws.reading import IDS, UNNAMED, Table, load_table, read_ids, read_numbers


@dataclass(frozen=True)
class Runs:
    """Runs that have both a mixture and losses.

    Attributes:
        ids: n ids, as text.
        domains: k shortened names.
        targets: m shortened names.
        mixtures: (n, k) shares, each row of sum 1.
        losses: (n, m), NaN where a run has no such loss.
        notes: What was dropped, left out or scaled, a sentence each.
    """

    ids: list[str]
    domains: Sequence[str]
    targets: Sequence[str]
    mixtures: np.ndarray
    losses: np.ndarray
    notes: list[str]

    def sample(self, count: int | None, seed: int) -> Self:
        """All runs, or `count` random ones."""
        if count is None or count >= len(self.ids):
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self.ids))[:count])
        notes = [*self.notes, f"`max_runs`: {count} of {len(self.ids)} runs are used."]
        ids, mixtures = [self.ids[i] for i in rows], self.mixtures[rows]
        return replace(self, ids=ids, mixtures=mixtures, losses=self.losses[rows], notes=notes)

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Mixtures and losses as data frames, from which a law takes the names."""
        domains, targets = ([str(name) for name in names] for names in (self.domains, self.targets))
        return (
            pd.DataFrame(self.mixtures, columns=domains),
            pd.DataFrame(self.losses, columns=targets),
        )


def read_runs(ratios: str | Path, metrics: str | Path) -> Runs:
    """Join a table of mixtures with one of losses.

    Args:
        ratios: Table with a line for each run and a column for each domain.
        metrics: Table with a line for each run and a column for each target. A cell that is empty
            or not finite counts as missing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A table cannot be read, its shares are not valid, or the two have no run in
            common.
    """
    left, right = load_table("ratios", ratios), load_table("metrics", metrics)
    at = _id_columns(left, right)
    left_ids, right_ids = read_ids(left, at[0]), read_ids(right, at[1])
    notes: list[str] = []
    columns, shares = read_numbers(left, at[0], notes)
    shares, sums = _check_shares(left, columns, shares)
    targets, losses = read_numbers(right, at[1], notes)

    line = {run: row for row, run in enumerate(right_ids)}
    kept = [row for row, run in enumerate(left_ids) if run in line]
    ids = [left_ids[row] for row in kept]
    if not ids:
        raise ValueError(
            f"No run is in both tables. {_ids_of(left, at[0], left_ids)}, "
            f"{_ids_of(right, at[1], right_ids)}. Give a run the same id in both."
        )
    common = set(ids)
    for table, runs, other in ((left, left_ids, right), (right, right_ids, left)):
        if alone := [run for run in runs if run not in common]:
            notes.append(
                f"{len(alone)} of {len(runs)} runs of `{table.argument}` are not in "
                f"`{other.argument}` and were dropped: {listed(alone, 3)}."
            )
    losses = losses[[line[run] for run in ids]]
    sums = sums[kept]
    if off := int((np.abs(sums - 1) > 1e-6).sum()):
        notes.append(
            f"The shares of {off} of {len(ids)} runs sum to something else than 1, between "
            f"{sums.min():.6g} and {sums.max():.6g}: they were divided by their sum."
        )
    targets, losses = _check_losses(right, targets, losses, notes)
    short = shorten_names(columns, targets)
    return Runs(ids, *short, shares[kept], losses, notes)


def read_runs_like(runs: Runs, ratios: str | Path, metrics: str | Path) -> Runs:
    """Runs of other models, on the same domains.

    Args:
        runs: Runs whose domains the others must have, in any order.
        ratios: As `read_runs` takes it.
        metrics: As `read_runs` takes it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `read_runs` refuses the tables, the domains differ, or there are fewer than 3
            runs.
    """
    found = read_runs(ratios, metrics)
    ours, theirs = set(runs.domains), set(found.domains)
    if ours != theirs:
        raise ValueError(
            f"`transfer`: {ratios} must have the domains of `ratios`; it lacks "
            f"{sorted(ours - theirs)} and adds {sorted(theirs - ours)}."
        )
    if len(found.ids) < 3:
        raise ValueError(f"`transfer`: ranking takes 3 runs, {ratios} has {len(found.ids)}.")
    return found


def write_mixtures(path: Path, domains: Sequence[str], mixtures: np.ndarray, name: str) -> None:
    """Write a table of mixtures, which `read_runs` can read as `ratios`.

    Args:
        path: File to write.
        domains: k names.
        mixtures: (n, k) shares.
        name: Name of the runs, to which a number is added.
    """
    lines = [["run_id", "name", *domains]]
    for i, shares in enumerate(mixtures):
        run = f"{name}-{i:04d}"
        lines.append([run, run, *(f"{share:.6f}" for share in shares)])
    write_table(path, lines)


def write_table(path: Path, lines: Sequence[Sequence[object]]) -> None:
    """Write a table, its header first, in one step: a reader finds whole lines alone."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_whole(path, text.getvalue())


def _id_columns(left: Table, right: Table) -> tuple[int, int]:
    found = [{name.lower(): i for i, name in enumerate(t.header)} for t in (left, right)]
    for table, columns in zip((left, right), found, strict=True):
        if table.header[0].lower() in UNNAMED:
            columns[""] = 0
    # Olmix uses run for run_id; its index counts lines, which may differ between two tables
    pairs = [("run_id", "run_id"), ("run", "run"), ("run", "run_id"), ("run_id", "run")]
    pairs += [(name, name) for name in (*IDS[2:], "")]
    for a, b in pairs:
        if a in found[0] and b in found[1]:
            return found[0][a], found[1][b]
    raise ValueError(
        f"`ratios` and `metrics` have no column in common that names the run: {left.path} has "
        f"{listed(left.header, 6)}; {right.path} has {listed(right.header, 6)}. Call it run_id in "
        f"both."
    )


def _check_shares(table: Table, names: list[str], values: np.ndarray):
    """The shares, scaled to rows of sum 1, and the sums that they had."""
    for row, column in np.argwhere(~(np.isfinite(values) & (values >= 0)))[:1]:
        cell = table.rows[row][table.header.index(names[column])]
        raise ValueError(
            f"{table.at(row)}, column {names[column]!r}: a share must be a number between 0 and 1, "
            f"got {cell!r}. Write 0 for a domain that the run did not use."
        )
    sums = values.sum(1)
    try:
        return check_mixtures(values, names, "ratios"), sums
    except ValueError as error:
        if (np.abs(sums - 100) < 1).all():
            raise ValueError(
                f"{table.at()}: the shares of each run sum to 100. Divide percentages by 100."
            ) from error
        strange = (values > 1).any(0)
        for out in (strange, *np.eye(len(names), dtype=bool)):
            if out.any() and (np.abs(values[:, ~out].sum(1) - 1) < 0.01).all():
                named = [f"{names[j]} ({values[0, j]:g} in the first)" for j in np.flatnonzero(out)]
                raise ValueError(
                    f"{table.at()}: the shares of each run sum to 1 without {listed(named, 6)}. "
                    f"Remove columns that are no share of a domain."
                ) from error
        row = int(np.abs(sums - 1).argmax())
        raise ValueError(
            f"{table.at(row)}: the shares sum to {sums[row]:.6g}. Give those of all domains, as "
            f"parts of 1. Are `ratios` and `metrics` the right way round?"
        ) from error


def _check_losses(table: Table, names: list[str], losses: np.ndarray, notes: list[str]):
    losses = np.where(np.isfinite(losses), losses, np.nan)
    some = ~np.isnan(losses).all(0)
    if not some.any():
        raise ValueError(f"{table.at()} has no loss of any run that `ratios` has. Fill it in.")
    if not some.all():
        empty = [name for name, has in zip(names, some, strict=True) if not has]
        notes.append(f"`metrics`: left out, no run has a loss there: {listed(empty, 6)}.")
    names = [name for name, has in zip(names, some, strict=True) if has]
    losses = losses[:, some]
    gaps = np.isnan(losses)
    if gaps.any():
        where = [f"{gap} of {name}" for gap, name in zip(gaps.sum(0), names, strict=True) if gap]
        notes.append(
            f"{gaps.sum()} of {gaps.size} losses are empty or not finite and count as missing: "
            f"{listed(where, 3)}."
        )
    return names, losses


def _ids_of(table: Table, column: int, ids: list[str]) -> str:
    return f"`{table.argument}` ({table.path}) has in {table.header[column]!r} {listed(ids, 3)}"
