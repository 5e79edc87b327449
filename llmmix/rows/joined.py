"""Several datasets as one, as TRL's `datasets` lists them, with local names read as they stand."""

import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction
from trl.scripts.utils import DatasetConfig

from llmmix.rows.sources import (
    check_not_local,
    kind_of,
    load_files,
    load_from_hub,
    load_splits,
    local_files,
    pick_split,
    split_name,
)

# Formats that `path` may name, and the endings of files that are read here
SUFFIXES = {
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "text": (".txt",),
    "parquet": (".parquet",),
}


def load_joined(entries: list[DatasetConfig], streaming: bool) -> Dataset | IterableDataset:
    """The rows of all entries, one after the other; the first rows of each, by `fraction`.

    Raises:
        FileNotFoundError: An entry names no file, folder or dataset of the hub.
        ValueError: An entry lacks its split or a column, its rows have other types than those of
            another entry, or `fraction` is given for some entries alone or for a stream.
    """
    parts = [_load_entry(entry, f"datasets[{n}]", streaming) for n, entry in enumerate(entries)]
    fractions = [entry.fraction for entry in entries]
    if any(fraction is not None for fraction in fractions):
        parts = _by_fraction(parts, fractions)
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        told = "; ".join(f"[{n}] {dict(part.features or {})}" for n, part in enumerate(parts))
        raise ValueError(
            f"`datasets`: the entries have columns of different types: {told}. Pick those that "
            "they share by `columns`."
        ) from error


def _load_entry(entry: DatasetConfig, argument: str, streaming: bool) -> Any:
    splits = _splits_of(entry, argument, streaming)
    rows = _cut(splits, entry.split, argument) if isinstance(splits, dict) else splits
    if entry.columns is None:
        return rows
    there = rows.column_names or []
    if missing := [column for column in entry.columns if column not in there]:
        raise ValueError(f"`{argument}`: no column {missing[0]!r} among {there}.")
    return rows.select_columns(entry.columns)


def _splits_of(entry: DatasetConfig, argument: str, streaming: bool) -> Any:
    """All splits of rows on this machine; of a dataset on the hub, the one that is asked for."""
    path, config = split_name(entry.path)
    config = config or entry.name
    is_here = bool(local_files(path)) or os.path.isdir(os.path.expanduser(path))
    inside = entry.data_files or entry.data_dir
    if path.startswith("builtin:") or (is_here and not inside):
        return load_splits(path, config, streaming, argument=argument)
    by_format = path in SUFFIXES and bool(inside or not is_here)
    if by_format and not inside:
        raise ValueError(f"`{argument}`: {path} is a format; name its files by `data_files`.")
    if by_format or is_here:
        folder = Path("" if by_format else path, entry.data_dir or "").expanduser()
        if not entry.data_files:
            return load_splits(str(folder), config, streaming, argument=argument)
        files = _found(entry.data_files, folder, argument)
        kinds = {kind_of(file) for found in files.values() for file in found}
        if kinds and not (by_format and kinds - set(SUFFIXES[path])):
            return load_files(files, argument, streaming)
    else:
        check_not_local(path, argument)
    return load_from_hub(
        argument,
        path=path,
        name=config,
        data_dir=entry.data_dir,
        data_files=entry.data_files,
        split=entry.split,
        streaming=streaming,
    )


def _found(data_files: Any, folder: Path, argument: str) -> dict[str, list[Path]]:
    """The files of each split; nothing if some are addresses, which are for `datasets` to read."""
    by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
    found: dict[str, list[Path]] = {}
    for split, names in by_split.items():
        for name in [names] if isinstance(names, str) else names:
            path = str(folder / os.path.expanduser(name))
            files = local_files(path)
            if not files and "://" in name:
                return {}
            if not files:
                raise FileNotFoundError(f"`{argument}`: no file {path} for `data_files`.")
            found.setdefault(split, []).extend(files)
    return found


def _cut(splits: DatasetDict, asked: str, argument: str) -> Any:
    """A split, or what `datasets` calls a slice of some: train[:10%], train+test."""
    if asked in splits or not all(isinstance(rows, Dataset) for rows in splits.values()):
        return pick_split(splits, asked, f"{argument}.split")
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = ReadInstruction.from_spec(asked).to_absolute(sizes)
    except (ValueError, AssertionError):
        return pick_split(splits, asked, f"{argument}.split")
    cuts = [splits[p.splitname].select(range(sizes[p.splitname])[p.from_ : p.to]) for p in parts]
    return datasets.concatenate_datasets(cuts)


def _by_fraction(parts: list[Any], fractions: list[float | None]) -> list[Dataset]:
    """The first rows of each part, as many as give the shares and repeat no row."""
    shares = [share for share in fractions if share is not None and share >= 0]
    if len(shares) < len(parts) or not sum(shares) > 0:
        raise ValueError(
            f"`datasets`: `fraction` must be given for every entry or for none, got {fractions}."
        )
    if not all(isinstance(part, Dataset) for part in parts):
        raise ValueError("`datasets`: `fraction` needs the number of rows, and a stream has none.")
    shares = [share / sum(shares) for share in shares]
    pairs = list(zip(parts, shares, strict=True))
    total = min(len(part) / share for part, share in pairs if share)
    return [part.take(round(share * total)) for part, share in pairs]
