"""Files of rows: JSON, JSON lines, CSV, tab-separated and plain text, compressed or not.

A row says what its file says. Text stays text, dates too; a cell of a CSV is text, so that 007,
1e5, NA and True are what they are, and a blank one is null. A column with texts and numbers is a
column of texts. Rows are read once, into the cache, and are mapped from there.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict
from datasets.arrow_writer import ArrowWriter

from llmmix.files import built_once, file_digest, write_whole
from llmmix.rows.row_types import fitted, holds_json, merged, table_of, type_of_rows

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# Columns of a CSV that trainers calculate with
NUMBERS = ("confidence", "weight", "ref_chosen_logps", "ref_rejected_logps")
# Keys of a JSON object that holds rows, and of one that holds them by split
HOLDERS = ("data", "rows", "examples", "instances")
SPLITS = {
    *("train", "test", "validation", "valid", "dev", "eval"),
    *("forget", "retain", "holdout", "facts"),
}
BATCH = 1000  # rows whose types are found at once

Row = dict[str, Any]
Placed = tuple[str | None, Row]  # a row, and the split that its file names for it


def format_of(path: str | Path) -> str | None:
    """The suffix of a format that is read here, without that of a compression; or None."""
    name = Path(path).name.lower()
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    return suffix if (suffix := Path(name).suffix) in READERS else None


def read_files(
    files: Mapping[str, Sequence[Path]], argument: str, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """The rows of files, by split.

    Args:
        files: Files of each split. A JSON file that names its own splits keeps them.
        argument: Name of what named the files, for errors.
        streaming: Read rows as they are asked for. Their types are those of the first 1,000.

    Raises:
        ValueError: A file has no rows, is broken or is not UTF-8; the message names file and line.
    """
    listed = {split: [os.path.abspath(path) for path in paths] for split, paths in files.items()}
    if streaming:
        return _streamed(listed, argument)
    stamps = [(s, p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for s in listed for p in listed[s]]
    made_by = [file_digest(Path(__file__).with_name(f"row_{x}.py")) for x in ("files", "types")]
    key = hashlib.sha256(json.dumps([stamps, made_by]).encode()).hexdigest()[:24]
    folder = built_once(f"rows/{key}", lambda out: _write(listed, argument, out))
    names = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    found = {name: Dataset.from_file(str(folder / f"{i}.arrow")) for i, name in enumerate(names)}
    return DatasetDict(found)


def _write(files: Mapping[str, Sequence[str]], argument: str, out: Path) -> None:
    """Write rows as Arrow files, one a split: a first pass finds the types."""
    kind, splits = pa.struct([]), dict[str, None]()
    for batch in _batches(_read_all(files, argument)):
        splits |= dict.fromkeys(split for split, _ in batch)
        kind = merged(kind, type_of_rows([row for _, row in batch]))
    features = Features.from_arrow_schema(pa.schema(kind))
    writers = {}
    try:
        for number, split in enumerate(splits):
            sink = pa.OSFile(str(out / f"{number}.arrow"), "wb")
            writers[split] = ArrowWriter(stream=sink, features=features)
        for batch in _batches(_read_all(files, argument)):
            for split, writer in writers.items():
                rows = [row for own, row in batch if own == split]
                if holds_json(kind):
                    for row in rows:
                        writer.write(features.encode_example(fitted(row, kind)))
                elif rows:
                    writer.write_table(table_of(rows, kind))
        for writer in writers.values():
            writer.finalize()
    finally:
        for writer in writers.values():
            writer.stream.close()
    write_whole(out / "splits.json", json.dumps(list(splits)))


def _streamed(files: Mapping[str, Sequence[str]], argument: str) -> IterableDatasetDict:
    first = next(_batches(_read_all(files, argument)))
    kind = merged(pa.struct([]), type_of_rows([row for _, row in first]))
    features = Features.from_arrow_schema(pa.schema(kind))
    found = {}
    for split in dict.fromkeys([*(split for split, _ in first), *files]):
        given = {"files": files, "argument": argument, "wanted": split, "kind": kind}
        found[split] = IterableDataset.from_generator(_stream, features=features, gen_kwargs=given)
    return IterableDatasetDict(found)


def _stream(
    files: Mapping[str, Sequence[str]], argument: str, wanted: str, kind: pa.DataType
) -> Iterator[Row]:
    for split, row in _read_all(files, argument):
        if split == wanted:
            yield fitted(row, kind)


def _read_all(files: Mapping[str, Sequence[str]], argument: str) -> Iterator[tuple[str, Row]]:
    for split, paths in files.items():
        for path in paths:
            for own, row in _read(Path(path), f"`{argument}`: {path}"):
                yield own or split, row


def _read(path: Path, where: str) -> Iterator[Placed]:
    """The rows of a file; `where` begins each error."""
    count = 0
    try:
        with _opened(path) as lines:
            for placed in READERS[format_of(path) or ""](lines, path, where):
                count += 1
                yield placed
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text ({error.reason}). Save it as UTF-8."
        ) from error
    except (OSError, EOFError) as error:  # of compressed files too
        raise ValueError(f"{where} cannot be read: {error}.") from error
    if not count:
        raise ValueError(f"{where} holds no rows.")


def _opened(path: Path) -> io.TextIOWrapper:
    stream: Any = path.open("rb")  # by Python: under some locales Arrow does not find the name
    if compression := COMPRESSED.get(path.suffix.lower()):
        stream = pa.CompressedInputStream(stream, compression)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _read_json(lines: io.TextIOWrapper, path: Path, where: str) -> Iterator[Placed]:
    """JSON lines, or one value: a list of rows, or an object that holds them."""
    number, first = next(((n, x) for n, x in enumerate(lines, 1) if x.strip()), (0, ""))
    if not number:
        return
    by_line = not first.lstrip().startswith("[")
    if by_line and format_of(path) == ".json":
        by_line = _is_json(first)
    if not by_line:
        value = _parsed(first + lines.read(), where, number)
        yield from _rows_of(value, f"{where}, line {number}", whole=True)
        return
    yield from _rows_of(_parsed(first, where, number), f"{where}, line {number}")
    for n, line in enumerate(lines, number + 1):
        if line.strip():
            yield from _rows_of(_parsed(line, where, n), f"{where}, line {n}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _parsed(text: str, where: str, line: int) -> Any:
    """A value; `line` is where its text begins in the file."""
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}, line {line + error.lineno - 1} is no JSON: {error.msg} at column "
            f"{error.colno}. Mend the line."
        ) from error
    except RecursionError:
        raise ValueError(f"{where}, line {line}: brackets within too many brackets.") from None


def _rows_of(value: Any, where: str, whole: bool = False) -> Iterator[Placed]:
    """The rows that a value of JSON stands for."""
    if whole and isinstance(value, list):
        for number, entry in enumerate(value, 1):
            yield None, _row(entry, f"{where}: entry {number}")
        return
    held = _held(value) if isinstance(value, dict) else None
    if held is None:
        yield None, _row(value, where)
        return
    for split, rows in held.items():
        for row in rows:
            yield split, row


def _row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} is {json.dumps(value)[:40]}, no row. Write each row as an object, such as "
            '{"prompt": "...", "completion": "..."}.'
        )
    return value


def _held(value: Row) -> dict[str | None, list[Row]] | None:
    """The rows that an object holds under `data`, or by split; None where it is a row."""
    rows: dict[str | None, list[Row]] = {k: v for k, v in value.items() if _are_rows(v)}
    if rows and set(rows) == set(value) and set(rows) <= SPLITS:
        return rows
    if len(rows) == 1 and (name := next(iter(rows))) in HOLDERS:
        return {None: rows[name]}
    return None


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _read_csv(lines: io.TextIOWrapper, path: Path, where: str) -> Iterator[Placed]:
    """Cells as text; the header says whether commas, semicolons or tabs separate them."""
    csv.field_size_limit((1 << 31) - 1)  # the module's own limit is 128 kB
    skipped, first = next(((n, x) for n, x in enumerate(lines) if x.strip()), (0, ""))
    separator = max(",;\t", key=lambda one: _count_cells(first, one))
    table = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    header, line = list[str](), skipped + 1
    try:
        for cells in table:
            place = f"{where}, line {line}"
            if cells and not header:
                header = _named_columns(cells, place)
            elif cells:
                yield None, _row_of_cells(header, cells, place)
            line = skipped + table.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{where}, line {line} is no CSV: {error}. Mend its quotes.") from error


def _count_cells(header: str, separator: str) -> int:
    """Number of cells into which a separator cuts a header; 0 where its quotes do not match."""
    try:
        return len(next(csv.reader([header], delimiter=separator, strict=True), []))
    except csv.Error:
        return 0


def _named_columns(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() or f"unnamed_{n}" for n, cell in enumerate(cells, 1)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where}: the header names {twice[0]!r} twice. Rename one.")
    return names


def _row_of_cells(header: list[str], cells: list[str], where: str) -> Row:
    if len(cells) != len(header):
        raise ValueError(
            f"{where}: {len(cells)} cells below a header of {len(header)}. Leave a missing cell "
            "empty, and put one with separators or line ends into quotes."
        )
    row: Row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    for name in set(NUMBERS) & set(header):
        try:
            row[name] = None if row[name] is None else float(row[name])
        except ValueError:
            raise ValueError(f"{where}: `{name}` must be a number, got {row[name]!r}.") from None
    return row


def _read_text(lines: io.TextIOWrapper, path: Path, where: str) -> Iterator[Placed]:
    """A row a line, blank ones left out."""
    for line in lines:
        if line.strip():
            yield None, {"text": line.rstrip("\r\n")}


READERS: dict[str, Callable[[io.TextIOWrapper, Path, str], Iterator[Placed]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}


def _batches(rows: Iterable[tuple[str, Row]]) -> Iterator[list[tuple[str, Row]]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        yield batch
