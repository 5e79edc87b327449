"""Weights from the data: how much a row, and each of its tokens, counts in the loss.

    weight of a token = `weight` of its row * `weight` of its message * its `token_weights`

A loss is multiplied by its weight and divided by counts, of rows or of tokens, never by the sum of
weights: half the weight is half the gradient. A weight of 0 is a mask: the labels are -100, and
what is not scored is not counted. A null is 1.

This file has the numbers: what is refused, and how they go from rows to a batch and to the loss.
llmmix/rows/message_weights.py finds the tokens of a message. Every trainer that takes weights calls
`carry_weights` once and `take_weights` in each loss.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn.functional import pad
from transformers import Trainer

from llmmix.processes import warn_once
from llmmix.rows.messages import SPEAKERS, is_messages

ROW, TOKENS = "weight", "token_weights"  # columns, and keys of a batch
LARGEST = torch.finfo(torch.float32).max  # losses are computed in fp32
Rows = Dataset | IterableDataset


def as_weight(value: Any, what: str) -> float:
    """A weight as a number; null is 1.

    Args:
        value: What the data says.
        what: Where it says so, the subject of an error.

    Raises:
        ValueError: It is text or another type, NaN, infinite, above `LARGEST` or negative.
    """
    if value is None:
        return 1.0
    if hasattr(value, "item"):  # of rows in the format of numpy or torch
        value = value.item()
    if not isinstance(value, Real | Decimal):
        raise ValueError(
            f"{what} is {value!r}, of type {type(value).__name__}. A weight is a number: 1 is a "
            "loss as it is, 0 leaves it out. Convert it, or rename what is no weight."
        )
    weight = float(value)
    if not math.isfinite(weight):
        raise ValueError(f"{what} is {weight}. Give a finite number, or null for 1.")
    if weight > LARGEST:
        raise ValueError(f"{what} is {weight:g}, and fp32 ends at {LARGEST:.3g}. Scale the column.")
    if weight < 0:
        raise ValueError(
            f"{what} is {weight:g}: a loss of negative weight has no lower bound. Give 0 to leave "
            "it out; rows to unlearn are rows to forget of `UnlearnTrainer`."
        )
    return weight


def check_row_weights(rows: Any, argument: str) -> Any:
    """Check the column `weight`, where there is one. Rows of weight 0 stay: see `drop_weightless`.

    The rows of a stream are checked as they pass.

    Args:
        rows: The rows as they were given, so that errors name their numbers.
        argument: The name under which they were given, for errors.

    Returns:
        The rows.

    Raises:
        ValueError: `as_weight` refuses a weight, or all are 0.
    """
    if not has_column(rows, ROW):
        return rows
    if isinstance(rows, IterableDataset):
        warn_once(f"`{argument}`: the loss of a row is multiplied by its `{ROW}`.")
        return rows.filter(_Checked(argument), with_indices=True)
    weights = row_weights(rows, argument)
    if weights and not any(weights):
        raise ValueError(f"`{argument}`: `{ROW}` is 0 in all of its {len(rows)} rows.")
    mean = sum(weights) / max(len(weights), 1)
    warn_once(f"`{argument}`: the loss of a row is multiplied by its `{ROW}` (mean {mean:.4g}).")
    return rows


def row_weights(rows: Dataset, argument: str) -> list[float]:
    """The column `weight` of rows, checked.

    Raises:
        ValueError: `as_weight` refuses a weight.
    """
    given = rows.with_format(None)[ROW][:]
    return [as_weight(w, _cell(argument, n, ROW)) for n, w in enumerate(given)]


def drop_weightless(rows: Any, argument: str, *, weighed: bool = False) -> Any:
    """Drop the rows that weights leave nothing to train on, and say how many.

    Args:
        rows: Rows whose weights are checked.
        argument: The name under which they were given, for the log.
        weighed: Whether weights of messages or tokens made `labels`.

    Raises:
        ValueError: No row is left.
    """
    by_row = has_column(rows, ROW)
    if not by_row and not weighed:
        return rows
    columns = [ROW] * by_row + ["labels"] * weighed
    if isinstance(rows, IterableDataset):
        counted = rows.filter(_counts)
        if next(iter(counted), None) is None:
            raise ValueError(f"`{argument}`: the weights leave no token to score.")
        return counted
    cells = rows.with_format(None).select_columns(columns)
    kept = [number for number, row in enumerate(cells) if _counts(row)]
    if not kept:
        raise ValueError(f"`{argument}`: the weights leave no token to score.")
    if len(kept) == len(rows):
        return rows
    warn_once(
        f"Dropped {len(rows) - len(kept)} of {len(rows)} rows of `{argument}`: their weights leave "
        "no token to score."
    )
    return rows.select(kept)


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether a row has a token to train on."""
    if row.get(ROW) == 0:
        return False
    return "labels" not in row or any(label != -100 for label in row["labels"])


class _Checked:
    """Checks the weights of a stream's rows as they pass."""

    def __init__(self, argument: str):
        self.argument = argument

    def __call__(self, row: Mapping[str, Any], number: int) -> bool:
        as_weight(row.get(ROW), _cell(self.argument, number, ROW))
        return True


def has_column(rows: Any, column: str) -> bool:
    """Whether rows, which may be a stream or none at all, have a column."""
    if not isinstance(rows, Dataset | IterableDataset):
        return False
    return column in (rows.column_names or next(iter(rows), {}))


def parts_of(*given: Any) -> list[Any]:
    """Rows of a trainer, each as they are, and those that stand under names one by one."""
    return [p for some in given for p in (some.values() if isinstance(some, dict) else [some])]


def weighted_columns(rows: Dataset, columns: Sequence[str]) -> list[str]:
    """Those among some columns whose messages may have a `weight`, as their types say."""
    types = {column: str(rows.features[column]) for column in columns if column in rows.features}
    return [column for column, told in types.items() if f"'{ROW}'" in told or "Json(" in told]


def weighted_messages(
    row: Mapping[str, Any], columns: Sequence[str]
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(column, number, message) of the messages of a row that have a `weight`."""
    for column in columns:
        for number, message in enumerate(messages_in(row, column)):
            if message.get(ROW) is not None:
                yield column, number, message


def messages_in(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The messages of a cell; none where it is text or not there."""
    cell: Any = row.get(column)
    if not is_messages(cell):
        return []
    return [cell] if isinstance(cell, dict) else cell


def speaker(message: Mapping[str, Any]) -> Any:
    """Who says a message, by the name that chat templates know."""
    role = message.get("role") or message.get("from")
    return SPEAKERS.get(role, role)  # type: ignore[arg-type]


def _cell(argument: str, row: int, column: str) -> str:
    return f"`{argument}`, row {row}: `{column}`"


# From rows to a batch


class Weighing:
    """A collator that passes weights on: `weight` (B,), and `token_weights` (B, T) like the labels.

    Labels of weight 0 become -100. Weights of tokens that TRL has cut from a row are cut here.

    Args:
        collate: Makes a batch of rows without weights.
        keep_end: Whether rows that are too long keep their end, not their start.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, Any]], keep_end: bool = False):
        self.collate, self.keep_end = collate, keep_end

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """A batch of rows, of which some or none have weights."""
        rest = [{k: v for k, v in e.items() if k not in (ROW, TOKENS)} for e in examples]
        batch = self.collate(rest)
        if any(ROW in e for e in examples):
            weights = [as_weight(e.get(ROW), f"`{ROW}` of a row") for e in examples]
            batch[ROW] = torch.tensor(weights)
            if "labels" in batch and not batch[ROW].all():
                batch["labels"] = batch["labels"].clone()
                batch["labels"][batch[ROW] == 0] = -100
        if any(TOKENS in e for e in examples):
            batch[TOKENS] = self._of_tokens(examples, batch)
            batch["labels"] = batch["labels"].masked_fill(batch[TOKENS] == 0, -100)
        return batch

    def _of_tokens(self, examples: list[dict], batch: Mapping[str, Any]) -> Tensor:
        if "attention_mask" not in batch:
            raise ValueError(
                f"`{TOKENS}`: the collator's batch has no `attention_mask`, which says where the "
                "tokens of a row stand. Return it, or leave `data_collator` at its default."
            )
        mask = batch["attention_mask"].bool()
        rows = [self._cut(e) for e in examples]
        weights = torch.tensor([weight for row in rows for weight in row])
        if len(weights) != int(mask.sum()):
            raise ValueError(
                f"`{TOKENS}`: {len(weights)} weights for {int(mask.sum())} tokens of a batch. "
                "Give each row as many as it has `input_ids`."
            )
        return torch.zeros(mask.shape).masked_scatter(mask, weights)

    def _cut(self, row: Mapping[str, Any]) -> list[float]:
        length = len(row["input_ids"])
        given = row.get(TOKENS)
        if given is None:
            return [1.0] * length
        kept = given[-length:] if self.keep_end else given[:length]
        return [as_weight(weight, f"`{TOKENS}` of a row") for weight in kept]


def carry_weights(trainer: Trainer, *given: Any) -> None:
    """Let weights reach a trainer's batches, where rows have them.

    Call it behind TRL's constructor.

    Args:
        trainer: The trainer, whose loss takes them from each batch by `take_weights`.
        *given: Rows, or rows by name. Default: the trainer's own.
    """
    rows = given or (trainer.train_dataset, trainer.eval_dataset)
    weighted = any(has_column(part, column) for part in parts_of(*rows) for column in (ROW, TOKENS))
    if not weighted or isinstance(trainer.data_collator, Weighing):
        return
    cut = getattr(trainer.args, "truncation_mode", "keep_start")
    trainer.data_collator = Weighing(trainer.data_collator, cut == "keep_end")
    keep_columns(trainer, ROW, TOKENS)


def keep_columns(trainer: Trainer, *names: str) -> None:
    """Keep columns that a model does not take, for the collator of one trainer."""
    own_columns = trainer._set_signature_columns_if_needed

    def with_more() -> None:
        own_columns()
        columns: list[str] = trainer._signature_columns or []
        more = [name for name in names if name not in columns]
        # Transformers declares None for a list
        trainer._signature_columns = [*columns, *more]  # type: ignore[assignment]

    trainer._set_signature_columns_if_needed = with_more  # type: ignore[method-assign]


# From a batch to the loss


class Weights(NamedTuple):
    """The weights of a batch.

    Attributes:
        rows: (B,), or None.
        tokens: (B, T) aligned with the batch's labels, 0 where it is padded, or None.
    """

    rows: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.rows is not None or self.tokens is not None

    def of_rows(self, values: Tensor) -> Tensor:
        """The rows' weights, 1 where there are none, like values (B,)."""
        return torch.ones_like(values) if self.rows is None else self.rows.to(values)

    def of_tokens(self, values: Tensor) -> Tensor:
        """Row times token, like values of predicted tokens (B, T'), T' = T - 1.

        Where a model has put virtual tokens before a row, T' is larger, and they weigh 1.
        """
        weights = self.of_rows(values.new_ones(len(values))).unsqueeze(1).expand_as(values)
        if self.tokens is None:
            return weights
        tokens = self.tokens[:, 1:].to(values)
        return weights * pad(tokens, (values.size(1) - tokens.size(1), 0), value=1.0)

    def times(self, values: Tensor) -> Tensor:
        """Losses of rows (B,) or of predicted tokens (B, T'), each times its weight."""
        if not self.given:
            return values
        return values * (self.of_rows(values) if values.dim() == 1 else self.of_tokens(values))

    def mean(self, scored: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`weight/mean` for `Means.add`: a sum and its count. Empty where there are no weights.

        Args:
            scored: Bool, which rows (B,) or predicted tokens (B, T') count.
        """
        if not self.given:
            return {}
        return {"weight/mean": (self.times(scored.float()).sum(), scored.sum())}


def take_weights(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """A batch without its weights, which no model takes, and these. The batch given keeps them."""
    rest = {name: value for name, value in batch.items() if name not in (ROW, TOKENS)}
    return rest, Weights(batch.get(ROW), batch.get(TOKENS))
