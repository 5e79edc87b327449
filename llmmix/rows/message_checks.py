"""Which messages of some rows have weights, and whether they may have them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from llmmix.processes import warn_once
from llmmix.rows.messages import ASKING
from llmmix.rows.weights import (
    ROW,
    Rows,
    as_weight,
    has_column,
    messages_in,
    parts_of,
    speaker,
    weighted_columns,
    weighted_messages,
)

# Of rows, and of their messages: what others call a weight
ELSEWHERE = (("weights", "loss_weight", "loss_scale"), ("loss", "loss_scale"))
CHATS = ("messages", "conversations", "prompt", "completion")
Row = dict[str, Any]


class Scoring(NamedTuple):
    """Which messages a trainer scores, and what it can do with their weights.

    Attributes:
        assistant_only: Whether the assistant's turns alone are scored.
        whole: Whether a `prompt` is scored too.
        masks_only: Why weights of messages and tokens must be 0 or 1; "" where they need not.
    """

    assistant_only: bool
    whole: bool
    masks_only: str = ""

    @classmethod
    def of(cls, args: SFTConfig, packing: bool, masks_only: str = "") -> "Scoring":
        """As a trainer's settings say."""
        if packing:
            masks_only = "`packing=True` keeps labels alone"
        return cls(args.assistant_only_loss, args.completion_only_loss is False, masks_only)

    def takes(self, role: str, in_prompt: bool) -> bool:
        """Whether a message is scored, and so may have a weight."""
        return (self.whole or not in_prompt) and not (self.assistant_only and role in ASKING)


def has_message_weights(*given: Any) -> bool:
    """Whether a message of some rows has a weight; the first row of a stream says so for all.

    Args:
        *given: Rows, or rows by name, or None.
    """
    return any(map(_has_message_weights, parts_of(*given)))


def _has_message_weights(rows: Any) -> bool:
    if not isinstance(rows, Dataset | IterableDataset) or has_column(rows, "input_ids"):
        return False
    if isinstance(rows, IterableDataset):
        return any(True for _ in weighted_messages(next(iter(rows), {}), CHATS))
    if rows.format["type"] == "custom":
        return False
    return any(True for row in _chats(rows) for _ in weighted_messages(row, CHATS))


def _chats(rows: Dataset) -> Iterator[Row]:
    """The columns of rows that may hold messages with weights."""
    columns = weighted_columns(rows, CHATS)
    yield from rows.with_format(None).select_columns(columns) if columns else ()


def tell_other_names(rows: Rows, argument: str) -> None:
    """Log that the first row, or a message of it, has what others call a weight."""
    row: Row = next(iter(rows), {})
    said = [message for column in CHATS for message in messages_in(row, column)]
    of_rows, of_messages = ELSEWHERE
    found = [name for name in of_rows if row.get(name) is not None]
    found += [name for name in of_messages if any(m.get(name) is not None for m in said)]
    if found:
        warn_once(
            f"`{argument}` has `{found[0]}`, which is not read. A weight is called `{ROW}`, in a "
            "row or a message; 0 masks."
        )


def check_messages(rows: Rows, argument: str, scoring: Scoring) -> bool:
    """Refuse weights that cannot be; whether some are no 0 and no 1, which a stream may have."""
    if isinstance(rows, IterableDataset):
        return True  # checked as they pass
    found = [check_row(row, n, argument, scoring) for n, row in enumerate(_chats(rows))]
    weights = [weight for row in found for weight in row]
    return any(weight not in (0, 1) for weight in weights)


def check_row(row: Mapping[str, Any], number: int, argument: str, scoring: Scoring) -> list[float]:
    """The weights of a row's messages.

    Raises:
        ValueError: One of them is refused.
    """
    found = []
    for column, place, message in weighted_messages(row, CHATS):
        what = f"`{argument}`, row {number}: `{ROW}` of message {place} of `{column}`"
        found.append(as_weight(message[ROW], what))
        role = speaker(message)
        if not scoring.takes(role, column == "prompt"):
            raise ValueError(
                f"{what}, which {role!r} says, weighs what is not scored. Take it away, or score "
                "all: `assistant_only_loss=False`, and `completion_only_loss=False` for a prompt."
            )
        check_mask(found[-1], what, scoring)
    return found


def check_mask(weight: float, what: str, scoring: Scoring) -> None:
    """Refuse a weight that is no mask, where it must be one.

    Raises:
        ValueError: It is none.
    """
    if scoring.masks_only and weight not in (0, 1):
        raise ValueError(
            f"{what} is {weight:g}, and {scoring.masks_only}: give 0 or 1 there, or a `{ROW}` of "
            "the row."
        )


def without_message_weights(rows: IterableDataset, argument: str) -> IterableDataset:
    """A stream whose first row has no weight at a message; another that has one is an error.

    Raises:
        ValueError: A row that passes has a weight at a message.
    """

    def plain(row: Row, number: int) -> bool:
        if "input_ids" not in row and any(True for _ in weighted_messages(row, CHATS)):
            raise ValueError(
                f"`{argument}`, row {number}: a message has a `{ROW}`, and the first row of a "
                "stream says whether messages have some. Give one of its messages a weight of 1."
            )
        return True

    return rows.filter(plain, with_indices=True)
