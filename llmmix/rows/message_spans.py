"""Where each message of a chat stands among its tokens, and which of them are scored."""

from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from llmmix.rows.messages import ASKING
from llmmix.rows.prompts import encode
from llmmix.rows.turns import needs_own_turns, turn_spans

Spans = dict[int, tuple[int, int]]  # by message, its first token and the one behind its last


def assistant_parts(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    weighted: list[int],
    options: dict[str, Any],
) -> tuple[list[int], Spans, list[bool]]:
    """Token ids of a chat of which the assistant's turns are scored.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The chat.
        weighted: Numbers of the messages that are asked for.
        options: Passed to `apply_chat_template`.

    Returns:
        (T,) ids; where the assistant's messages stand; (T,) bool, which tokens are in one.

    Raises:
        ValueError: The turns cannot be told apart, or one that is asked for is not scored.
    """
    if needs_own_turns(tokenizer):
        ids, spans = turn_spans(tokenizer, messages, **options)
    else:
        ids, spans = _marked_spans(tokenizer, messages, options)
    if unscored := [place for place in weighted if place not in spans]:
        raise ValueError(
            f"message {unscored[0]} has a `weight`, and the chat begins with it, which is not "
            "scored under this chat template. Take the weight away."
        )
    said = [False] * len(ids)
    for first, last in spans.values():
        said[first:last] = [True] * (last - first)
    return ids, spans, said


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], options: dict[str, Any]
) -> tuple[list[int], Spans]:
    """Tokens of a chat, and its turns as the chat template marks them."""
    template: Any = tokenizer.chat_template
    if not has_generation_markers(template):
        template = get_training_chat_template(tokenizer)
    made: Any = tokenizer.apply_chat_template(
        messages,
        **{"chat_template": template, **options},
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    runs, place = [], 0
    for marked, run in groupby(made["assistant_masks"]):
        first, place = place, place + len(list(run))
        if marked:
            runs.append((first, place))
    answers = [place for place, message in enumerate(messages) if message["role"] not in ASKING]
    if len(runs) != len(answers):
        raise ValueError(
            f"the chat template marks {len(runs)} turns of the assistant, and the chat has "
            f"{len(answers)}, so a `weight` has no turn of its own. Join messages that follow one "
            "another, or give the row a `weight`."
        )
    return made["input_ids"], dict(zip(answers, runs, strict=True))


def written_parts(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    weighted: list[int],
    options: dict[str, Any],
) -> tuple[list[int], Spans, list[bool]]:
    """Token ids of a chat that is scored whole, and all that is written for some of its messages.

    Arguments and results are those of `assistant_parts`.

    Raises:
        ValueError: The template writes first messages otherwise when others follow.
    """
    ids = encode(tokenizer, messages, generation=False, options=options)

    def edge(place: int) -> int:
        if place in (0, len(messages)):
            return len(ids) if place else 0
        before = encode(tokenizer, messages[:place], generation=False, options=options)
        if ids[: len(before)] != before:
            raise ValueError(
                f"the chat template writes the messages before message {place} otherwise when "
                "more follow, so its tokens cannot be told apart. Set `assistant_only_loss=True`, "
                "or take a template that writes each message by itself."
            )
        return len(before)

    return ids, {place: (edge(place), edge(place + 1)) for place in weighted}, [True] * len(ids)
