"""Prompts and answers as tokens: the same in training, sampling and scoring.

    encode             the prompt that is sampled from
    encode_completion  prompt and completion in one sequence, tokenized together
    encode_answer      the same of a question and its answer, parted by a blank and closed

TRL tokenizes the rows of its trainers so too: text as it reads, the completion beginning where the
tokens of prompt and completion leave those of the prompt. What a row asks of the chat template, its
`tools` and `chat_template_kwargs`, is in `template_options`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from llmmix.processes import say_once
from llmmix.rows.messages import Prompt as Prompt

Options = Mapping[str, Any]  # of a chat template
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


class Encoded(NamedTuple):
    """A prompt and an answer in one sequence.

    Attributes:
        ids: Token ids of the prompt and of the answer.
        prompt_length: How many of them are the prompt's, which are not scored.
    """

    ids: list[int]
    prompt_length: int


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row asks of the chat template: its `tools` and `chat_template_kwargs`, if any.

    Args:
        row: A row; `tools` may be a list or JSON text, `chat_template_kwargs` a dict or JSON text.

    Raises:
        ValueError: One of them is text that is no JSON, or of another type.
    """
    tools = _parsed(row.get("tools"), "tools", list)
    given = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs", dict)
    return ({"tools": tools} if tools is not None else {}) | (given or {})


def _parsed(given: Any, column: str, kind: type) -> Any:
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{column}` is no JSON ({error}): {given[:80]!r}.") from error
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"`{column}` must be a {kind.__name__} or its JSON, got {type(value).__name__}."
        )
    return value


def options_of(rows: Dataset) -> list[dict[str, Any]]:
    """`template_options` of each row of a dataset."""
    names = [name for name in TEMPLATE_COLUMNS if name in rows.column_names]
    if not names:
        return [{} for _ in range(len(rows))]
    return [template_options(row) for row in rows.select_columns(names)]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: Prompt | list[int],
    *,
    generation: bool = True,
    options: Options | None = None,
) -> list[int]:
    """Token ids of text, or of messages under the chat template.

    Text keeps the token that the tokenizer puts at its beginning, once, and none of those that some
    tokenizers put at its end: they would close a prompt before it is answered. Messages have the
    special tokens of their template alone.

    Args:
        tokenizer: The model's tokenizer, with a chat template where `text` is messages.
        text: Plain text, messages, or token ids, which are taken as they are.
        generation: Whether the assistant's turn is opened at the end of messages. With the option
            `continue_final_message` the last message is left open in its place.
        options: What the row asks of the chat template; see `template_options`.

    Raises:
        ValueError: The tokenizer has no chat template, or the template refuses the messages.
    """
    if isinstance(text, str):
        return _encode_text(tokenizer, text)
    if text and isinstance(text[0], int):
        return text
    messages, options = cast(list[dict[str, Any]], text), dict(options or {})
    if options.get("continue_final_message"):
        generation = False
    if tokenizer.chat_template is None and options.get("chat_template") is None:
        raise ValueError(
            "The prompt is chat messages, and the tokenizer has no chat template. Give text, or a "
            "tokenizer with a `chat_template`."
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, **{"add_generation_prompt": generation, **options}, tokenize=True
        )
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"The chat template refuses messages of the roles {roles}: {error}"
        ) from error
    return encoded["input_ids"]


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The tokens are typed as one of seven types, depending on the arguments
    ids: Any = tokenizer(text)["input_ids"]
    before, after = _special_ends(tokenizer)
    bos = tokenizer.bos_token
    if bos and before == [tokenizer.bos_token_id] and text.startswith(bos):
        ids = ids[1:]  # text that begins with it has it already
    return ids[: len(ids) - after]


def _special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The tokens that the tokenizer puts before a text, and how many it puts behind it."""
    whole: Any = tokenizer("a")["input_ids"]
    bare: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], len(whole) - start - len(bare)
    return [], 0


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completion: Prompt,
    *,
    options: Options | None = None,
) -> Encoded:
    """Token ids of a prompt and its completion, as TRL's trainers tokenize a row.

    Text is joined as it is and closed by one end-of-sequence token. A chat ends where its last turn
    does: a newline that the template writes behind it is never sampled, and left out.

    Args:
        tokenizer: The tokenizer, with a chat template where messages are given.
        prompt: Text or messages.
        completion: Text or messages; text that follows messages is the assistant's.
        options: What the row asks of the chat template; see `template_options`.

    Raises:
        ValueError: The prompt is text and the completion messages; or `encode` refuses them.
    """
    start = encode(tokenizer, prompt, options=options) if prompt else []
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError(
                "The prompt is text and the completion messages: give both as text, or both as "
                "messages."
            )
        ids = _closed(tokenizer, encode(tokenizer, prompt + completion))
    else:
        given = dict(options or {})
        said = _conversation(prompt, completion, given)
        given.pop("continue_final_message", None)
        ids = encode(tokenizer, said, generation=False, options=given)
    length = common_prefix_length(start, ids)
    if length < len(start):
        say_once(
            "Some prompts alone have other tokens at their end than before their answers. Answers "
            "are scored from where the two part, as in TRL's trainers, and sampled behind the "
            "whole prompt. End prompts where a token ends, without a blank, or use a chat "
            "template that renders both alike."
        )
    if not isinstance(prompt, str):
        ids = ids[: turn_end(tokenizer, ids, length)]
    return Encoded(ids, length)


def _conversation(
    prompt: list[dict[str, Any]], completion: Any, options: Options
) -> list[dict[str, Any]]:
    """The messages of a prompt and a completion; an open last message goes on with the latter."""
    is_text = isinstance(completion, str)
    said = [{"role": "assistant", "content": completion}] if is_text else list(completion)
    if said and options.get("continue_final_message"):
        first, *said = said
        return [
            *prompt[:-1],
            {**prompt[-1], "content": prompt[-1]["content"] + first["content"]},
            *said,
        ]
    return [*prompt, *said]


def _closed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    *,
    include_eos: bool = True,
    options: Options | None = None,
) -> Encoded:
    """Token ids of a prompt and its answer, closed once.

    A blank is put between a prompt of text and its answer, unless either brings white space. The
    last token is the one that ends the assistant's turn in the chat template, and the
    end-of-sequence token elsewhere; what a template writes behind it is left out. Where the prompt
    is empty, the first token counts as the prompt, since nothing predicts it.

    Args:
        tokenizer: The tokenizer, with a chat template where `prompt` is messages.
        prompt: Text or messages.
        answer: Text.
        include_eos: Whether to score the token that ends the answer.
        options: What the row asks of the chat template; see `template_options`.

    Raises:
        ValueError: `encode` refuses the messages.
    """
    if isinstance(prompt, str) and prompt and not (prompt[-1].isspace() or answer[:1].isspace()):
        answer = " " + answer
    ids, length = encode_completion(tokenizer, prompt, answer, options=options)
    if len(ids) > length and ids[-1] in end_tokens(tokenizer):
        ids = ids if include_eos else ids[:-1]
    elif include_eos:
        ids = _closed(tokenizer, ids)
    return Encoded(ids, max(length, 1))


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special tokens of a tokenizer, one of which ends a turn or a text."""
    return _special_tokens(tokenizer, len(tokenizer), tokenizer.eos_token_id)


@lru_cache(maxsize=8)  # reading the tokens of some tokenizers takes milliseconds, for each row
def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, size: int, end: int | None
) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special}
    return frozenset(special if end is None else special | {end})


def turn_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int = 0) -> int:
    """How many tokens a chat has up to the one that ends its last turn, that one included.

    Behind the last turn's words a template writes special tokens and white space alone. The first
    special token among them ends the turn: sampling stops there.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids.
        start: Where the words may begin.

    Returns:
        The number; all of them where no special token stands at the end.
    """
    special = end_tokens(tokenizer)
    end = at = len(ids)
    while at > start:
        at -= 1
        if ids[at] in special:
            end = at + 1
        elif str(tokenizer.decode([ids[at]])).strip():
            break
    return end


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which sampling ends a completion: the model's own, and the tokenizer's."""
    stop = model.generation_config.eos_token_id
    stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
    return {*stop, tokenizer.eos_token_id} - {None}


def check_turn_end(
    tokenizer: PreTrainedTokenizerBase, stop: Collection[int], options: Options | None = None
) -> None:
    """Say once where sampling would run on behind the assistant's turn of the chat template.

    Args:
        tokenizer: The tokenizer; without a chat template, nothing is said.
        stop: The tokens at which sampling ends.
        options: What rows ask of the chat template.
    """
    if tokenizer.chat_template is None:
        return
    asked = [{"role": "user", "content": "a"}]
    try:
        ids, _ = encode_completion(tokenizer, asked, "b", options=options)
    except ValueError:
        return  # a template for messages of another kind
    if not ids or ids[-1] in stop:
        return
    end = tokenizer.decode(ids[-1:]) if ids[-1] in end_tokens(tokenizer) else None
    say_once(
        (
            "The chat template ends the assistant's turn with no special token"
            if end is None
            else f"The chat template ends the assistant's turn with {end!r}, which is no stop token"
        )
        + ": sampling runs on behind it. Set the `eos_token` of the tokenizer, or "
        "`eos_token_id` of the model's generation config."
    )
