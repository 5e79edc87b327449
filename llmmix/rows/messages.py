"""What a cell of a row says: text, or a chat's messages, each in one form.

Files of others hold numbers and dates where text is meant, a null beside tool calls, content in
parts, and the speaker under another name. All of it is read here, for every trainer and evaluation.
"""

import json
import unicodedata
from collections.abc import Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

Prompt = str | list[dict[str, Any]]  # text, or messages

# Names of who speaks in ShareGPT's rows and their kin
SPEAKERS = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "function_call": "assistant",
    "observation": "tool",
}
READ_KEYS = ("from", "value", "role", "content")
ASKING = ("system", "developer", "user", "tool")  # any other role answers


class UnreadableCell(ValueError):
    """A cell says nothing that can be trained on; the message ends a sentence about its column."""


def text_of(value: Any) -> str:
    """Text as it stands, a number or date as it is written, and "" for a null.

    A whole number has no point: a column of whole numbers with a blank cell loads as fractions. A
    date has no time: JSON's dates load with midnight.

    Raises:
        UnreadableCell: The value is a list, an object or the like.
    """
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime) and value.time() == time():
        return value.date().isoformat()
    if isinstance(value, int | float | Decimal | date | time):
        return str(value)
    raise UnreadableCell(f"is of type {type(value).__name__} where one text is wanted")


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages with a `role` and a `content` of text; what else they hold is kept.

    `from` and `value` are read as `role` and `content`, a null content is "", parts of text are
    joined, and a message by itself is a chat of one.

    Raises:
        UnreadableCell: A message is no object or has no role, or its content has parts that are no
            text.
    """
    given = [value] if isinstance(value, dict) else value
    return [_message(message) for message in given]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UnreadableCell(
            f"has a message of type {type(message).__name__}, not role and content"
        )
    role = message.get("role") or message.get("from")
    if not role:
        raise UnreadableCell("has a message without a `role`")
    role = SPEAKERS.get(role, role)
    content = message.get("content")
    content = message.get("value") if content is None else content
    # A key of other messages is null in this one, and templates ask whether it is there
    rest = {k: v for k, v in message.items() if v is not None and k not in READ_KEYS}
    return {"role": role, "content": _content(content), **rest}


def _content(content: Any) -> str:
    if not isinstance(content, list):
        return text_of(content)
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        return text_of(part)
    if part.get("type", "text") != "text":
        raise UnreadableCell(f"has a message with a part of type {part['type']!r}, not text")
    return text_of(part.get("text"))


def is_messages(value: Any) -> bool:
    """Whether a cell holds messages, or one message by itself."""
    if isinstance(value, dict):
        return "role" in value or "from" in value
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def in_one_form(value: Any) -> Prompt:
    """A cell's text or messages.

    Raises:
        UnreadableCell: It is neither.
    """
    return messages_of(value) if is_messages(value) else text_of(value)


def check_asked(prompt: Prompt) -> None:
    """Refuse a prompt that asks nothing.

    Raises:
        UnreadableCell: It has no text.
    """
    if not _says_something([prompt] if isinstance(prompt, str) else prompt):
        raise UnreadableCell("is empty")


def check_answered(response: Prompt) -> None:
    """Refuse a response in which nobody answers.

    Raises:
        UnreadableCell: It has no text, or no message of the assistant with any.
    """
    answers: Sequence[Any] = [response]
    if not isinstance(response, str):
        answers = [message for message in response if message["role"] not in ASKING]
        if response and not answers:
            raise UnreadableCell("has no assistant turn")
    if not _says_something(answers):
        raise UnreadableCell("is empty")


def check_last_turn(messages: list[dict[str, Any]]) -> None:
    """Refuse a chat that ends in an empty turn of the assistant.

    Raises:
        UnreadableCell: It does.
    """
    if messages[-1]["role"] not in ASKING and not _says_something(messages[-1:]):
        raise UnreadableCell("ends in an empty turn of the assistant")


def _says_something(said: Sequence[Any]) -> bool:
    return any(
        part.strip() if isinstance(part, str) else part.get("tool_calls") or part["content"].strip()
        for part in said
    )


def folded(text: str) -> str:
    """A text without what does not tell texts apart: case, white space, and Unicode's forms."""
    text = unicodedata.normalize("NFC", text)
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


def spoken(prompt: Prompt) -> str:
    """All that a prompt says, its tool calls included, in one text."""
    if isinstance(prompt, str):
        return prompt
    said = []
    for message in messages_of(prompt):
        said.append(message["content"])
        if calls := message.get("tool_calls"):
            said.append(json.dumps(calls, sort_keys=True, default=str, ensure_ascii=False))
    return "\n".join(said)
