"""Loading models and datasets by name, and checking rows before a trainer sees them.

A model is a hub id, a folder, a `.gguf` file or `builtin:tiny`. A dataset is a hub id, a folder, a
`.json`, `.jsonl`, `.csv` or `.parquet` file, `builtin:math`, `builtin:preferences`,
`builtin:authors` or `builtin:domains`.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset

from llmmix import builtin

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ScriptArguments

logger = logging.getLogger(__name__)

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """All splits of a dataset.

    Args:
        name: Hub id, folder, file or built-in.
        config: Configuration of a hub dataset, or of a built-in: `llmmix.builtin.dataset`.
        streaming: Load an `IterableDataset` where the source allows it.

    Raises:
        FileNotFoundError: A file that is not there, or the text of `builtin:domains`.
        ValueError: A file of another format, or an unknown built-in.
    """
    if name.startswith("builtin:"):
        return builtin.dataset(name, config)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(path)
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return datasets.load_dataset(str(path), name=config, streaming=streaming)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(
                f"`dataset_name`: {name} is not one of {', '.join(FILE_FORMATS)}; convert it first."
            )
        return datasets.load_dataset(
            FILE_FORMATS[path.suffix], data_files=str(path), streaming=streaming
        )
    if path.suffix in FILE_FORMATS or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"`dataset_name`: no file or folder {name}.")
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
    name: str | None, role: str, *, split: str = "train", config: str | None = None
) -> Dataset | IterableDataset:
    """The rows that play a role, such as "forget" or "retain".

    Args:
        name: As for `load_splits`, or NAME@CONFIG, whose configuration then counts.
        role: Also the name of the split to take, where there is one and `split` names no other.
        split: The split; of a dataset that has a single one, "train" stands for it.
        config: As for `load_splits`.

    Raises:
        ValueError: No dataset was named, or it has no such split.
    """
    name = _named(name)
    if "@" in name and not Path(name).exists():
        name, _, config = name.partition("@")
    splits = load_splits(name, config)
    if split == "train" and role in splits:
        split = role
    elif split == "train" and len(splits) == 1:
        split = next(iter(splits))
    return _split(splits, split, f"{role}: dataset_split")


def _split(splits: DatasetDict, name: str, argument: str):
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
    """Rows in batches of at most so many tokens, padding included, the longest rows first.

    A row that exceeds a budget by itself is a batch of its own.

    Args:
        lengths: Tokens of each row.
        token_budget: Rows of a batch times its longest row.
        scored: Tokens of each row whose logits are wanted.
        scored_budget: Their sum in a batch.

    Returns:
        The rows' places in `lengths`, a list a batch.
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


def warn_once(message: str) -> None:
    """Log a warning once, not on every rank."""
    if PartialState().is_main_process:
        logger.warning(message)
