"""Questions and answers as token sequences whose answer is scored, to train on or to evaluate.

A sequence is the prompt's tokens and the answer's, the end-of-sequence token among the latter.
Which tokens count is known from lengths, never from token ids: a pad token that is the
end-of-sequence token too does no harm.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad as pad_tensors

from llmmix.processes import warn_once
from llmmix.prompts import Encoded, Prompt

FORMATS = (
    "`question` and `answer`, `prompt` and `completion` (text or lists of messages), `prompt` and "
    "`gt`, or `text`"
)


def read_rows(
    dataset: Dataset | None, argument: str, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Rows with a `prompt` (text or messages) and an `answer` (text), from any of `FORMATS`.

    A `question` is asked as `question_prompt` does. A `text` has an empty prompt. Other columns are
    kept. Rows without an answer are dropped and counted.

    Args:
        dataset: The rows.
        argument: Name of the rows, for errors.
        tokenizer: The tokenizer whose chat template asks the question.

    Raises:
        ValueError: There are no rows, their columns are of no accepted format, or every answer is
            empty.
    """
    if not isinstance(dataset, Dataset) or not len(dataset):
        given = "no rows" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(f"`{argument}` must be a map-style `Dataset` of {FORMATS}, got {given}.")
    columns = set(dataset.column_names)
    known = (("question", "answer"), ("prompt", "completion"), ("prompt", "gt"), (None, "text"))
    for prompt, answer in known:
        if answer in columns and (prompt is None or prompt in columns):
            break
    else:
        raise ValueError(
            f"`{argument}` has the columns {sorted(columns)}; accepted are {FORMATS}. Rename the "
            "columns to these."
        )
    answers = [_text_of(given) for given in dataset[answer]]
    prompts: list[Prompt]
    if prompt is None:
        prompts = [""] * len(answers)
    elif prompt == "question":
        prompts = [question_prompt(tokenizer, question) for question in dataset[prompt]]
    else:
        prompts = list(dataset[prompt])
    asked = [True] * len(answers) if prompt is None else [_is_asked(p) for p in dataset[prompt]]
    kept = [row for row, given in enumerate(asked) if given and answers[row].strip()]
    what = f"`{answer}`" if prompt is None else f"`{prompt}` or `{answer}`"
    if not kept:
        raise ValueError(f"`{argument}`: {what} is empty in every one of {len(dataset)} rows.")
    if len(kept) < len(dataset):
        dropped = len(dataset) - len(kept)
        warn_once(f"Dropped {dropped} of {len(dataset)} rows of `{argument}`: empty {what}.")
    rest = dataset.remove_columns(list({"prompt", "answer"} & columns)).select(kept)
    rest = rest.add_column("prompt", [prompts[row] for row in kept])
    return rest.add_column("answer", [answers[row] for row in kept])


def _is_asked(prompt: Prompt | None) -> bool:
    return bool(prompt.strip() if isinstance(prompt, str) else prompt)


def _text_of(answer: Any) -> str:
    """Text itself, a number as text, or what the last message says."""
    if answer is None or isinstance(answer, str | int | float):
        return "" if answer is None else str(answer)
    return (answer[-1].get("content") or "") if answer else ""


def question_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> Prompt:
    """A question as it is put to a model: a user's message, or text without a chat template."""
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer:"
    return [{"role": "user", "content": question}]


def cut(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Text in pieces of at most `max_length` tokens, the first of each not scored."""
    if encoded.prompt_length > 1 or len(encoded.ids) <= max_length:
        return [encoded]
    starts = range(0, len(encoded.ids), max_length)
    pieces = [Encoded(encoded.ids[start : start + max_length], 1) for start in starts]
    return [piece for piece in pieces if len(piece.ids) > 1]


def pad(sequences: Sequence[Encoded], pad_id: int | None = None) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (-100 where not scored), padded on the right.

    Args:
        sequences: A sequence for each row.
        pad_id: Token id of the padding, which nothing reads; 0 by default.
    """
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


def overlap(a: Iterable[Prompt], b: Iterable[Prompt]) -> list[Prompt]:
    """Prompts, or texts, that stand in both, in the order of `a`."""
    known = {_key(prompt) for prompt in b}
    return [prompt for prompt in a if _key(prompt) in known]


def _key(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
    return " ".join(text.split()).casefold()
