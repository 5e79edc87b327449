"""Reads one table of runs: separated by commas, semicolons or tabs, or JSON objects.

The objects stand a line each, or in a list. A file that ends in .gz is unpacked.

llmmix/laws/tables.py joins two of them.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from llmmix.laws.inputs import listed

IDS = ("run_id", "run", "index", "id", "name")  # the columns that may name a run, best first
UNNAMED = ("unnamed column 1", "unnamed: 0")  # an index that pandas wrote, once or twice
MISSING = {"", "na", "n/a", "none", "null"}
BOOKKEEPING = set(
    "step steps global_step training_step epoch epochs iteration iterations tokens n_tokens "
    "num_tokens total_tokens tokens_seen samples_seen flops total_flos seed random_seed lr "
    "learning_rate grad_norm time timestamp runtime duration wall_time created_at gpu_hours "
    "samples_per_second steps_per_second tokens_per_second".split()
)
# A cell meant as a number, though `float` may refuse it (0,5 or 12%)
NUMERAL = re.compile(r"[+-]?[\d_.,]*\d(e[+-]?\d+)?\s*%?", re.IGNORECASE)


@dataclass
class Table:
    """A table as text.

    Args:
        argument: Argument that named the table, for error messages.
        path: File of the table.
        header: Names of the columns.
        rows: Cells of each line below the header.
        lines: Number of each of these lines in the file.
    """

    argument: str
    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def at(self, row: int | None = None) -> str:
        """The place of a row, or of the table, for an error message."""
        where = f"`{self.argument}`: {self.path}"
        return where if row is None else f"{where}, line {self.lines[row]}"

    def cells(self, column: int) -> list[str]:
        """The cells of a column."""
        return [row[column] for row in self.rows]


def load_table(argument: str, path: str | Path) -> Table:
    """Read a table with a header and at least one line below it.

    Args:
        argument: Argument that named the table, for error messages.
        path: File of the table.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, is not UTF-8 text, is not a table, or has a line with
            another number of cells than the header.
    """
    path = Path(path).expanduser()
    where = f"`{argument}`: {path}"
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{where} {kind}. Name a table: .csv, .tsv or .jsonl.")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{where} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}). Save it as UTF-8.") from error
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
        raise ValueError(f"{where}: columns of the same name: {listed(twice, 3)}. Rename one.")
    for n, row in body:
        if len(row) != len(header):
            raise ValueError(
                f"{where}, line {n}: {len(row)} cells below a header of {len(header)}. Mend the "
                f"line: leave a missing cell empty."
            )
    return Table(argument, path, header, [row for _, row in body], [n for n, _ in body])


def _read_csv(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(",;\t", key=lambda one: _count_cells(first, one))
    try:
        # Cells in quotes may hold line ends, and a cell a lone quote: count with quotes and without
        lines = [*text.splitlines(), *"".join(text.split('"')[::2]).splitlines()]
        width = 1 + max((line.count(separator) for line in lines), default=0)
        table = _parsed(text, separator, width)
        if not isinstance(table.index, pd.RangeIndex):  # more cells: pandas made an index of some
            raise pd.errors.ParserError("quotes that do not match")
    except pd.errors.ParserError as error:
        raise ValueError(f"{where} is no table: {error}. Mend its quotes.") from error
    number = 0
    for row in table.itertuples(index=False):
        cells = [cell for cell in row if isinstance(cell, str)]  # a cell that is not there is NaN
        number += 1 + sum(cell.count("\n") for cell in cells)
        yield number, [cell.strip() for cell in cells]


def _count_cells(header: str, separator: str) -> int:
    """Number of cells into which a separator cuts a header; 0 where its quotes do not match."""
    try:
        return int(_parsed(header, separator, header.count(separator) + 1).notna().to_numpy().sum())
    except pd.errors.ParserError:
        return 0


def _parsed(text: str, separator: str, width: int) -> pd.DataFrame:
    """All lines of a text, as text; `width` is the largest possible number of columns."""
    return pd.read_csv(
        io.StringIO(text, newline=None),
        sep=separator,
        header=None,
        names=range(width),
        dtype=str,
        keep_default_na=False,
        skip_blank_lines=False,
        skipinitialspace=True,
        engine="python",  # tells an empty cell from a missing one, and is strict about quotes
    )


def _read_jsonl(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    if text.lstrip().startswith("["):
        text = _lines_of_list(text, where)
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


def _lines_of_list(text: str, where: str) -> str:
    try:
        return "\n".join(map(json.dumps, json.loads(text)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno} is no JSON: {error.msg}.") from error


def read_ids(table: Table, column: int) -> list[str]:
    """The ids of a table's runs, as text.

    Raises:
        ValueError: An id is empty or occurs twice.
    """
    # pandas writes 1.0 for 1 in a column that had gaps
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
            f"runs: {listed(twice, 3)} ({twice[0]} in lines {listed(lines, 3)}). Keep a line a run."
        )
    return ids


def read_numbers(table: Table, id_column: int, notes: list[str]) -> tuple[list[str], np.ndarray]:
    """The columns of numbers, and their values; NaN where a cell is empty.

    Args:
        table: Table of shares (`ratios`) or losses (`metrics`).
        id_column: Index of the column of ids.
        notes: Receives a sentence on columns that are left out.

    Raises:
        ValueError: A column of numbers has a cell that is not one, or no column has numbers.
    """
    names: list[str] = []
    values: list[list[float | None]] = []
    left_out: list[str] = []
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
            f"{table.at()} has no column of a {kind}, only {listed(table.header, 6)}. Add them."
        )
    left_out = [name for name in left_out if name.lower() not in IDS]  # a run's other names
    if left_out:
        notes.append(f"`{table.argument}`: left out as no {kind}: {listed(left_out, 6)}.")
    return names, np.array(values, dtype=np.float64).T


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


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
