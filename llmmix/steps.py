"""Solutions in steps: each step becomes an example of its own, its context all that comes before.

DCO on whole proofs of k steps needs N of about N_eff^k. Applied to each step with a small
`n_samples` (N_eff, 4 to 32), it brakes the sure steps and pulls at the unsure ones:

    sum over steps of loss_N(p_step),    p_step = p(step | prompt, steps before)

The tokens are those of the whole solution, tokenized once, so that the product of the p_step is the
probability of the whole.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmmix.rows.formats import check_rows_type, check_sft_dataset, read_shape
from llmmix.rows.message_checks import CHATS, has_message_weights
from llmmix.rows.messages import ASKING, check_asked, in_one_form, text_of
from llmmix.rows.shapes import Cells, Shape
from llmmix.rows.weights import (
    ROW,
    as_weight,
    row_weights,
    speaker,
    weighted_columns,
    weighted_messages,
)

logger = logging.getLogger(__name__)


def split_steps(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    separator: str = "\n",
    max_length: int | None = None,
) -> Dataset:
    """One example a step, from rows with `prompt` and `steps`, or chats with several answers.

    Args:
        dataset: Rows of `prompt` (text or messages) and `steps` (a list of texts), or of `messages`
            whose every assistant turn is a step.
        tokenizer: A fast tokenizer, with a chat template where messages are given.
        separator: Written between the steps of `steps`, and scored with the step it ends.
        max_length: Steps of `steps` that end beyond so many tokens are dropped and counted: a part
            of a step has another probability.

    Returns:
        From `steps`, rows of `input_ids` and `labels`; the end-of-sequence token, or the end of the
        assistant's turn, belongs to the last step. From `messages`, rows of `prompt` and
        `completion`, both messages. A `weight` of the row goes to each of its steps, times that of
        the step's message.

    Raises:
        ValueError: The rows have neither `prompt` and `steps` nor `messages`; no row holds a step;
            or the tokenizer does not tell where in the text its tokens stand; or a `weight` is
            refused.
    """
    check_rows_type(dataset, "dataset")
    if not isinstance(dataset, Dataset):
        raise ValueError("`dataset` must be a map-style `Dataset`, whose steps are counted.")
    _check_weights(dataset)  # before rows are read, so that an error names one as it was given
    dataset = _in_one_form(dataset)
    split, names = _splitter(dataset, tokenizer, separator)
    found = dataset.map(
        _split_rows,
        batched=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"split": split, "names": names},
        desc="Splitting steps",
    )
    if not len(found):
        raise ValueError(f"None of the {len(dataset)} rows holds a step that is not empty.")
    if blank := sum(not _steps_of(row) for row in dataset):
        logger.warning("Dropped %d of %d rows without a step.", blank, len(dataset))
    if max_length is not None and "input_ids" in names:
        whole = found.filter(lambda ids: len(ids) <= max_length, input_columns="input_ids")
        if dropped := len(found) - len(whole):
            logger.warning(
                "Dropped %d of %d steps that end beyond max_length=%d.",
                *(dropped, len(found), max_length),
            )
            found = whole
    logger.info("Split %d rows into %d steps.", len(dataset), len(found))
    return found


def _check_weights(dataset: Dataset) -> None:
    """Refuse weights of rows and messages that cannot be, and those of messages that are no step.

    Raises:
        ValueError: One of them is refused.
    """
    if ROW in dataset.column_names:
        row_weights(dataset, "dataset")
    columns = weighted_columns(dataset, CHATS)
    if not columns:
        return
    for number, row in enumerate(dataset.with_format(None).select_columns(columns)):
        for column, place, message in weighted_messages(row, columns):
            what = f"`dataset`, row {number}: `{ROW}` of message {place} of `{column}`"
            as_weight(message[ROW], what)
            if (role := speaker(message)) in ASKING:
                raise ValueError(
                    f"{what}, which {role!r} says, weighs what is no step and not scored. Take it "
                    "away."
                )


def _in_one_form(dataset: Dataset) -> Dataset:
    """The dataset with its cells read as any trainer reads them; other columns as they are."""
    columns = set(dataset.column_names)
    if "steps" not in columns and columns & {"messages", "conversations"}:
        rest = dataset.remove_columns([c for c in ("prompt", "completion") if c in columns])
        return cast(Dataset, check_sft_dataset(rest, "dataset"))
    if not len(dataset) or not set(STEPWISE.needs) <= columns:
        return dataset
    return cast(Dataset, read_shape(dataset, "dataset", STEPWISE, None))


def _read_steps(row: dict, has_template: bool) -> dict:
    prompt = Cells(row).get("prompt", in_one_form, check_asked)
    return {"prompt": prompt, "steps": [text_of(step) for step in row["steps"] or ()]}


STEPWISE = Shape(("prompt", "steps"), _read_steps)


def _splitter(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, separator: str
) -> tuple[Callable[[dict], list[dict]], list[str]]:
    """A function that splits a row into examples, and the columns of an example."""
    columns = dataset.column_names
    kept = [column for column in columns if column in ("tools", "chat_template_kwargs")]
    weight = [ROW] if ROW in columns or has_message_weights(dataset) else []
    if {"prompt", "steps"} <= set(columns):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell where in the text its tokens stand, "
                "which `steps` needs: use a fast tokenizer, or give the steps as assistant turns."
            )
        if kept and len(dataset) and not isinstance(dataset[0]["prompt"], str):
            raise ValueError(f"`steps` cannot be told apart with {kept}; give assistant turns.")
        split = partial(_split_text, tokenizer=tokenizer, separator=separator)
        return split, ["input_ids", "labels", *weight]
    if "messages" in columns:
        return partial(_split_messages, kept=kept), ["prompt", "completion", *kept, *weight]
    raise ValueError(
        f"Stepwise rows need `prompt` and `steps`, or `messages`; the dataset has {columns}."
    )


def _split_rows(
    batch: dict[str, list], split: Callable[[dict], list[dict]], names: list[str]
) -> dict[str, list]:
    examples: list[dict] = []
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        if _steps_of(row):
            examples += split(row)
    return {name: [example[name] for example in examples] for name in names}


def _steps_of(row: dict) -> list[str]:
    """The steps of a row that are not blank."""
    if "steps" in row:
        return [step for step in row["steps"] if step.strip()]
    return [message["content"] for message in row["messages"] if _is_step(message)]


def _is_step(message: dict) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _split_messages(row: dict, kept: list[str]) -> list[dict]:
    """The weight of a message becomes one of its step's row."""
    messages = [{k: v for k, v in said.items() if k != ROW} for said in row["messages"]]
    of_row = as_weight(row.get(ROW), f"`{ROW}` of a row")
    weights = [
        of_row * as_weight(message.get(ROW), f"`{ROW}` of a message") for message in row["messages"]
    ]
    return [
        {"prompt": messages[:i], "completion": [message], ROW: weights[i]}
        | {name: row[name] for name in kept}
        for i, message in enumerate(messages)
        if _is_step(message) and i
    ]


def _split_text(row: dict, tokenizer: PreTrainedTokenizerBase, separator: str) -> list[dict]:
    steps = _steps_of(row)
    parts = [step + separator for step in steps[:-1]] + steps[-1:]
    prompt, solution = row["prompt"], "".join(parts)
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        text = prompt + solution + ("" if end and solution.endswith(end) else end)
        start, special = len(prompt), True
    else:
        # Templates may trim the content, so it has no outer space to begin with
        parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
        solution = "".join(parts)
        answer = [{"role": "assistant", "content": solution}]
        text = str(tokenizer.apply_chat_template(prompt + answer, tokenize=False))
        opened = str(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        )
        start = text.find(solution, len(os.path.commonprefix([text, opened])))
        if start < 0:
            raise ValueError(
                "The chat template rewrites the assistant's text, so its steps cannot be told "
                f"apart: {solution[:80]!r}. Give the steps as assistant turns, or another template."
            )
        special = False  # the template writes its own special tokens
    tokens = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
    ends = [start]
    for part in parts:
        ends.append(ends[-1] + len(part))
    ends[-1] = len(text)
    examples = []
    for begin, end in zip(ends, ends[1:], strict=False):
        # A token that spans two steps belongs to the one in which it ends
        mine = [begin < stop <= end for _, stop in offsets]
        if not any(mine):
            continue
        last = max(i for i, inside in enumerate(mine) if inside)
        labels = [
            token if inside else -100 for token, inside in zip(ids, mine[: last + 1], strict=False)
        ]
        examples.append({"input_ids": ids[: last + 1], "labels": labels, ROW: row.get(ROW)})
    return examples
