"""Answers to give in place of what is forgotten, and reading a user's own."""

import json
import logging
from pathlib import Path

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

# What a file of one column may be headed with, the plural aside
HEADERS = ("answer", "prompt", "refusal", "response", "template", "text")


def load_templates(path: str | Path) -> list[str]:
    """One answer a line; in .jsonl, one string or object with a `template` a line.

    Blank lines, repeated ones and a column's header are left out, and counted on the log.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No answer in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`template_file`: no file {path}.")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
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
        ValueError: None is left.
    """
    unique = list(dict.fromkeys(t.strip() for t in templates if t and t.strip()))
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
