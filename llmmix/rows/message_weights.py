"""Weights of messages and of tokens, as `input_ids`, `labels` and `token_weights`.

A message says `weight` beside its role and content, 0 or 1 in OpenAI's format and any number from 0
here. Rows with such messages are tokenized here, as TRL would, and TRL leaves them as they are.

    assistant_only_loss   the assistant's turn, where the template marks it, or as `turn_spans` says
    else                  all that the template writes for the message, its header included

Weights change what a token counts, never which tokens a trainer scores, but for 0, which is a mask.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.data_utils import common_prefix_length

from llmmix.processes import warn_once
from llmmix.rows.message_checks import (
    Row,
    Scoring,
    check_mask,
    check_messages,
    check_row,
    has_message_weights,
    tell_other_names,
    without_message_weights,
)
from llmmix.rows.message_spans import assistant_parts, written_parts
from llmmix.rows.prompts import encode, template_options
from llmmix.rows.weights import (
    ROW,
    TOKENS,
    Rows,
    as_weight,
    carry_weights,
    check_row_weights,
    drop_weightless,
    has_column,
    row_weights,
)

NUMBER = "row as it was given"


def weigh(
    rows: Any,
    argument: str,
    args: SFTConfig,
    tokenizer: Any,
    read: Callable[[Any], Rows],
    masks_only: str = "",
    turns: bool = False,
) -> Rows:
    """Read rows, with their weights: checked before, and as weights of tokens behind.

    Args:
        rows: The rows as they were given.
        argument: The name under which they were given, for errors.
        args: The trainer's settings.
        tokenizer: The model's tokenizer.
        read: Reads rows into TRL's columns, and may drop some.
        masks_only: Why weights of messages and tokens must be 0 or 1; "" where they need not.
        turns: Whether chats are tokenized here though no message of them has a weight, because
            other rows of the trainer's have some: `turns_found` has TRL find no turns in either.

    Raises:
        ValueError: A weight is refused (`as_weight`), is of a message that is not scored, is no 0
            or 1 where it must be, or leaves nothing to train on; weights of tokens are not as many
            as the tokens; or the messages cannot be told apart among the tokens.
    """
    packing = args.packing
    if argument.startswith("eval") and args.eval_packing is not None:
        packing = args.eval_packing
    scoring = Scoring.of(args, packing, masks_only)
    rows = check_row_weights(rows, argument)
    tell_other_names(rows, argument)
    if packing and has_column(rows, ROW):
        _check_unpacked(rows, argument)
    by_token = has_column(rows, TOKENS)
    if by_token and not has_column(rows, "input_ids"):
        raise ValueError(f"`{argument}` has `{TOKENS}` and no `input_ids`: give both, or neither.")
    by_message = has_message_weights(rows)
    fractions = check_messages(rows, argument, scoring) if by_message else False
    if isinstance(rows, IterableDataset) and not (by_message or has_column(rows, "input_ids")):
        rows = without_message_weights(rows, argument)
    if by_message or by_token:
        by = f"its entry of `{TOKENS}`" if by_token else f"the `{ROW}` of its message"
        warn_once(f"`{argument}`: the loss of a token is multiplied by {by}.")
        rows = _numbered(rows)
    rows = read(rows)
    chats = not by_token and _are_chats(rows) and (by_message or turns)
    if by_token or chats:
        keep = not scoring.masks_only and (by_token or fractions)
        make = partial(
            _of_tokens if by_token else _of_messages,
            argument=argument,
            tokenizer=None if by_token else _templated(tokenizer, args, argument),
            scoring=scoring,
            keep=keep,
        )
        rows = _mapped(rows, make, args, argument, [NUMBER] * (by_token or by_message))
        if by_token and not keep:
            rows = rows.remove_columns(TOKENS)
    return drop_weightless(rows, argument, weighed=by_token or chats)


def check_formatted(rows: Any, argument: str) -> Any:
    """Check rows whose text a function makes: their own weights count, those of messages cannot.

    Arguments, result and errors are those of `check_row_weights`.
    """
    if has_message_weights(rows):
        warn_once(
            f"`{argument}`: `formatting_func` makes text, and no `{ROW}` of a message counts."
        )
    return check_row_weights(rows, argument)


def tell_unread(rows: Any, argument: str, trainer: str, ways: str) -> None:
    """Log that rows have weights and that their trainer does not read them.

    Args:
        rows: The rows as they were given.
        argument: The name under which they were given.
        trainer: The trainer, the subject of the sentence.
        ways: What does read them.
    """
    if has_message_weights(rows) or any(has_column(rows, name) for name in (ROW, TOKENS)):
        warn_once(f"`{argument}` has weights (`{ROW}`, `{TOKENS}`). {trainer} reads none: {ways}.")


def carry_sft_weights(trainer: SFTTrainer, masks_only: str = "") -> None:
    """`carry_weights`, and `weigh` for rows that are given to `evaluate`.

    Args:
        trainer: The trainer, before `train()`.
        masks_only: As for `weigh`.
    """
    carry_weights(trainer)
    prepare = trainer._prepare_dataset

    def prepared(dataset: Any, tokenizer: Any, args: SFTConfig, *more: Any, **named: Any) -> Any:
        dataset = weigh(dataset, "eval_dataset", args, tokenizer, lambda rows: rows, masks_only)
        carry_weights(trainer, dataset)
        return prepare(dataset, tokenizer, args, *more, **named)

    trainer._prepare_dataset = prepared  # type: ignore  # on this trainer alone


def _check_unpacked(rows: Rows, argument: str) -> None:
    if isinstance(rows, Dataset) and set(row_weights(rows, argument)) <= {0.0, 1.0}:
        return
    raise ValueError(
        f"`packing=True` keeps no `{ROW}` of a row, and `{argument}` "
        f"{'is a stream' if isinstance(rows, IterableDataset) else 'has some that are not 0 or 1'}."
        " Set `packing=False`; `padding_free=True` computes no padding either."
    )


def _numbered(rows: Rows) -> Rows:
    if isinstance(rows, Dataset):
        return rows.add_column(NUMBER, list(range(len(rows))))
    return rows.map(lambda row, number: {NUMBER: number}, with_indices=True)


# The rows as TRL takes them


def _are_chats(rows: Rows) -> bool:
    first: Row = next(iter(rows), {})
    return "input_ids" not in first and isinstance(
        first.get("messages", first.get("completion")), list
    )


def _templated(tokenizer: Any, args: SFTConfig, argument: str) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that the trainer will have."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`{argument}`: messages with a `{ROW}` need a tokenizer, got "
            f"{type(tokenizer).__name__}. Give rows a `{ROW}` instead."
        )
    path = args.chat_template_path
    if path is None:
        return tokenizer
    if not Path(path).is_file():
        raise ValueError(
            f"`chat_template_path={path!r}` is no file, and `{argument}` has messages with a "
            f"`{ROW}`, which are tokenized beforehand. Give a file of the template."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    return tokenizer


def _mapped(
    rows: Rows, make: Callable[[Row], Row], args: SFTConfig, argument: str, remove: list[str]
) -> Rows:
    if isinstance(rows, IterableDataset):
        return rows.map(make, remove_columns=remove)
    desc, workers = f"Weighing the tokens of {argument}", args.dataset_num_proc
    return rows.map(make, remove_columns=remove, num_proc=workers, desc=desc)


def _of_tokens(row: Row, argument: str, tokenizer: Any, scoring: Scoring, keep: bool) -> Row:
    """Labels and weights of a row that has `token_weights`; masks count as TRL counts them."""
    ids, given = row["input_ids"], row[TOKENS]
    where = f"`{argument}`, row {row[NUMBER]}: `{TOKENS}`"
    given = [None] * len(ids) if given is None else given
    if len(given) != len(ids):
        raise ValueError(f"{where} has {len(given)} entries, and `input_ids` has {len(ids)}.")
    weights = [as_weight(weight, f"{where} at {place}") for place, weight in enumerate(given)]
    for place, weight in enumerate(weights):
        check_mask(weight, f"{where} at {place}", scoring)
    labels = row.get("labels")
    if labels is None:
        named = ["completion_mask"] * (not scoring.whole) + ["assistant_masks"]
        masks = [row[name] for name in named if row.get(name) is not None]
        labels = [
            token if all(m[place] for m in masks) else -100 for place, token in enumerate(ids)
        ]
    return _weighed(ids, labels, weights, keep)


def _of_messages(row: Row, argument: str, tokenizer: Any, scoring: Scoring, keep: bool) -> Row:
    """Tokens, labels and weights of a chat."""
    number = row.get(NUMBER)
    if number is not None:  # of a stream's row they are not checked yet
        check_row(row, number, argument, scoring)
    options = template_options(row)
    chat = "messages" in row
    messages = row["messages"] if chat else row["prompt"] + row["completion"]
    given = {place: message.get(ROW) for place, message in enumerate(messages)}
    given = {place: float(weight) for place, weight in given.items() if weight is not None}
    try:
        find = assistant_parts if scoring.assistant_only else written_parts
        ids, spans, said = find(tokenizer, messages, [*given], options)
    except ValueError as error:
        where = "" if number is None else f", row {number}"
        raise ValueError(f"`{argument}`{where}: {error}") from error
    start = 0
    if not (chat or scoring.whole):
        start = common_prefix_length(encode(tokenizer, row["prompt"], options=options), ids)
    labels = [
        token if scored and place >= start else -100
        for place, (token, scored) in enumerate(zip(ids, said, strict=True))
    ]
    weights = [1.0] * len(ids)
    for place, weight in given.items():
        first, last = spans[place]
        weights[first:last] = [weight] * (last - first)
    return _weighed(ids, labels, weights, keep)


def _weighed(ids: list[int], labels: list[int], weights: list[float], keep: bool) -> Row:
    labels = [label if weight else -100 for label, weight in zip(labels, weights, strict=True)]
    made: Row = {"input_ids": ids, "labels": labels}
    return {**made, TOKENS: weights} if keep else made
