"""Weights of rows whose answer is one: of preferences, and of rows to forget or to retain.

The loss of such a row is of whole answers: a margin between two, or the probability of one. So its
`weight` multiplies that loss, never a probability or a margin, and no token of an answer has a
weight of its own: `token_weights` are refused. A `weight` of a message is 0 or 1. Behind a prompt
it may be 0 in preferences alone, where it is a mask: see llmmix/rows/pair_masks.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer

from llmmix.rows.formats import check_preference_dataset
from llmmix.rows.messages import is_messages
from llmmix.rows.pair_masks import PAIR, carry_masks
from llmmix.rows.weights import (
    ROW,
    TOKENS,
    Rows,
    as_weight,
    carry_weights,
    check_row_weights,
    drop_weightless,
    has_column,
    messages_in,
    speaker,
    weighted_columns,
    weighted_messages,
)

ANSWERED = ("completion", "messages", "conversations")  # whose last turn is the answer
CHATS = (*PAIR, *ANSWERED, "prompt")
ASKED = ("prompt", "conversations", "question", "instruction")  # beside a pair
Row = Mapping[str, Any]


def weigh_answers(
    rows: Any,
    argument: str,
    read: Callable[[Any], Rows],
    unweighted: str = "",
    *,
    masks: bool = False,
) -> Rows:
    """Read rows, with their weights checked before, and those of weight 0 dropped behind.

    Args:
        rows: The rows as they were given.
        argument: The name under which they were given, for errors.
        read: Reads rows into the columns of a trainer, and may drop some.
        unweighted: Why these rows may have no `weight`, to end a sentence; "" where they may.
        masks: Whether a message of an answer may weigh 0. In streams and in whole answers it may
            not.

    Raises:
        ValueError: A weight is refused (`as_weight`), or there may be none; there are weights of
            tokens; a message's is no 0 or 1, or is 0 where it may not be; or none is left.
    """
    if unweighted and has_column(rows, ROW):
        raise ValueError(
            f"`{argument}` has a column `{ROW}`, and {unweighted}; or remove the column."
        )
    if has_column(rows, TOKENS):
        raise ValueError(
            f"`{argument}` has a column `{TOKENS}`, and this loss is of whole answers. Remove it; "
            f"`{ROW}` weighs a row."
        )
    rows = _checked(check_row_weights(rows, argument), argument, masks)
    return drop_weightless(read(rows), argument)


def read_pairs(rows: Any, argument: str, args: DPOConfig, tokenizer: Any) -> Rows:
    """`check_preference_dataset`, with `weigh_answers`.

    Args:
        rows: The rows as they were given.
        argument: The name under which they were given, for errors.
        args: The trainer's settings.
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: One of the two refuses the rows, or a setting goes with no weights.
    """
    read = partial(check_preference_dataset, argument=argument, processing_class=tokenizer)
    return weigh_answers(rows, argument, read, unweighable(args), masks=True)


def unweighable(args: DPOConfig) -> str:
    """Which setting keeps the pairs of a trainer from having weights, to end a sentence; or ""."""
    defaults = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}
    for name, default in defaults.items():
        if (given := getattr(args, name)) != default:
            return (
                f"`{name}={given!r}` changes DPO's loss, whose plain form alone is weighed by the "
                f"pair. Set `{name}={default!r}`"
            )
    if args.loss_weights not in (None, [1.0]):
        return "`loss_weights` is another factor of the loss. Leave it out"
    return ""


def carry_answer_weights(trainer: DPOTrainer) -> None:
    """`carry_weights` and `carry_masks`, and `weigh_answers` for rows given to `evaluate`.

    Args:
        trainer: The trainer, before `train()`.
    """
    carry_masks(trainer, trainer.train_dataset)
    carry_masks(trainer, trainer.eval_dataset)
    carry_weights(trainer)
    prepare = trainer._prepare_dataset

    def prepared(dataset: Rows, processing_class: Any, args: DPOConfig, dataset_name: str) -> Rows:
        why = unweighable(args)
        dataset = weigh_answers(dataset, "eval_dataset", lambda rows: rows, why, masks=True)
        dataset = prepare(dataset, processing_class, args, dataset_name)
        carry_masks(trainer, dataset)
        carry_weights(trainer, dataset)
        return dataset

    trainer._prepare_dataset = prepared  # type: ignore[method-assign]  # on this trainer alone


def _checked(rows: Any, argument: str, masks: bool) -> Any:
    """Rows whose messages' weights are checked, those of a stream as they pass."""
    check = partial(_check_messages, argument=argument, masks=masks and isinstance(rows, Dataset))
    if isinstance(rows, IterableDataset):
        chats = any(map(is_messages, next(iter(rows), {}).values()))
        return rows.filter(check, with_indices=True) if chats else rows
    if not isinstance(rows, Dataset) or rows.format["type"] == "custom":
        return rows
    if weighted_columns(rows, CHATS):
        columns = [n for n in dict.fromkeys((*CHATS, *ASKED)) if n in rows.features]
        for number, row in enumerate(rows.with_format(None).select_columns(columns)):
            check(row, number)
    return rows


def _check_messages(row: Row, number: int, argument: str, masks: bool) -> bool:
    """True, so that a filter keeps the row.

    Raises:
        ValueError: The weight of a message is refused.
    """
    for column, place, message in weighted_messages(row, CHATS):
        what = f"`{argument}`, row {number}: `{ROW}` of message {place} of `{column}`"
        weight = as_weight(message[ROW], what)
        if weight not in (0, 1):
            raise ValueError(
                f"{what} is {weight:g}, and the loss is of whole answers. Give the row a `{ROW}`."
            )
        answered = _answered(row, column)
        some = any(messages_in(row, column)[n].get(ROW) != 0 for n in answered)
        if weight == 0 and place in answered and not (masks and some):
            raise ValueError(
                f"{what} is 0, and it is part of an answer, which the loss takes whole. Give the "
                f"row a `{ROW}` of 0, or move the message to the prompt."
            )
    return True


def _answered(row: Row, column: str) -> range:
    """The numbers of a column's messages that are part of an answer."""
    said = messages_in(row, column)
    if column in PAIR:  # with the prompt in both where it has no column
        there = any(row.get(name) is not None for name in ASKED)
        return range(0 if there else _shared(row), len(said))
    if column == "prompt" or row.get("chosen") is not None:
        return range(0)
    return range(max(0, _last_answer(said)), len(said))


def _shared(row: Row) -> int:
    """How many messages two answers begin with alike."""
    pairs = zip(messages_in(row, "chosen"), messages_in(row, "rejected"), strict=False)
    alike = [{**a, ROW: None} == {**b, ROW: None} for a, b in pairs]
    return [*alike, False].index(False)


def _last_answer(said: list[dict[str, Any]]) -> int:
    """The number of the assistant's last message, or -1."""
    answers = [n for n, message in enumerate(said) if speaker(message) == "assistant"]
    return max(answers, default=-1)
