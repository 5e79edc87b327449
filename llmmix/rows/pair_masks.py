"""Messages of weight 0 in the answers of preferences: the rest is read behind them, not scored.

Such an answer has several messages, those of a tool among them. A mask of its tokens goes from
TRL's tokenized rows to the batch, cut as TRL cuts the tokens, so that the log-probabilities of the
model and of the reference are both of what is left.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from llmmix.rows.message_spans import written_parts
from llmmix.rows.prompts import template_options
from llmmix.rows.weights import ROW, Rows, Weighing, has_column, keep_columns, parts_of

PAIR = ("chosen", "rejected")
MASKS = ("chosen_mask", "rejected_mask")
Row = dict[str, Any]


def mask_answers(rows: Rows, tokenizer: Any, args: DPOConfig) -> Rows:
    """TRL's tokenized preferences, with `chosen_mask` and `rejected_mask` where a message weighs 0.

    Args:
        rows: Rows with messages and their tokens. Others, and streams, are left as they are.
        tokenizer: The model's tokenizer.
        args: The trainer's settings.

    Raises:
        ValueError: The tokens of a message cannot be told apart, or no token of an answer is left.
    """
    if not isinstance(rows, Dataset) or not {*PAIR, "chosen_ids"} <= set(rows.column_names):
        return rows
    if has_column(rows, MASKS[0]):
        return rows
    answers = rows.with_format(None).select_columns([*PAIR])
    if not any(_unscored(row[name]) for row in answers for name in PAIR):
        return rows
    make = partial(_masks, tokenizer=tokenizer)
    return rows.map(make, num_proc=args.dataset_num_proc, desc="Masking messages of weight 0")


def carry_masks(trainer: DPOTrainer, rows: Any) -> None:
    """Let the masks of rows reach a trainer's batches, where they have some.

    Args:
        trainer: The trainer.
        rows: Rows of it, or rows by name, or None.
    """
    collate: Any = trainer.data_collator
    weighing = isinstance(collate, Weighing)  # it stays the outer one
    inner = collate.collate if weighing else collate
    if isinstance(inner, Masking) or not any(has_column(part, MASKS[0]) for part in parts_of(rows)):
        return
    args: Any = trainer.args
    cut = slice(None, args.max_length)
    if args.max_length is not None and args.truncation_mode == "keep_end":
        cut = slice(-args.max_length, None)
    if weighing:
        collate.collate = Masking(inner, cut)
    else:
        trainer.data_collator = Masking(inner, cut)
    keep_columns(trainer, *MASKS)


class Masking:
    """A collator of preferences that leaves masked tokens out of `completion_mask`.

    Args:
        collate: Makes a batch [chosen, rejected], padded on the right.
        cut: What is left of a row's tokens.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, Any]], cut: slice):
        self.collate, self.cut = collate, cut

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """A batch of rows, which all or none have masks."""
        batch = self.collate(examples)
        if MASKS[0] in examples[0]:
            rows = [[0] * len(e["prompt_ids"]) + e[name] for name in MASKS for e in examples]
            for scored, row in zip(batch["completion_mask"], rows, strict=True):
                kept = torch.tensor(row[self.cut])
                scored[: len(kept)] *= kept
        return batch


def _unscored(answer: Any) -> list[int]:
    """The numbers of an answer's messages of weight 0."""
    if isinstance(answer, str):
        return []
    return [place for place, message in enumerate(answer) if message.get(ROW) == 0]


def _masks(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
    return {mask: _mask(row, name, tokenizer) for name, mask in zip(PAIR, MASKS, strict=True)}


def _mask(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids, unscored = row[f"{name}_ids"], _unscored(row[name])
    if not unscored:
        return [1] * len(ids)
    before = len(row["prompt"])
    messages, places = row["prompt"] + row[name], [before + place for place in unscored]
    whole, spans, _ = written_parts(tokenizer, messages, places, template_options(row))
    mask = [1] * len(whole)
    for first, last in spans.values():
        mask[first:last] = [0] * (last - first)
    start = len(whole) - len(ids)
    if whole[start:] != ids or not any(mask[start:]):
        raise ValueError(
            f"`{name}`: its messages of `{ROW}` 0 cannot be told apart from the others among its "
            "tokens, or leave none. Give the row a `weight` of 0, or take the messages' away."
        )
    return mask[start:]
