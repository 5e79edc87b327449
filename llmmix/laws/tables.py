"""Tables of finished runs: what each mixed, what each lost, joined by the run's id.

    run_id,name,code,docs            run_id,name,code_val_loss,docs_val_loss
    run-0000,run-0000,0.25,0.75      run-0000,run-0000,3.1,2.7

Those of a sweep of ours, of RegMix (`index`, `train_the_pile_*`, `metric/the_pile_*_val_loss`) and
of Olmix (`run` or `run_id`, `name`, `index`, metrics by their path) are read alike: separated by
commas, semicolons or tabs, or a JSON object a line.
"""

import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmmix.laws.inputs import check_mixtures

IDS = ("run_id", "run", "index", "id", "name")  # the columns that may name a run, best first
UNNAMED = ("unnamed column 1", "unnamed: 0")  # pandas' index, written once and once more
MISSING = {"", "na", "n/a", "none", "null"}
BOOKKEEPING = set(
    "step steps global_step training_step epoch epochs iteration iterations tokens n_tokens "
    "num_tokens total_tokens tokens_seen samples_seen flops total_flos seed random_seed lr "
    "learning_rate grad_norm time timestamp runtime duration wall_time created_at gpu_hours "
    "samples_per_second steps_per_second tokens_per_second".split()
)
SEPARATORS = "/_.: -"  # where a column's name may be cut
BEFORE = re.compile(
    r"(metrics?/)?(eval/(lm/|downstream/)?)?((train|valid|val|eval)[/_])?(the_pile_)?"
)
AFTER = re.compile(r"([/_ ](val|valid|eval|ce|cross_entropy))?[/_ ](loss|bpb)$", re.IGNORECASE)
# Meant as a number, though `float` may not take it (0,5 and 12%): no column of words has any
NUMERAL = re.compile(r"[+-]?[\d_.,]*\d(e[+-]?\d+)?\s*%?", re.IGNORECASE)


class _Column(str):
    """A shortened name, and the `column` of the table that it stands for."""

    column: str


@dataclass(frozen=True)
class Runs:
    """Runs that have both a mixture and losses.

    Attributes:
        ids: n, as text.
        domains: k, shortened.
        targets: m, shortened.
        mixtures: (n, k) shares, each row of sum 1.
        losses: (n, m), NaN where a run has no such loss.
        notes: What was dropped, left out or scaled, a sentence each.
    """

    ids: list[str]
    domains: list[str]
    targets: list[str]
    mixtures: np.ndarray
    losses: np.ndarray
    notes: list[str]


@dataclass
class _Table:
    argument: str
    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def at(self, row: int | None = None) -> str:
        where = f"`{self.argument}`: {self.path}"
        return where if row is None else f"{where}, line {self.lines[row]}"

    def cells(self, column: int) -> list[str]:
        return [row[column] for row in self.rows]


def read_runs(ratios: str | Path, metrics: str | Path) -> Runs:
    """Join a table of mixtures with one of losses.

    Args:
        ratios: A line a run, a column a domain.
        metrics: A line a run, a column a target. A cell that is empty or not finite is missing.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A table that cannot be read, shares that are none, or no run in common.
    """
    left, right = _load("ratios", ratios), _load("metrics", metrics)
    at = _id_columns(left, right)
    left_ids, right_ids = _ids(left, at[0]), _ids(right, at[1])
    notes: list[str] = []
    columns, shares = _read_numbers(left, at[0], notes)
    shares, sums = _check_shares(left, columns, shares)
    targets, losses = _read_numbers(right, at[1], notes)

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
                f"`{other.argument}` and were dropped: {_first(alone)}."
            )
    losses = losses[[line[run] for run in ids]]
    sums = sums[kept]
    if off := int((np.abs(sums - 1) > 1e-6).sum()):
        notes.append(
            f"The shares of {off} of {len(ids)} runs sum to something else than 1, between "
            f"{sums.min():.6g} and {sums.max():.6g}: they were divided by their sum."
        )
    targets, losses = _check_losses(right, targets, losses, notes)
    domains, targets = _shorten(columns, targets)
    return Runs(ids, domains, targets, shares[kept], losses, notes)


def find_target(name: str, targets) -> int:
    """Index of the target of a name, shortened or as its column is called.

    Args:
        name: Of one.
        targets: Their names, as `Runs` has them.

    Raises:
        ValueError: None of them, or several.
    """
    for known in (str, lambda target: getattr(target, "column", target), _bare):
        found = [i for i, target in enumerate(targets) if known(target) == known(name)]
        if len(found) == 1:
            return found[0]
    choices = ", ".join(targets)
    raise ValueError(f"`objective`: no target {name!r}; there are {choices}.")


def _load(argument: str, path: str | Path) -> _Table:
    path = Path(path)
    where = f"`{argument}`: {path}"
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{where} {kind}. Name a table: .csv, .tsv or .jsonl.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8 ({error}). Save it as such.") from error
    read = _read_jsonl if text.lstrip().startswith(("{", "[")) else _read_csv
    numbered = [(n, row) for n, row in read(text, where) if any(row)]
    if len(numbered) < 2:
        found = "only a header" if numbered else "nothing"
        raise ValueError(f"{where} holds {found}. It needs a header and a line for each run.")
    (_, header), *body = numbered
    header = [name or f"unnamed column {i}" for i, name in enumerate(header, start=1)]
    if len(header) == 1:
        raise ValueError(
            f"{where}: the header is a single column, {header[0]!r}. Separate the run's id and "
            f"the others by commas, semicolons or tabs."
        )
    if twice := _repeated(header):
        raise ValueError(f"{where}: columns of the same name: {_first(twice)}. Rename one.")
    for n, row in body:
        if len(row) != len(header):
            raise ValueError(
                f"{where}, line {n}: {len(row)} cells below a header of {len(header)}. Mend the "
                f"line: a cell that is missing is left empty."
            )
    return _Table(argument, path, header, [row for _, row in body], [n for n, _ in body])


def _read_csv(text: str, where: str):
    first = next((line for line in text.splitlines() if line.strip()), "")
    options = {"strict": True, "skipinitialspace": True}
    try:
        # The separator is the one that cuts the header into most cells
        split = {c: len(next(csv.reader([first], delimiter=c, **options), ())) for c in ",;\t"}
        reader = csv.reader(io.StringIO(text, ""), delimiter=max(split, key=split.get), **options)
        yield from ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    except csv.Error as error:
        raise ValueError(f"{where} is no table: {error}. Mend its quotes.") from error


def _read_jsonl(text: str, where: str):
    rows = []
    for n, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append((n, dict(json.loads(line).items())))
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(
                f"{where}, line {n} is no JSON object: {line[:60]!r}. Write one a run, a line each."
            ) from error
    header = list(dict.fromkeys(name for _, row in rows for name in row))
    yield 0, [name.strip() for name in header]
    for n, row in rows:
        values = (row.get(name) for name in header)
        yield n, ["" if value is None else str(value).strip() for value in values]


def _id_columns(left: _Table, right: _Table) -> tuple[int, int]:
    found = [{name.lower(): i for i, name in enumerate(t.header)} for t in (left, right)]
    for table, columns in zip((left, right), found, strict=True):
        if table.header[0].lower() in UNNAMED:
            columns[""] = 0
    # Olmix takes run for run_id; its index counts lines, and those of two tables may differ
    pairs = [("run_id", "run_id"), ("run", "run"), ("run", "run_id"), ("run_id", "run")]
    pairs += [(name, name) for name in (*IDS[2:], "")]
    for a, b in pairs:
        if a in found[0] and b in found[1]:
            return found[0][a], found[1][b]
    raise ValueError(
        f"`ratios` and `metrics` have no column in common that names the run: {left.path} has "
        f"{_first(left.header, 6)}; {right.path} has {_first(right.header, 6)}. Call it run_id in "
        f"both."
    )


def _ids(table: _Table, column: int) -> list[str]:
    # A table that had gaps comes out of pandas with 1.0 for 1
    ids = [re.sub(r"^(-?\d+)\.0+$", r"\1", cell) for cell in table.cells(column)]
    if "" in ids:
        row = ids.index("")
        raise ValueError(
            f"{table.at(row)}: the run's id, column {table.header[column]!r}, is empty. Name it."
        )
    if twice := _repeated(ids):
        lines = [table.lines[row] for row, run in enumerate(ids) if run == twice[0]]
        raise ValueError(
            f"{table.at()}: {len(twice)} ids in column {table.header[column]!r} stand for several "
            f"runs: {_first(twice)} ({twice[0]} in lines {_first(lines)}). Keep a line a run."
        )
    return ids


def _read_numbers(table: _Table, id_column: int, notes: list[str]) -> tuple[list[str], np.ndarray]:
    """The columns that are numbers, and their values, NaN where a cell is empty."""
    names, values, left_out = [], [], []
    for column, name in enumerate(table.header):
        cells = table.cells(column)
        unnamed = name == f"unnamed column {column + 1}"
        if column == id_column or (unnamed and not any(cells)):
            continue
        numbers = [_number(cell) for cell in cells]
        words = [row for row, number in enumerate(numbers) if number is None]
        if name.lower() in IDS or (column == 0 and name.lower() in UNNAMED):
            left_out.append(name)
        elif words and not any(NUMERAL.fullmatch(cell) for cell in cells):
            left_out.append(name)
        elif words:
            row = words[0]
            raise ValueError(
                f"{table.at(row)}, column {name!r}: {cells[row]!r} is no number. Write it like "
                f"0.25, or remove the column."
            )
        elif _is_bookkeeping(name) and (table.argument == "metrics" or not any(numbers)):
            left_out.append(name)
        else:
            names.append(name)
            values.append(numbers)
    kind = "domain's shares" if table.argument == "ratios" else "target's losses"
    if not names:
        raise ValueError(
            f"{table.at()} has no column of a {kind}, only {_first(table.header, 6)}. Add them."
        )
    left_out = [name for name in left_out if name.lower() not in IDS]  # a run's other names
    if left_out:
        notes.append(f"`{table.argument}`: left out as no {kind}: {_first(left_out, 6)}.")
    return names, np.array(values).T


def _number(cell: str) -> float | None:
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return None if "_" in cell else float(cell)  # `float` takes 1_000
    except ValueError:
        return None


def _is_bookkeeping(name: str) -> bool:
    last = re.sub(r"[ .-]", "_", name.lower()).rpartition("/")[2]
    return last.startswith("unnamed") or re.sub("^(eval|train|_)?_?", "", last) in BOOKKEEPING


def _check_shares(table: _Table, names: list[str], values: np.ndarray):
    """The shares, each row of sum 1, and the sums they had."""
    for row, column in np.argwhere(~(np.isfinite(values) & (values >= 0)))[:1]:
        cell = table.rows[row][table.header.index(names[column])]
        raise ValueError(
            f"{table.at(row)}, column {names[column]!r}: a share must be a number between 0 and 1, "
            f"got {cell!r}. Write 0 for a domain that the run had nothing of."
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
                    f"{table.at()}: the shares of each run sum to 1 without {_first(named, 6)}. "
                    f"Remove what is no share of a domain."
                ) from error
        row = int(np.abs(sums - 1).argmax())
        raise ValueError(
            f"{table.at(row)}: the shares sum to {sums[row]:.6g}. Give those of all domains, as "
            f"parts of 1. Are `ratios` and `metrics` the right way round?"
        ) from error


def _check_losses(table: _Table, names: list[str], losses: np.ndarray, notes: list[str]):
    losses = np.where(np.isfinite(losses), losses, np.nan)
    some = ~np.isnan(losses).all(0)
    if not some.any():
        raise ValueError(f"{table.at()} has no loss of any run that `ratios` has. Fill it in.")
    if not some.all():
        empty = [name for name, has in zip(names, some, strict=True) if not has]
        notes.append(f"`metrics`: left out, no run has a loss there: {_first(empty, 6)}.")
    names = [name for name, has in zip(names, some, strict=True) if has]
    losses = losses[:, some]
    gaps = np.isnan(losses)
    if gaps.any():
        where = [f"{gap} of {name}" for gap, name in zip(gaps.sum(0), names, strict=True) if gap]
        notes.append(
            f"{gaps.sum()} of {gaps.size} losses are empty or not finite and count as missing: "
            f"{_first(where)}."
        )
    return names, losses


def _shorten(domains: list[str], targets: list[str]) -> tuple[list[str], list[str]]:
    """Cut what all names of a table share, so far as most targets meet their domain."""
    pairs = itertools.product(_cuts(domains), _cuts(targets))
    best = max(
        pairs,
        key=lambda pair: (len({*pair[0]} & {*pair[1]}), -len("".join((*pair[0], *pair[1])))),
    )
    for short, names in zip(best, (domains, targets), strict=True):
        for name, column in zip(short, names, strict=True):
            name.column = column
    return best


def _cuts(names: list[str]) -> list[list[str]]:
    """Every way to shorten a table's names."""
    if len(names) == 1:
        return [[_Column(name)] for name in {names[0]: 0, _bare(names[0]): 0}]
    before = os.path.commonprefix(names)
    after = os.path.commonprefix([name[::-1] for name in names])
    starts = [0, *(i for i, char in enumerate(before, start=1) if char in SEPARATORS)]
    ends = [0, *(i for i, char in enumerate(after, start=1) if char in SEPARATORS)]
    shortened = [
        [_Column(name[start : len(name) - end]) for name in names]
        for start, end in itertools.product(starts, ends)
    ]
    # An empty name is none, and 1 and 2 are little to know data_1 and data_2 by
    return [s for s in shortened if all(re.search("[^\\W\\d_]", name) for name in s)] or [
        [_Column(name) for name in names]
    ]


def _bare(name: str) -> str:
    short = AFTER.sub("", name)
    return short[BEFORE.match(short).end() :] or name


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _first(names: list, most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest


def _ids_of(table: _Table, column: int, ids: list[str]) -> str:
    return f"`{table.argument}` ({table.path}) has in {table.header[column]!r} {_first(ids)}"
