"""A YAML file of settings, read as text: `no`, `1e-5`, `012` and 2024-01-01 stay as they stand.

YAML 1.1 would make of them a boolean, a text, an octal number and a date. What they mean depends on
the setting: values.py reads them as flags are read. Inside of mappings no setting says what
is meant: there they mean what they do in JSON, and what could mean two things is refused.
"""

import re
from pathlib import Path
from typing import Any

INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
ENDLESS = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
# What YAML 1.1 takes for a boolean or a number, and JSON and later versions of YAML for text
DOUBTFUL = re.compile(
    r"yes|no|on|off|y|n|[-+]?0[0-7_]+|0[xb][0-9a-f_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?"
    r"|[-+]?[0-9]+(_[0-9]+)+",
    re.IGNORECASE,
)


class Unquoted(str):
    """The text of a scalar that stands without quotes."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The `key: value` pairs of a file: texts, None for null, and lists and mappings of such.

    Raises:
        ValueError: The file cannot be read, is not UTF-8, is no YAML, holds no mapping, or has a
            key that is null or there twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        place = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 (line {place}): save it in that encoding.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    found = parse_yaml(text, str(path))
    if found is None:  # comments alone
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    return found


def parse_yaml(text: str, source: str) -> Any:
    """A text of YAML as `read_yaml` gives it.

    Args:
        text: The text.
        source: How a message names it.

    Raises:
        ValueError: It is no YAML, or has a key that is null or there twice.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{source}{line}: {said}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise ValueError(f"{source} holds an alias that contains itself.") from None


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Scalars as text; a key that is there twice, or null, is an error."""

    def scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        value = str(loader.construct_scalar(node))
        if node.style is not None:
            return value
        return Unquoted(value.replace(".", "", 1) if ENDLESS.fullmatch(value) else value)

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        found: dict = {}
        seen: set = set()
        for key, _ in node.value:
            fault = None
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null"):
                fault = "a key must be a text"
            elif key.value in seen:
                fault = f"the key {key.value!r} is there twice: remove one"
            if fault:
                raise yaml.MarkedYAMLError(problem=fault, problem_mark=key.start_mark)
            seen.add(key.value)
        loader.flatten_mapping(node)  # of `<<: *other`
        for key, value in node.value:
            found[str(key.value)] = loader.construct_object(value, deep=True)
        return found

    for kind in ("str", "int", "float", "bool", "timestamp"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", scalar)
    Loader.add_constructor("tag:yaml.org,2002:value", scalar)
    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


def plain_data(value: Any, *, texts: bool = False) -> Any:
    """What a value of `read_yaml` is in plain types, as JSON would say it.

    Args:
        value: A text, None, or lists and mappings of such.
        texts: Leave the scalars of a mapping as texts, which its fields are.

    Raises:
        ValueError: A scalar without quotes may mean two things, such as `no`.
    """
    if isinstance(value, dict):
        return {
            key: part if texts and isinstance(part, str) else plain_data(part)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [plain_data(entry) for entry in value]
    if not isinstance(value, Unquoted):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if INT.fullmatch(value):
        return int(value)
    if DOUBTFUL.fullmatch(value):
        raise ValueError(
            f"{value} may be a text, or a boolean or number of old YAML: write true or false, or "
            f'a number without these signs, or "{value}" for the text.'
        )
    number = FLOAT.fullmatch(value) or value.lower().lstrip("+-") in ("inf", "nan")
    return float(value) if number else str(value)
