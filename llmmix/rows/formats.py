"""The rows that trainers take: read in any known shape, and dropped and counted where one is empty.

`llmmix.rows.shapes` has the shapes. What is left has TRL's columns.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    List,
    Value,
)

from llmmix.processes import warn_once
from llmmix.rows.messages import UnreadableCell, is_messages
from llmmix.rows.shapes import Row, Shape, preference_shapes, sft_shapes, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SFT_FORMATS = (
    "prompt-completion rows (`prompt`, `completion`: text or lists of messages), chat rows "
    "(`messages`, or `conversations`), text rows (`{text_field}`), questions (`question`, "
    "`answer`), instructions (`instruction`, `output`, and perhaps `input`), or tokenized rows "
    "(`input_ids`)"
)
PREFERENCE_FORMATS = (
    "`chosen` and `rejected` (text or lists of messages), with or without a `prompt` of their "
    "kind, `conversations`, a `question` or an `instruction`"
)
# Columns that TRL looks for; two formats in one row would be mixed up
READ_BY_TRL = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")


def check_sft_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    text_field: str = "text",
    processing_class: "PreTrainedTokenizerBase | None" = None,
) -> Dataset | IterableDataset:
    """Rows in the columns that `SFTTrainer` takes; those with an empty one are dropped and counted.

    Tokenized rows and rows with images are left as they are. The rows of a stream are read as they
    pass.

    Args:
        dataset: The rows.
        argument: The name under which they were given, for errors.
        text_field: The column of text rows.
        processing_class: The tokenizer, where it is known: chat rows need its chat template, and
            questions are put into it.

    Returns:
        The rows that are left.

    Raises:
        TypeError: `dataset` is no dataset, or several.
        ValueError: There is no dataset or no row in it, its columns are of no accepted format, its
            rows are chats and the tokenizer has no chat template, or every row is empty.
    """
    formats = SFT_FORMATS.format(text_field=text_field)
    dataset, columns = _columns_of(dataset, argument, formats)
    if {"input_ids", "image", "images"} & columns or _is_transformed(dataset):
        return dataset
    steps = "`steps` are split by llmmix.steps.split_steps (`--stepwise true` of dco). "
    hint = steps if "steps" in columns else ""
    shape = known_shape(columns, sft_shapes(text_field), argument, formats, hint)
    return read_shape(dataset, argument, shape, processing_class, (*READ_BY_TRL, text_field))


def check_preference_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    processing_class: "PreTrainedTokenizerBase | None" = None,
) -> Dataset | IterableDataset:
    """Rows in the columns that `DPOTrainer` takes; those with an empty one are dropped and counted.

    Arguments, result and errors are those of `check_sft_dataset`.
    """
    dataset, columns = _columns_of(dataset, argument, PREFERENCE_FORMATS)
    if {"image", "images"} & columns or _is_transformed(dataset):
        return dataset
    shape = known_shape(columns, preference_shapes(), argument, PREFERENCE_FORMATS)
    return read_shape(dataset, argument, shape, processing_class, READ_BY_TRL)


def known_shape(
    columns: Collection[str], shapes: Iterable[Shape], argument: str, formats: str, hint: str = ""
) -> Shape:
    """The first shape whose columns are all there.

    Args:
        columns: The columns of rows.
        shapes: The shapes that are accepted.
        argument: The name under which the rows were given, for errors.
        formats: The columns that are accepted, in words.
        hint: What else an error says.

    Raises:
        ValueError: The columns are of none of the shapes.
    """
    shape = shape_of(columns, shapes)
    if shape is None:
        raise ValueError(
            f"`{argument}` has the columns {sorted(columns)}; accepted are {formats}. {hint}Rename "
            "the columns to one of these."
        )
    return shape


def check_rows_type(dataset: Any, argument: str) -> None:
    """Refuse what is no dataset, with the way to make one of it.

    Raises:
        TypeError: It is text, several splits, a list or another type.
    """
    if isinstance(dataset, Dataset | IterableDataset):
        return
    ways = "Make one: `datasets.Dataset.from_list` takes a list of rows."
    if isinstance(dataset, str):
        ways = (
            f"Load {dataset!r} first, such as `llmmix.data.load_splits({dataset!r})['train']` or "
            "`datasets.load_dataset`."
        )
    elif isinstance(dataset, DatasetDict | IterableDatasetDict | dict):
        splits = list(dataset)
        name = "train" if "train" in splits or not splits else splits[0]
        ways = f"It holds {splits}: give one of them, such as `dataset[{name!r}]`."
    elif type(dataset).__name__ == "DataFrame":
        ways = "Make one: `datasets.Dataset.from_pandas` takes it."
    raise TypeError(
        f"`{argument}` must be a `Dataset` or `IterableDataset`, got "
        f"{type(dataset).__name__}. {ways}"
    )


def _columns_of(
    dataset: Dataset | IterableDataset | None, argument: str, formats: str
) -> tuple[Dataset | IterableDataset, set[str]]:
    """The rows, and the columns that they have."""
    if dataset is None:
        raise ValueError(f"`{argument}` is required: a dataset of {formats}.")
    check_rows_type(dataset, argument)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{argument}` is empty; give at least one row of {formats}.")
    return dataset, set(first)


def _is_transformed(dataset: Dataset | IterableDataset) -> bool:
    """Whether a function of the user makes the rows as they are read, which TRL has rules for."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def read_shape(
    dataset: Dataset | IterableDataset,
    argument: str,
    shape: Shape,
    tokenizer: "PreTrainedTokenizerBase | None",
    foreign: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """Rows of a shape in TRL's columns; the others that they have are kept.

    Args:
        dataset: The rows, at least one.
        argument: The name under which they were given, for the log.
        shape: Their shape.
        tokenizer: Whose chat template is asked for; None where it will have one that is not known.
        foreign: Columns that TRL would read too; those that the shape does not make are removed.

    Raises:
        ValueError: No row is left, or rows are chats and the tokenizer has no chat template.
    """
    has_template = tokenizer is None or tokenizer.chat_template is not None
    read = partial(_read, shape=shape, has_template=has_template)
    if shape.told:
        there = dataset.column_names or shape.needs
        columns = ", ".join(f"`{c}`" for c in (*shape.needs, *shape.takes) if c in there)
        warn_once(f"`{argument}`: {columns} read as {shape.told}.")
    if isinstance(dataset, Dataset):
        return _read_all(dataset, argument, read, shape, has_template, foreign)
    return _read_stream(dataset, argument, read, shape, has_template, foreign)


def _read(row: Row, shape: Shape, has_template: bool) -> Row:
    columns = (*shape.needs, *shape.takes)
    return shape.read({c: row[c] for c in columns if c in row}, has_template)


def _read_all(
    dataset: Dataset,
    argument: str,
    read: Callable[[Row], Row],
    shape: Shape,
    has_template: bool,
    foreign: Sequence[str],
) -> Dataset:
    rows = dataset.with_format(None)
    columns = [c for c in (*shape.needs, *shape.takes) if c in dataset.column_names]
    kept: list[int] = []
    faults: dict[str, list[int]] = {}
    made: Row = {}
    as_they_are = True
    for number, row in enumerate(rows.select_columns(columns)):
        try:
            made = read(row)
        except UnreadableCell as fault:
            faults.setdefault(str(fault), []).append(number)
            continue
        kept.append(number)
        as_they_are &= all(name in row and row[name] == value for name, value in made.items())
    _tell_dropped(faults, len(rows), argument)
    _check_template(made, argument, has_template)
    unread = [c for c in foreign if c in dataset.column_names and c not in made]
    if not as_they_are:
        # Under another name: a column that keeps its name keeps its type, and 4 would not be "4"
        names = {c: GIVEN + c for c in columns if c in made}
        read = partial(_read_renamed, read=read)
        features = _features(rows, columns, made)
        rows = rows.select(kept).rename_columns(names)
        rows = rows.map(
            read, remove_columns=[*names.values()], features=features, desc=f"Reading {argument}"
        )
        return rows.remove_columns(unread)
    dataset = dataset.remove_columns(unread) if unread else dataset
    # Not the selected copy where all are kept: its indices would slow every later read
    return dataset.select(kept) if faults else dataset


def _features(rows: Dataset, columns: Sequence[str], made: Row) -> Features | None:
    """The types of what is read from messages of changing keys, which the first rows do not tell.

    None where the messages that are given have one set of keys.
    """
    given = [rows.features[column] for column in columns]
    if not any("Json(" in str(feature) or _has_more_keys(feature) for feature in given):
        return None
    types = {c: List(Json()) if is_messages(v) else Value("string") for c, v in made.items()}
    return Features({**rows.features, **types})


def _has_more_keys(feature: Any) -> bool:
    """Whether messages have keys that some of them lack: as Json these are absent, not null."""
    message = feature.feature if isinstance(feature, List) else None
    return isinstance(message, dict) and not {"role", "content", "from", "value"} >= set(message)


GIVEN = "given "


def _read_renamed(row: Row, read: Callable[[Row], Row]) -> Row:
    return read({name.removeprefix(GIVEN): cell for name, cell in row.items()})


def _read_stream(
    dataset: IterableDataset,
    argument: str,
    read: Callable[[Row], Row],
    shape: Shape,
    has_template: bool,
    foreign: Sequence[str],
) -> IterableDataset:
    rows = dataset.filter(_Readable(read, argument), with_indices=True)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"`{argument}`: no row of the stream can be used.")
    made = read(first)
    _check_template(made, argument, has_template)
    unread = [c for c in foreign if c in first and c not in made]
    if any(is_messages(value) or value != first.get(name) for name, value in made.items()):
        rows = rows.map(read)
    return rows.remove_columns(unread) if unread else rows


class _Readable:
    """Whether a row of a stream can be read; the first that cannot is told."""

    def __init__(self, read: Callable[[Row], Row], argument: str):
        self.read, self.argument, self.told = read, argument, False

    def __call__(self, row: Row, number: int) -> bool:
        try:
            self.read(row)
        except UnreadableCell as fault:
            if not self.told:
                warn_once(
                    f"Dropped row {number} of `{self.argument}`: {fault}. Others like it are "
                    "dropped as the stream passes, without a word."
                )
            self.told = True
            return False
        return True


def _tell_dropped(faults: dict[str, list[int]], total: int, argument: str) -> None:
    """Log the rows that are dropped and why.

    Raises:
        ValueError: No row is left.
    """
    if not faults:
        return
    why = "; ".join(
        f"{fault} in {len(numbers)} (first: row {numbers[0]})" for fault, numbers in faults.items()
    )
    dropped = sum(map(len, faults.values()))
    if dropped == total:
        raise ValueError(f"`{argument}`: none of its {total} rows can be used: {why}.")
    warn_once(f"Dropped {dropped} of {total} rows of `{argument}`: {why}.")


def _check_template(row: Row, argument: str, has_template: bool) -> None:
    if not has_template and any(isinstance(value, list) for value in row.values()):
        raise ValueError(
            f"`{argument}` holds chat messages, but the tokenizer has no chat template. Set "
            "`chat_template_path` to one, or use text rows."
        )
