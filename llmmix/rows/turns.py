"""The assistant's turns of a chat, told apart under any chat template.

TRL masks them where the template marks them with `{% generation %}`, or is one of those that it
knows how to mark. For other templates, SmolLM2's among them, a turn is what the template adds to
the messages before it:

    tokens of messages[:i], the assistant's turn opened | the turn and its end | ...

This holds where a chat's first messages are written alike whatever follows them, which is checked.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, get_training_chat_template
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import common_prefix_length

from llmmix.processes import warn_once
from llmmix.rows.messages import ASKING
from llmmix.rows.prompts import encode, template_options


def assistant_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them the assistant says, ends of turns included.

    Arguments and errors are those of `turn_spans`.

    Returns:
        (T,) ids and (T,) bool.
    """
    ids, spans = turn_spans(tokenizer, messages, **options)
    said = [False] * len(ids)
    for start, stop in spans.values():
        said[start:stop] = [True] * (stop - start)
    return ids, said


def turn_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Token ids of a chat, and where among them each message of the assistant stands.

    What a template writes behind the end of a turn, such as a newline, is not said by the
    assistant, and neither is a turn that opens the chat.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The chat.
        **options: Passed to `apply_chat_template`, such as `tools`.

    Returns:
        (T,) ids; by number of the message, its first token and the one behind its last.

    Raises:
        ValueError: The template writes first messages otherwise when others follow.
    """

    def ids_of(first: list[dict], opened: bool = False) -> list[int]:
        return encode(tokenizer, first, generation=opened, options=options)

    ids = ids_of(messages)
    spans: dict[int, tuple[int, int]] = {}
    ends = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}
    done = 0
    for i, message in enumerate(messages):
        if message["role"] in ASKING or i == 0:
            continue
        start = common_prefix_length(ids_of(messages[:i], opened=True), ids)
        through = ids_of(messages[: i + 1])
        if start < done or ids[: len(through)] != through:
            raise ValueError(
                f"`assistant_only_loss`: the chat template writes message {i} otherwise when more "
                "follow, so the assistant's turns cannot be told apart. Give `prompt` and "
                "`completion` (`--stepwise true` of dco makes them), or a template that marks the "
                "turns with {% generation %}."
            )
        stop = done = len(through)
        closed = [place for place in range(start, stop) if ids[place] in ends]
        if closed and not str(tokenizer.decode(ids[closed[-1] + 1 : stop])).strip():
            stop = closed[-1] + 1
        spans[i] = (start, stop)
    return ids, spans


def needs_own_turns(tokenizer: Any) -> bool:
    """Whether a tokenizer's template neither marks the assistant's turns nor is known to TRL."""
    template = getattr(tokenizer, "chat_template", None)
    text_alone = isinstance(tokenizer, PreTrainedTokenizerBase)
    if not text_alone or template is None or has_generation_markers(template):
        return False
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return True
    return False


def tokenize_turns(
    rows: Dataset | IterableDataset,
    argument: str,
    args: SFTConfig,
    tokenizer: Any,
) -> Dataset | IterableDataset:
    """Chat rows as `input_ids` and `labels`, -100 where the assistant does not speak.

    Of `prompt` and `completion` the turns of the completion count, unless `completion_only_loss` is
    False. Other rows are returned as they are, and so are all where TRL masks the turns itself.

    Args:
        rows: Rows of TRL's columns.
        argument: The name under which they were given, for the progress bar.
        args: `assistant_only_loss`, `completion_only_loss`, `chat_template_path` and
            `dataset_num_proc` are read.
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: `assistant_turns` refuses a row.
    """
    first = next(iter(rows))
    chat = isinstance(first.get("messages", first.get("completion")), list)
    if not args.assistant_only_loss or "input_ids" in first or not chat:
        return rows
    if args.chat_template_path is not None:
        if not Path(args.chat_template_path).is_file():
            return rows  # TRL takes the template of another model, and its tokens
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
    if not needs_own_turns(tokenizer):
        return rows
    whole = "messages" in first or args.completion_only_loss is False
    turns = partial(_labelled, tokenizer=tokenizer, whole=whole)
    if isinstance(rows, Dataset):
        return rows.map(turns, num_proc=args.dataset_num_proc, desc=f"Finding turns in {argument}")
    return rows.map(turns)


def _labelled(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, whole: bool
) -> dict[str, list[int]]:
    options = template_options(row)
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    ids, said = assistant_turns(tokenizer, messages, **options)
    start = 0
    if not whole:
        start = common_prefix_length(encode(tokenizer, row["prompt"], options=options), ids)
    labels = [
        token if spoken and place >= start else -100
        for place, (token, spoken) in enumerate(zip(ids, said, strict=True))
    ]
    return {"input_ids": ids, "labels": labels}


@contextmanager
def turns_found(args: SFTConfig, rows: Dataset | IterableDataset | None) -> Iterator[None]:
    """While TRL makes a trainer: rows with tokens and labels need no mask of the assistant's turns.

    TRL would look for chats in them, and refuse the template.

    Args:
        args: The trainer's settings; `assistant_only_loss` is off for the time.
        rows: The training rows.
    """
    given = args.assistant_only_loss
    if given and rows is not None and "input_ids" in (next(iter(rows), None) or ()):
        args.assistant_only_loss = False
    try:
        yield
    finally:
        args.assistant_only_loss = given


WHOLE_CHATS = (
    "whole chats, the user's turns included. To score the assistant alone, set "
    "`assistant_only_loss=True`, or give `prompt` and `completion`"
)


def log_scored(given: Any, prepared: Any) -> None:
    """Log which share of the tokens a loss is of, and who says them.

    Args:
        given: The training rows that a trainer was given.
        prepared: The same with `labels`, -100 where nothing is scored. Of other rows, and of a
            stream, nothing is said.
    """
    if not isinstance(prepared, Dataset) or "labels" not in prepared.column_names:
        return
    scored = total = 0
    for batch in prepared.select_columns("labels").with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        total += len(labels)
        scored += int((labels != -100).sum())
    some = scored < total
    columns = set(given.column_names)
    if "messages" in columns and some and _begins_scored(given):
        what = "all but messages of weight 0. To score the assistant alone, set "
        what += "`assistant_only_loss=True`"
    elif "messages" in columns:
        what = "the assistant's turns" if some else WHOLE_CHATS
    elif {"prompt", "completion"} <= columns:
        what = "the completions" if some else "prompts and completions"
    else:
        what = "as the rows' labels say" if some else "whole texts"
    warn_once(f"Scored: {scored / max(total, 1):.0%} of {total:,} tokens, {what}.")


def _begins_scored(given: Any) -> bool:
    """Whether a chat with labels is scored from its first token on, as no chat of turns is."""
    if "labels" not in given.column_names:
        return False
    return any(row["labels"][0] != -100 for row in given.select_columns("labels") if row["labels"])
