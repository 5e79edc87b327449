r"""Rows of any known shape, read as TRL's: which columns are asked and which answer.

    columns                              read as
    prompt, completion                   prompt and completion
    messages, or conversations           a chat
    the text column                      text
    question, answer                     a user's message and the assistant's
    instruction, input, output           the same; the input follows the instruction
    chosen, rejected                     answers to prompt, to the messages of conversations, to a
                                         question or an instruction, or two whole chats

The first that fits counts. A question or an instruction is a user's message where the tokenizer has
a chat template, else "Question: ...\nAnswer:"; a column `system` stands before it, and before a
chat without a system message. Text in `prompt` and `completion` stays as it stands.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

from trl import extract_prompt

from llmmix.rows.messages import (
    ASKING,
    Prompt,
    UnreadableCell,
    check_answered,
    check_asked,
    check_last_turn,
    in_one_form,
    is_messages,
    messages_of,
    text_of,
)

Row = dict[str, Any]


class Shape(NamedTuple):
    """A known shape of rows.

    Attributes:
        needs: The columns without which it is another.
        takes: Columns that are read where they are there.
        read: (row, has_template) -> the row in TRL's columns, cleaned; `UnreadableCell` where a
            column says nothing.
        told: How such rows are read, for the log; "" for TRL's own.
    """

    needs: tuple[str, ...]
    read: Callable[[Row, bool], Row]
    takes: tuple[str, ...] = ()
    told: str = ""


def sft_shapes(text_field: str = "text") -> tuple[Shape, ...]:
    """The shapes of rows to fine-tune on; the first that fits counts."""
    return (
        Shape(("prompt", "completion"), _completion),
        Shape(("messages",), _chat, ("system",)),
        Shape(("conversations",), _chat, ("system",), "a chat"),
        Shape((text_field,), _Text(text_field)),
        Shape(("question", "answer"), _answer, ("system",), ASKED),
        Shape(("instruction", "output"), _answer, ("input", "system"), ASKED),
    )


def preference_shapes() -> tuple[Shape, ...]:
    """The shapes of rows of preferences; the first that fits counts."""
    both = ("chosen", "rejected")
    return (
        Shape(("prompt", *both), _preference),
        Shape(("conversations", *both), _preference, ("system",), "a chat and two answers to it"),
        Shape(("question", *both), _preference, ("system",), ASKED),
        Shape(("instruction", *both), _preference, ("input", "system"), ASKED),
        Shape(both, _preference),
    )


def answer_shapes() -> tuple[Shape, ...]:
    """The shapes of rows read as a `prompt` and an `answer` of text, as unlearning needs them.

    Of a chat, or a completion of several messages, the assistant's last turn is the answer, and
    what comes before it is the prompt. Text alone has an empty prompt.
    """
    last = "the assistant's last turn and what comes before it"
    answer = partial(_last_turn, read=partial(_answer, parted=False))
    chat = partial(_last_turn, read=_chat)
    return (
        Shape(("prompt", "completion"), partial(_last_turn, read=_completion)),
        Shape(("question", "answer"), answer, ("system",)),
        Shape(("prompt", "gt"), partial(_last_turn, read=partial(_completion, said="gt"))),
        Shape(("prompt", "answer"), partial(_last_turn, read=partial(_completion, said="answer"))),
        Shape(("instruction", "output"), answer, ("input", "system"), ASKED),
        Shape(("messages",), chat, ("system",), last),
        Shape(("conversations",), chat, ("system",), last),
        Shape(("text",), _unasked),
    )


ASKED = "a question and what answers it, in the chat template where there is one"


def shape_of(columns: Collection[str], shapes: Iterable[Shape]) -> Shape | None:
    """The first shape whose columns are all there, or None."""
    return next((shape for shape in shapes if set(shape.needs) <= set(columns)), None)


def asked(question: str, has_template: bool, system: str = "") -> Prompt:
    """A question as it is put to a model.

    Args:
        question: What is asked.
        has_template: Whether the tokenizer has a chat template: then it is a user's message.
        system: What a system message says before it; "" for none.
    """
    if has_template:
        before = [{"role": "system", "content": system}] if system.strip() else []
        return [*before, {"role": "user", "content": question}]
    return f"{system}\n\n" * bool(system.strip()) + f"Question: {question}\nAnswer:"


class Cells:
    """The cells of a row, whose faults name their column."""

    def __init__(self, row: Row):
        self.row = row

    def get(self, column: str, read: Callable[[Any], Any], *checks: Callable[[Any], None]) -> Any:
        """A cell, read and checked.

        Raises:
            UnreadableCell: `read` or a check refuses it; the column is named.
        """
        try:
            value = read(self.row.get(column))
            for check in checks:
                check(value)
        except UnreadableCell as fault:
            raise UnreadableCell(f"`{column}` {fault}") from None
        return value


def _completion(row: Row, has_template: bool, said: str = "completion") -> Row:
    cells = Cells(row)
    prompt = cells.get("prompt", in_one_form, check_asked)
    completion = cells.get(said, in_one_form, check_answered)
    return {
        "prompt": _like(completion, prompt, "user"),
        "completion": _like(prompt, completion, "assistant"),
    }


def _chat(row: Row, has_template: bool) -> Row:
    column = "messages" if "messages" in row else "conversations"
    cells = Cells(row)
    messages = cells.get(column, _as_chat, check_answered, check_last_turn)
    return {"messages": [*_system(cells, messages), *messages]}


class _Text:
    """Reads a row of text alone."""

    def __init__(self, column: str):
        self.column = column

    def __call__(self, row: Row, has_template: bool) -> Row:
        return {self.column: Cells(row).get(self.column, text_of, check_asked)}


def _answer(row: Row, has_template: bool, parted: bool = True) -> Row:
    cells = Cells(row)
    prompt = _question(cells, has_template)
    answer = cells.get("answer" if "question" in row else "output", _last_said, check_answered)
    answer = _parted(prompt, answer) if parted else answer
    return {"prompt": prompt, "completion": _like(prompt, answer, "assistant")}


def _last_turn(row: Row, has_template: bool, read: Callable[[Row, bool], Row]) -> Row:
    made = read(row, has_template)
    if isinstance(made.get("completion"), str):
        return {"prompt": made["prompt"], "answer": made["completion"]}
    messages = made.get("messages") or made["prompt"] + made["completion"]
    column = "messages" if "messages" in made else "completion"
    ends = [i for i, message in enumerate(messages) if message["role"] not in ASKING]
    before, answer = messages[: ends[-1]], messages[ends[-1]]["content"]
    if not answer.strip() or not before:
        raise UnreadableCell(f"the last turn of `{column}` has no text, or nothing comes before it")
    return {"prompt": before, "answer": answer}


def _unasked(row: Row, has_template: bool) -> Row:
    return {"prompt": "", "answer": Cells(row).get("text", text_of, check_asked)}


def _preference(row: Row, has_template: bool) -> Row:
    cells = Cells(row)
    pair = [cells.get(c, in_one_form, check_answered) for c in ("chosen", "rejected")]
    if all(map(_is_whole_chat, pair)):
        before = messages_of(row["prompt"]) if is_messages(row.get("prompt")) else []
        if all(answer[: len(before)] == before for answer in pair):  # the prompt stands in both
            return _two_chats(*pair)
    if "prompt" in row:
        prompt = cells.get("prompt", in_one_form, check_asked)
        prompt = _like(pair[0], prompt, "user")
    elif "conversations" in row:
        prompt = cells.get("conversations", _as_chat, check_asked)
        prompt = [*_system(cells, prompt), *prompt]
    elif "question" in row or "instruction" in row:
        prompt = _question(cells, has_template)
        pair = [_parted(prompt, answer) for answer in pair]
    elif all(isinstance(answer, str) for answer in pair):
        return dict(zip(("chosen", "rejected"), pair, strict=True))  # TRL takes their common start
    else:
        raise UnreadableCell("`chosen` or `rejected` begins with an answer, and there is no prompt")
    chosen, rejected = (_like(prompt, answer, "assistant") for answer in pair)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _two_chats(chosen: list[dict], rejected: list[dict]) -> Row:
    found: Row = dict(extract_prompt({"chosen": chosen, "rejected": rejected}))
    cells = Cells(found)
    for column, check in (
        ("prompt", check_asked),
        ("chosen", check_answered),
        ("rejected", check_answered),
    ):
        cells.get(column, list, check)
    return found


def _question(cells: Cells, has_template: bool) -> Prompt:
    """A question, or an instruction with its input, as it is put to the model."""
    column = "question" if "question" in cells.row else "instruction"
    question = cells.get(column, text_of, check_asked)
    if column == "instruction" and (given := cells.get("input", text_of)).strip():
        question = f"{question}\n\n{given}"
    return asked(question, has_template, cells.get("system", text_of))


def _system(cells: Cells, messages: list[dict]) -> list[dict]:
    """The system message of the column `system`, unless the chat has its own."""
    said = cells.get("system", text_of)
    if not said.strip() or any(message["role"] == "system" for message in messages):
        return []
    return [{"role": "system", "content": said}]


def _parted(prompt: Prompt, answer: Prompt) -> Prompt:
    """An answer that a blank parts from a prompt of text."""
    if isinstance(prompt, str) and isinstance(answer, str) and not answer[:1].isspace():
        return " " + answer
    return answer


def _like(other: Prompt, given: Prompt, role: str) -> Prompt:
    """Text as a message of a role, where what stands beside it is messages."""
    if isinstance(given, str) and not isinstance(other, str):
        return [{"role": role, "content": given}]
    return given


def _as_chat(value: Any) -> list[dict]:
    if value is not None and not isinstance(value, list | dict):
        raise UnreadableCell(f"is of type {type(value).__name__}, not a list of messages")
    return messages_of(value or [])


def _last_said(value: Any) -> str:
    """The text of an answer; of messages the last counts."""
    if is_messages(value):
        said = messages_of(value)
        return said[-1]["content"] if said else ""
    return text_of(value)


def _is_whole_chat(response: Prompt) -> bool:
    return isinstance(response, list) and response[0]["role"] != "assistant"
