"""What the value of a setting means, written as a flag or in a YAML file: the same.

A flag is text, and so is a scalar of YAML (yaml_files.py): `text_reader` turns both into the
type that the dataclass declares. Mappings hold what JSON can say, as a JSON text or as YAML.
"""

import dataclasses
import difflib
import json
import os
import types
import typing
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection
from enum import Enum
from typing import Any

from llmmix.command_line.yaml_files import parse_yaml, plain_data

TRUE, FALSE = ("yes", "true", "t", "y", "1", "on"), ("no", "false", "f", "n", "0", "off")
OF_A_FILE = {"deepspeed", "fsdp_config", "accelerator_config"}  # a mapping, or the path of one
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16", "float64", "half", "float", "double"),
    "lora_task_type": ("CAUSAL_LM",),
    "torch_compile_mode": (
        *("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    ),
    "include_num_input_tokens_seen": ("true", "false", "all", "non_padding", "no"),
}
WORDS = {"pad_to_multiple_of": ("auto", "none", "null")}  # what stands beside a whole number


def hints_of(dataclass_types: Collection[type]) -> dict[str, tuple]:
    """The types that each field takes, by its name."""
    found = {}
    for kind in dataclass_types:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            several = typing.get_origin(hint) in (typing.Union, types.UnionType)
            found[field.name] = typing.get_args(hint) if several else (hint,)
    return found


def text_reader(name: str, hints: tuple, choices: Collection | None = None) -> Callable:
    """What turns a text into a value of a field, or into an entry of its list.

    Args:
        name: Name of the field.
        hints: The types that the field takes, as `hints_of` gives them.
        choices: The values that there are; None for any.

    Returns:
        A function of a text, which raises `ArgumentTypeError` for one that means nothing.
    """
    lists = [hint for hint in hints if typing.get_origin(hint) is list]
    kinds = typing.get_args(lists[0]) if lists and str not in hints else hints
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if choices is None:
        choices = [entry.value for entry in enums[0]] if enums else CHOICES.get(name)

    def read(text: str) -> Any:
        value = _read(name, text, kinds)
        if choices is None:
            return value
        meant = {str(choice): choice for choice in choices}
        if str(value) not in meant and str(value).lower() not in meant:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1)
            shown = ", ".join(map(str, choices)) if len(choices) <= 12 else "those of `--help`"
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentTypeError(f"must be one of {shown}, got {text!r}{hint or '.'}")
        return meant.get(str(value), value)

    return read


def is_plain(hints: tuple) -> bool:
    """Whether `text_reader` knows every type that a field takes; it does not know `Path`."""
    kinds = [part for kind in hints for part in (typing.get_args(kind) or (kind,))]
    return all(
        kind in (str, int, float, bool, dict, Any, type(None))
        or not isinstance(kind, type)
        or issubclass(kind, Enum)
        or dataclasses.is_dataclass(kind)
        for kind in kinds
    )


def _read(name: str, text: str, kinds: tuple) -> Any:
    if "\0" in text:
        raise ArgumentTypeError(f"must be a text without null characters, got {text!r}.")
    if any(kind is dict or typing.get_origin(kind) is dict for kind in kinds):
        return _mapping(name, text)
    if bool in kinds and (str not in kinds or text.lower() in TRUE + FALSE):
        if text.lower() not in TRUE + FALSE:
            raise ArgumentTypeError(f"must be true or false, got {text!r}.")
        return text.lower() in TRUE
    for kind, what in ((int, "a whole number"), (float, "a number")):
        if kind not in kinds or text in WORDS.get(name, ()):
            continue
        try:
            return kind(text)
        except ValueError:
            words = "".join(f" or {word!r}" for word in WORDS.get(name, ()))
            raise ArgumentTypeError(f"must be {what}{words}, got {text!r}.") from None
    if str not in kinds and any(map(dataclasses.is_dataclass, kinds)):
        raise ArgumentTypeError(f"is set in a YAML file, as a mapping; got {text!r}.")
    return os.path.expanduser(text) if text.startswith("~") else text


def _mapping(name: str, text: str) -> dict | str:
    if name in OF_A_FILE and not text.lstrip().startswith("{"):
        return os.path.expanduser(text)
    try:
        found = json.loads(text, object_pairs_hook=_distinct)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        why = f" ({found})" if isinstance(found, ValueError) else ""
        raise ArgumentTypeError(f"""must be a mapping, such as '{{"a": 1}}', got {text!r}{why}.""")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key twice: {', '.join(key for key, _ in pairs)}")
    return found


def value_of(name: str, text: str, hints: tuple) -> Any:
    """The value of a field from a text, which may be a list or mapping of YAML on one line.

    Raises:
        ArgumentTypeError: The field takes no such value.
        ValueError: The text is no YAML.
    """
    value = (
        parse_yaml(text, "has a value that is no YAML")
        if text.lstrip().startswith(("{", "["))
        else text
    )
    if isinstance(value, str):
        return None if value == "null" else text_reader(name, hints)(value)
    return plain_data(value)


def from_yaml(value: Any, hints: tuple, read: Callable[[str], Any]) -> Any:
    """The value of a field from what `read_yaml` gave.

    Args:
        value: A text, None, or lists and mappings of such.
        hints: The types that the field takes.
        read: What `text_reader` returns for the field.

    Raises:
        ArgumentTypeError: The field takes no such value.
    """
    is_list = any(hint is list or typing.get_origin(hint) is list for hint in hints)
    if value is None:
        if type(None) in hints:
            return None
        raise ArgumentTypeError("must have a value, got null; leave the key out for the default.")
    if isinstance(value, dict):
        if any(hint is dict or typing.get_origin(hint) is dict for hint in hints):
            return plain_data(value)
        if any(dataclasses.is_dataclass(hint) for hint in hints):
            return plain_data(value)
        raise ArgumentTypeError(f"takes no mapping, got {_shown(value)}.")
    if isinstance(value, list):
        if not is_list:
            raise ArgumentTypeError(f"takes one value, got the list {_shown(value)}.")
        return [_entry(entry, hints, read) for entry in value]
    # One value of a list may be written without brackets, as on the command line
    return [read(str(value))] if is_list and str not in hints else read(str(value))


def _entry(entry: Any, hints: tuple, read: Callable[[str], Any]) -> Any:
    kinds = [kind for hint in hints for kind in typing.get_args(hint)]
    if isinstance(entry, dict) and any(map(dataclasses.is_dataclass, kinds)):
        return plain_data(entry, texts=True)
    if isinstance(entry, str):
        return read(str(entry))
    raise ArgumentTypeError(f"must hold one value in each place of its list, got {_shown(entry)}.")


def _shown(value: Any) -> str:
    """A value of YAML in one short line, as JSON."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:76]} ..."
