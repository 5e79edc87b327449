"""Datasets: loaded by name, their rows checked before a trainer sees them, and put in batches.

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
from llmmix.processes import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments
    from trl import ScriptArguments

if "HF_UPDATE_DOWNLOAD_COUNTS" not in os.environ:
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it tells the Hub of local files too

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

SFT_FORMATS = (
    "prompt-completion rows (`prompt`, `completion`: text or lists of messages), chat rows "
    "(`messages`), text rows (`{text_field}`), or tokenized rows (`input_ids`)"
)
PREFERENCE_FORMATS = (
    "`chosen` and `rejected` (text or lists of messages), with or without a `prompt` of their kind"
)


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


def check_sft_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    text_field: str = "text",
    processing_class: "PreTrainedTokenizerBase | None" = None,
) -> Dataset | IterableDataset:
    """Refuse what `SFTTrainer` cannot train on, and drop rows with an empty completion.

    The number of rows dropped is logged. A streaming dataset is checked by its first row alone.

    Args:
        dataset: The rows.
        argument: The name under which they were given, for errors.
        text_field: The column of text rows.
        processing_class: The tokenizer, where it is known: chat rows need its chat template.

    Returns:
        The rows that are left.

    Raises:
        ValueError: There is no dataset or no row in it, its columns are of no accepted format, its
            rows are chats and the tokenizer has no chat template, or every row is empty.
    """
    formats = SFT_FORMATS.format(text_field=text_field)
    dataset, first = _first_row(dataset, argument, formats)
    columns = set(first)
    if "input_ids" in columns or {"image", "images"} & columns:
        return dataset
    if {"prompt", "completion"} <= columns:
        response = "completion"
    elif columns & {"messages", "conversations"}:
        response = "messages" if "messages" in columns else "conversations"
    elif text_field in columns:
        response = text_field
    else:
        steps = "`steps` are split by llmmix.steps.split_steps (`--stepwise true` of dco). "
        raise ValueError(
            f"`{argument}` has the columns {sorted(columns)}; accepted are {formats}. "
            f"{steps if 'steps' in columns else ''}Rename the columns to one of these."
        )
    _check_template(first[response], argument, processing_class)
    return _drop_blank(dataset, [response], argument)


def check_preference_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    processing_class: "PreTrainedTokenizerBase | None" = None,
) -> Dataset | IterableDataset:
    """Refuse what `DPOTrainer` cannot train on, and drop rows with an empty response.

    Arguments, result and errors are those of `check_sft_dataset`.
    """
    dataset, first = _first_row(dataset, argument, PREFERENCE_FORMATS)
    if not {"chosen", "rejected"} <= set(first):
        raise ValueError(
            f"`{argument}` has the columns {sorted(first)}; accepted are {PREFERENCE_FORMATS}. "
            "Rename the columns to these."
        )
    _check_template(first["chosen"], argument, processing_class)
    return _drop_blank(dataset, ["chosen", "rejected"], argument)


def _first_row(
    dataset: Dataset | IterableDataset | None, argument: str, formats: str
) -> tuple[Dataset | IterableDataset, dict]:
    if dataset is None:
        raise ValueError(f"`{argument}` is required: a dataset of {formats}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{argument}` is empty; give at least one row of {formats}.")
    return dataset, first


def _check_template(
    response: str | list[dict],
    argument: str,
    processing_class: "PreTrainedTokenizerBase | None",
) -> None:
    if processing_class is None or isinstance(response, str):
        return
    if processing_class.chat_template is None:
        raise ValueError(
            f"`{argument}` holds chat messages, but the tokenizer has no chat template. Set "
            "`chat_template_path` to one, or use text rows."
        )


def _drop_blank(
    dataset: Dataset | IterableDataset, columns: list[str], argument: str
) -> Dataset | IterableDataset:
    if not isinstance(dataset, Dataset):
        return dataset
    filled = dataset.filter(
        lambda *responses: not any(map(_is_blank, responses)),
        input_columns=columns,
        desc=f"Checking {argument}",
    )
    if dropped := len(dataset) - len(filled):
        what = " or ".join(f"`{column}`" for column in columns)
        if not len(filled):
            raise ValueError(f"`{argument}`: {what} is empty in every one of {len(dataset)} rows.")
        warn_once(f"Dropped {dropped} of {len(dataset)} rows with an empty {what}.")
        return filled
    return dataset  # not the filtered copy, whose indices would slow every later read


def _is_blank(response: str | list[dict] | None) -> bool:
    """Whether a response has no text, or no message of the assistant with any content."""
    if response is None or isinstance(response, str):
        return not (response or "").strip()
    asked = ("system", "developer", "user", "human", "tool")
    said = [m for m in response if m.get("role", m.get("from")) not in asked]
    return not any(
        m.get("tool_calls") or not _is_empty(m.get("content", m.get("value"))) for m in said
    )


def _is_empty(content: str | list | None) -> bool:
    return not content.strip() if isinstance(content, str) else not content


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
