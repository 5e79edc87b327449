"""Datasets: loaded by name, and their rows put in batches.

A dataset is a hub id, a folder, a `.json`, `.jsonl`, `.csv` or `.parquet` file, `builtin:math`,
`builtin:preferences`, `builtin:authors` or `builtin:domains`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from llmmix import builtin

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ScriptArguments

if "HF_UPDATE_DOWNLOAD_COUNTS" not in os.environ:
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it tells the Hub of local files too

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_splits(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    *,
    argument: str = "dataset_name",
) -> DatasetDict:
    """All splits of a dataset.

    Args:
        name: Hub id, folder, file or built-in.
        config: Configuration of a hub dataset, or of a built-in (see `llmmix.builtin.dataset`).
        streaming: Load an `IterableDataset` where the source allows it.
        argument: Name of `name` in error messages.

    Raises:
        FileNotFoundError: The file, or the text of `builtin:domains`, is not on this machine.
        ValueError: The file is of another format, or there is no such built-in.
    """
    if name.startswith("builtin:"):
        return builtin.dataset(name, config, argument=argument)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(path)
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return datasets.load_dataset(str(path), name=config, streaming=streaming)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(
                f"`{argument}`: {name} is not one of {', '.join(FILE_FORMATS)}; convert it first."
            )
        return datasets.load_dataset(
            FILE_FORMATS[path.suffix], data_files=str(path), streaming=streaming
        )
    if path.suffix in FILE_FORMATS or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"`{argument}`: no file or folder {name}.")
    return datasets.load_dataset(name, name=config, streaming=streaming)


def load_train_and_eval(
    script_args: "ScriptArguments", training_args: "TrainingArguments"
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training split, and the test split when `eval_strategy` asks for one.

    Raises:
        ValueError: No dataset was named, or it has no such split.
    """
    name = _named(script_args.dataset_name)
    splits = load_splits(name, script_args.dataset_config, script_args.dataset_streaming)
    train = _split(splits, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train, None
    return train, _split(splits, script_args.dataset_test_split, "dataset_test_split")


def _named(dataset_name: str | None) -> str:
    if dataset_name is None:
        raise ValueError(
            "`dataset_name` is missing: give a hub id, a folder, a file or a built-in such as "
            "builtin:math."
        )
    return dataset_name


def load_role(
    name: str | None,
    role: str,
    *,
    split: str = "train",
    config: str | None = None,
    arguments: tuple[str, str] = ("dataset_name", "dataset_train_split"),
) -> Dataset | IterableDataset:
    """The rows that play a role, such as "forget" or "retain".

    Args:
        name: Hub id, folder, file or built-in; or NAME@CONFIG, whose configuration then counts.
        role: The role. If `split` is "train" and the dataset has a split of the role's name, that
            one is taken.
        split: The split. If it is "train" and the dataset has a single split, that one is taken.
        config: Configuration of a hub dataset or of a built-in.
        arguments: Names of `name` and of `split` in error messages.

    Raises:
        ValueError: No dataset was named, or it has no such split.
    """
    name = _named(name)
    if "@" in name and not Path(name).exists():
        name, _, config = name.partition("@")
    splits = load_splits(name, config, argument=arguments[0])
    if split == "train" and role in splits:
        split = role
    elif split == "train" and len(splits) == 1:
        split = next(iter(splits))
    return _split(splits, split, arguments[1])


def _split(splits: DatasetDict, name: str, argument: str) -> Dataset | IterableDataset:
    if name not in splits:
        raise ValueError(f"`{argument}`: no split {name!r}; the dataset has {list(splits)}.")
    return splits[name]


def batches_of_tokens(
    lengths: Sequence[int],
    token_budget: int,
    *,
    scored: Sequence[int] | None = None,
    scored_budget: int = sys.maxsize,
) -> list[list[int]]:
    """Rows in batches of at most `token_budget` tokens, padding included, the longest rows first.

    A row that exceeds a budget by itself is a batch of its own.

    Args:
        lengths: Tokens of each row.
        token_budget: Limit of the rows of a batch times the tokens of its longest row.
        scored: Tokens of each row whose logits are wanted.
        scored_budget: Limit of the tokens of a batch whose logits are wanted.

    Returns:
        The rows of each batch, by their places in `lengths`.
    """
    batches: list[list[int]] = []
    longest = wanted = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        own = 0 if scored is None else scored[row]
        fits = batches and longest * (len(batches[-1]) + 1) <= token_budget
        if fits and wanted + own <= scored_budget:
            batches[-1].append(row)
            wanted += own
        else:
            batches.append([row])
            longest, wanted = lengths[row], own
    return batches
