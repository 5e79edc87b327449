"""The rows of a run: what its flags and YAML name, a hold-out, roles; and rows put in batches.

llmmix/rows/sources.py loads a dataset by its name.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from llmmix.rows.joined import load_joined
from llmmix.rows.prompts import Encoded
from llmmix.rows.sources import load_splits as load_splits
from llmmix.rows.sources import pick_split, say

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class DataArguments(ScriptArguments, DatasetMixtureConfig):
    """The flags by which TRL's scripts name their rows: `dataset_name`, or a list of `datasets`.

    `streaming` and `test_split_size` count with both. An entry of `datasets` may be a name alone.

    Raises:
        ValueError: `datasets` is no list, an entry has a key that TRL does not know, or no `path`;
            or `test_split_size` is neither a share between 0 and 1 nor a whole number of rows.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.datasets, list):
            raise ValueError(f"`datasets` must be a list of datasets, got {self.datasets!r}.")
        self.datasets = [_entry(entry, n) for n, entry in enumerate(self.datasets)]
        super().__post_init__()
        size = self.test_split_size
        if size is not None and not (0 < size < 1 or (size >= 1 and float(size).is_integer())):
            raise ValueError(
                "`test_split_size` must be a share between 0 and 1, or a whole number of rows, got "
                f"{size}."
            )


def _entry(given: Any, number: int) -> DatasetConfig:
    known = [field.name for field in fields(DatasetConfig)]
    if isinstance(given, str):
        return DatasetConfig(given)
    if isinstance(given, DatasetConfig):
        return given
    if not isinstance(given, dict) or not isinstance(given.get("path"), str):
        raise ValueError(
            f"`datasets[{number}]` must have a `path`, such as {{path: rows.jsonl}}, got {given!r}."
        )
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"`datasets[{number}]`: no {unknown[0]!r}; there are {', '.join(known)}.")
    return DatasetConfig(**given)


def load_train_and_eval(
    script_args: ScriptArguments,
    training_args: "TrainingArguments",
    *,
    role: str = "train",
    whole_for: str | None = None,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training split, and rows to evaluate on when `eval_strategy` asks for some.

    `test_split_size` holds rows of the training split out, the same ones on every process and in
    every run of one `data_seed` (or else `seed`). Without it they are `dataset_test_split`.

    Args:
        script_args: `DataArguments`, or TRL's `ScriptArguments`.
        training_args: The trainer's settings.
        role: See `load_role`.
        whole_for: What needs all rows at once, and so no stream, to be named in the error.

    Raises:
        ValueError: No dataset was named, it has no such split or too few rows to hold some out, or
            rows are streamed where all are needed.
    """
    given = _as_data_arguments(script_args)
    streaming = given.streaming or given.dataset_streaming
    if streaming:
        _check_stream(given, training_args, whole_for)
    evaluated = training_args.eval_strategy != "no"
    if given.datasets:
        if given.dataset_name:
            say("`dataset_name` is left out, since `datasets` is given.")
        train, splits = load_joined(given.datasets, streaming), DatasetDict()
    else:
        name = _named(given.dataset_name)
        splits = load_splits(name, given.dataset_config, streaming)
        train = _of_role(splits, role, given.dataset_train_split, "dataset_train_split")
    if given.test_split_size is not None:
        train, test = hold_out(train, given.test_split_size, training_args)
        return train, test if evaluated else None
    if not evaluated:
        return train, None
    if given.dataset_test_split not in splits:
        found = f"the dataset has {list(splits)}" if splits else "`datasets` names rows to train on"
        raise ValueError(
            f"`dataset_test_split`: no split {given.dataset_test_split!r} to evaluate on; {found}. "
            "Hold rows out with `test_split_size`, such as 0.1, or leave `eval_strategy` at no."
        )
    return train, splits[given.dataset_test_split]


def _as_data_arguments(script_args: ScriptArguments) -> DataArguments:
    return (
        script_args
        if isinstance(script_args, DataArguments)
        else DataArguments(**vars(script_args))
    )


def _check_stream(
    given: DataArguments, training_args: "TrainingArguments", whole_for: str | None
) -> None:
    name = "streaming" if given.streaming else "dataset_streaming"
    if whole_for:
        raise ValueError(f"`{name}`: {whole_for} needs all rows at once. Leave it off.")
    if given.test_split_size is not None:
        raise ValueError(
            f"`test_split_size` cannot hold rows of a stream out. Leave `{name}` off, or name a "
            "split by `dataset_test_split`."
        )
    if training_args.max_steps <= 0:
        raise ValueError(f"`{name}`: a stream has no length; say where to end by `max_steps`.")


def hold_out(
    rows: Dataset | IterableDataset, size: float, training_args: "TrainingArguments"
) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows to evaluate on, drawn by `data_seed`, or else by `seed`.

    Args:
        rows: The rows.
        size: Share of the rows to hold out, below 1, or their number.
        training_args: The trainer's settings.

    Raises:
        ValueError: The rows are a stream, or too few.
    """
    if not isinstance(rows, Dataset):
        raise ValueError("`test_split_size` cannot hold rows of a stream out.")
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    count = math.ceil(size * len(rows)) if size < 1 else int(size)
    if count >= len(rows):
        raise ValueError(
            f"`test_split_size={size:g}` holds out {count} of {len(rows)} rows and leaves none to "
            "train on. Hold fewer out."
        )
    parts = rows.train_test_split(test_size=count, seed=seed)
    say(f"`test_split_size`: held out {count} of {len(rows)} rows (seed {seed}).")
    return parts["train"], parts["test"]


def _named(dataset_name: str | None) -> str:
    if not dataset_name:
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
    splits = load_splits(_named(name), config, argument=arguments[0])
    return _of_role(splits, role, split, arguments[1])


def _of_role(splits: DatasetDict, role: str, split: str, argument: str) -> Any:
    if split == "train" and role in splits:
        return splits[role]
    return pick_split(splits, split, argument)


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


def pad(sequences: Sequence[Encoded], pad_id: int | None = None) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (-100 where not scored), padded on the right.

    Which tokens count is known from lengths, never from token ids: a pad token that is the
    end-of-sequence token too does no harm.

    Args:
        sequences: A sequence for each row.
        pad_id: Token id of the padding, which nothing reads; 0 by default.
    """
    from trl.trainer.utils import pad as pad_tensors  # takes a second

    ids = [torch.tensor(sequence.ids, dtype=torch.long) for sequence in sequences]
    labels = [
        torch.tensor([-100] * start + sequence[start:], dtype=torch.long)
        for sequence, start in sequences
    ]
    return {
        "input_ids": pad_tensors(ids, padding_value=pad_id or 0),
        "attention_mask": pad_tensors([torch.ones_like(sequence) for sequence in ids]),
        "labels": pad_tensors(labels, padding_value=-100),
    }
