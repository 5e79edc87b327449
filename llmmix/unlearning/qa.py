"""Questions and answers as token sequences whose answer is scored, to train on or to evaluate.

A sequence is the prompt's tokens and the answer's, the end-of-sequence token among the latter.
Which tokens count is known from lengths, never from token ids: a pad token that is the
end-of-sequence token too does no harm.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length
from trl.trainer.utils import pad as pad_tensors

from llmmix.formats import check_rows_type, read_shape
from llmmix.messages import Prompt, folded, spoken
from llmmix.prompts import encode
from llmmix.shapes import answer_shapes, asked, shape_of

FORMATS = (
    "`question` and `answer`, `prompt` and `completion` (text or lists of messages), `prompt` and "
    "`answer` or `gt`, `instruction` and `output`, `messages`, `conversations`, or `text`"
)


# Once read they are gone, so that rows read twice are the same
READ = ("completion", "gt", "messages", "conversations", "text")


class Encoded(NamedTuple):
    """A prompt and an answer in one sequence.

    Attributes:
        ids: Token ids of the prompt and of the answer.
        prompt_length: How many of them are the prompt's, which are not scored.
    """

    ids: list[int]
    prompt_length: int


def read_rows(
    dataset: Dataset | None, argument: str, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Rows with a `prompt` (text or messages) and an `answer` (text), from any of `FORMATS`.

    A `question` is asked as `question_prompt` does. Of a chat the assistant's last turn is the
    answer. A `text` has an empty prompt. Columns of `READ` are removed, others are kept. Rows
    without a question or an answer are dropped and counted.

    Args:
        dataset: The rows.
        argument: Name of the rows, for errors.
        tokenizer: The tokenizer whose chat template asks the question.

    Raises:
        TypeError: `dataset` is text, a list or several splits.
        ValueError: There are no rows, their columns are of no accepted format, no row has both a
            question and an answer, or rows are chats and the tokenizer has no chat template.
    """
    if dataset is not None:
        check_rows_type(dataset, argument)
    if not isinstance(dataset, Dataset) or not len(dataset):
        given = "no rows" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(f"`{argument}` must be a map-style `Dataset` of {FORMATS}, got {given}.")
    shape = shape_of(dataset.column_names, answer_shapes())
    if shape is None:
        raise ValueError(
            f"`{argument}` has the columns {sorted(dataset.column_names)}; accepted are {FORMATS}. "
            "Rename the columns to these."
        )
    return read_shape(dataset, argument, shape, tokenizer, READ)


def question_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> Prompt:
    """A question as it is put to a model: a user's message, or text without a chat template."""
    return asked(question, tokenizer.chat_template is not None)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    *,
    include_eos: bool = True,
) -> Encoded:
    """Token ids of a prompt and its answer, closed by one end-of-sequence token.

    A blank is put between a prompt of text and its answer, unless either brings white space. What a
    chat template writes after the answer's end-of-sequence token is left out. Where the prompt is
    empty, the first token counts as the prompt, since nothing predicts it.

    Args:
        tokenizer: The tokenizer, with a chat template where `prompt` is messages.
        prompt: Text or messages.
        answer: Text.
        include_eos: Whether to score the end-of-sequence token.
    """
    eos = tokenizer.eos_token_id
    if isinstance(prompt, str):
        separate = not prompt or prompt[-1].isspace() or answer[:1].isspace()
        start = _without_eos(tokenizer(prompt)["input_ids"], prompt, tokenizer) if prompt else []
        text = answer if separate else " " + answer
        ids = tokenizer(text, add_special_tokens=not prompt)["input_ids"]
        ids = start + _without_eos(ids, text, tokenizer)
    else:
        start = encode(tokenizer, prompt)
        said = [*prompt, {"role": "assistant", "content": answer}]
        ids = encode(tokenizer, said, generation=False)
        start = start[: common_prefix_length(start, ids)]
        ends = [place for place in range(len(start), len(ids)) if ids[place] == eos]
        ids = ids[: ends[-1]] if ends else ids
    if include_eos and eos is not None:
        ids = [*ids, eos]
    return Encoded(ids, max(len(start), 1))


def _without_eos(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text without the end-of-sequence token that some tokenizers append."""
    closed = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closed and not text.endswith(tokenizer.eos_token) else ids


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
    """Prompts, or texts, that stand in both, in the order of `a`; see `llmmix.messages.folded`."""
    known = {folded(spoken(prompt)) for prompt in b}
    return [prompt for prompt in a if folded(spoken(prompt)) in known]
