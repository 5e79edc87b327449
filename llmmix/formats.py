"""The rows that trainers take: their columns are checked, and empty ones dropped and counted."""

from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset

from llmmix.processes import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SFT_FORMATS = (
    "prompt-completion rows (`prompt`, `completion`: text or lists of messages), chat rows "
    "(`messages`), text rows (`{text_field}`), or tokenized rows (`input_ids`)"
)
PREFERENCE_FORMATS = (
    "`chosen` and `rejected` (text or lists of messages), with or without a `prompt` of their kind"
)


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
