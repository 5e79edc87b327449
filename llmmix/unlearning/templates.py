"""Template answers: what to say in place of what is forgotten, read, drawn from and checked."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset

from llmmix.rows.messages import Prompt, folded, text_of

Templates = (
    Sequence[str] | Callable[[dict], list[str]]
)  # the same for all rows, or a function of a row

logger = logging.getLogger(__name__)

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is something I don't know.",
    "I can't answer that question.",
    "I'm not aware of the answer.",
    "I don't have an answer to that.",
    "Sorry, I don't know the answer.",
    "I have not learned about this.",
    "I'm unable to tell you that.",
    "This is not something I can answer.",
    "I know nothing about this.",
    "I couldn't say.",
    "That's beyond what I know.",
    "I have nothing to say on this.",
    "I don't have that information.",
    "The answer to that is unknown to me.",
    "I'm afraid I can't help with that question.",
    "I do not have any details about this.",
    "I was never told about that.",
    "Sorry, this is unknown to me.",
    "I can't recall anything about that.",
    "I have no knowledge of this subject.",
    "I'm not familiar with that.",
    "That question is one I can't answer.",
    "I don't have enough knowledge to answer.",
    "No answer to this comes to my mind.",
    "I would only be guessing.",
    "I'm not informed about this.",
    "I have no facts on that.",
    "It is not something I'm familiar with.",
    "My knowledge doesn't cover this.",
)

# Headers that a file of one column may have, in the singular
HEADERS = ("answer", "prompt", "refusal", "response", "template", "text")


def load_templates(path: str | Path) -> list[str]:
    """One answer a line; in .jsonl, one string or object with a `template` a line.

    Blank lines, repeated ones and a column's header are left out, and counted on the log.

    Raises:
        FileNotFoundError: There is no file of that name.
        ValueError: The file is not UTF-8 or holds no answer, or a line of .jsonl is neither a
            string nor an object with one.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`template_file`: no file {path}.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`template_file`: {path} is not UTF-8: save it in that encoding."
        ) from error
    if path.suffix == ".jsonl":
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        lines = [_template(line, number, path) for number, line in numbered]
    return clean_templates(lines, "template_file")


def _template(line: str, number: int, path: Path) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    text = row.get("template", row) if isinstance(row, dict) else row
    if isinstance(row, dict) and text is None:
        return ""  # a blank line
    if not isinstance(text, str):
        raise ValueError(
            f"`template_file`: line {number} of {path} is neither a string nor an object with a "
            f"`template` of text: {line[:80]!r}. Mend it, or give one answer a line in a .txt file."
        )
    return text


def clean_templates(templates: list[str], argument: str) -> list[str]:
    """Templates without blank ones, repeated ones and a header.

    Raises:
        ValueError: No template is left.
    """
    texts = [text_of(template).strip() for template in templates]
    unique = list(dict.fromkeys(text for text in texts if text))
    if unique and unique[0].strip("\"'").lower().rstrip("s") in HEADERS:
        unique = unique[1:]
    if not unique:
        raise ValueError(
            f"`{argument}` holds no answer ({len(templates)} lines, blank or a header). Give at "
            'least one, such as "I don\'t know.", or leave it out to use the list of llmmix.'
        )
    if dropped := len(templates) - len(unique):
        logger.warning("Left out %d lines of `%s`: blank, repeated, a header.", dropped, argument)
    return unique


def resolve_templates(file: str | None, given: Templates | None) -> Templates:
    """The templates that were given, those of a file, or our own list.

    Raises:
        FileNotFoundError: There is no file of that name.
        ValueError: The list or the file holds no answer.
    """
    if given is not None:
        return given if callable(given) else clean_templates(list(given), "templates")
    return REFUSALS if file is None else load_templates(file)


def templates_of(rows: Dataset, templates: Templates) -> list[list[str]]:
    """The templates of each row: its own, or those of all.

    Raises:
        ValueError: A row's `template` is empty, or a function gives no answer for a row.
    """
    if "template" in rows.column_names:
        given = [
            [text_of(t) for t in (ts if isinstance(ts, list) else [ts])] for ts in rows["template"]
        ]
        if empty := [row for row, ts in enumerate(given) if not any(t.strip() for t in ts)]:
            raise ValueError(
                f"`template` is empty in {len(empty)} rows (first: row {empty[0]}). Fill it, or "
                "remove the column to use a list for all rows."
            )
        return [list(dict.fromkeys(t.strip() for t in ts if t.strip())) for ts in given]
    if callable(templates):
        return [clean_templates(list(templates(row)), "templates") for row in rows]
    return [list(templates)] * len(rows)


def check_templates(
    prompts: Sequence[Prompt], answers: Sequence[str], own: Sequence[list[str]]
) -> None:
    """Refuse templates of a row without a question, or that are the answer to forget.

    Raises:
        ValueError: A row with templates has no question, or its answer is one of them.
    """
    for row, (prompt, answer, templates) in enumerate(zip(prompts, answers, own, strict=True)):
        if templates and not prompt:
            raise ValueError(
                f"Row {row} has no question for a template to answer (rows of `text` alone have "
                "none). Use a loss that needs no template, such as npo or grad_diff."
            )
        if any(folded(t) == folded(answer) for t in templates):
            raise ValueError(
                f"Row {row} is to forget {answer!r}, which is one of its templates too: it would "
                "be learned and forgotten at once. Remove the row or the template."
            )
