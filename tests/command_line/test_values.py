"""A value means the same as a flag and in YAML."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest

from llmmix.cli import UsageError, parse_args
from llmmix.command_line.yaml_files import parse_yaml, plain_data
from llmmix.mixing.methods import config_of


class Kind(Enum):
    NO = "no"
    STEPS = "steps"


class Size(Enum):
    SMALL = 1
    LARGE = 2


@dataclass
class Arguments:
    name: str | None = field(default=None)
    count: int = field(default=1)
    rate: float = field(default=1.0)
    switch: bool = field(default=False)
    maybe: bool | None = field(default=None)
    kind: Kind | str = field(default="steps")
    names: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    counts: list[int] | None = field(default=None)
    options_kwargs: dict | str | None = field(default=None)
    size: Size = field(default=1)  # as TRL's parser gives it: the value
    way: Literal["in", 3] = field(default="in")
    path: Path = field(default=Path("here"))
    paths: list[Path] = field(default_factory=list)
    names_or_one: None | str | list[str] = field(default=None)


@pytest.fixture
def parse(tmp_path):
    """The arguments of a YAML text, or of flags."""

    def run(given):
        flags = given
        if isinstance(given, str):
            (tmp_path / "given.yaml").write_text(given, encoding="utf-8")
            flags = ["--config", str(tmp_path / "given.yaml")]
        return parse_args((Arguments,), str(tmp_path / "script.py"), flags)[0]

    return run


SAME = [  # a line of YAML, the value, and the flags that give it too
    ("rate: 1e-5", 1e-5, None),
    ("rate: 1_0.5", 10.5, None),
    ("rates: [1e-1, 9e-1]", [0.1, 0.9], ["1e-1", "9e-1"]),
    ("rates: 1e-1", [0.1], ["1e-1"]),
    ("counts: [010, 0]", [10, 0], ["010", "0"]),
    ("count: 012", 12, None),
    ("count: '7'", 7, None),
    ("name: no", "no", None),
    ("name: on", "on", None),
    ("name: 2024-01-01", "2024-01-01", None),
    ("name: 1e5", "1e5", None),
    ("name: 007", "007", None),
    ("name: 12:30:15", "12:30:15", None),
    ("name: 0x1F", "0x1F", None),
    ("name: 'null'", "null", None),
    ("name: ~/rows", os.path.expanduser("~/rows"), None),
    ("names: [no, 1, 2.50, 1:30]", ["no", "1", "2.50", "1:30"], ["no", "1", "2.50", "1:30"]),
    ("names_or_one: no", "no", None),
    ("switch: yes", True, None),
    ("switch: on", True, None),
    ("switch: 'no'", False, None),
    ("maybe: off", False, None),
    ("kind: no", "no", None),
    ("size: 2", 2, None),
    ("way: 3", 3, None),
    ("path: a/b", Path("a/b"), None),
    ("paths: [a, 1]", [Path("a"), Path("1")], ["a", "1"]),
    (
        "options_kwargs: {a: 1e-1, b: 2, c: true, d: null, e: text, f: 'no', g: [1, 2.5]}",
        {"a": 0.1, "b": 2, "c": True, "d": None, "e": "text", "f": "no", "g": [1, 2.5]},
        ['{"a": 1e-1, "b": 2, "c": true, "d": null, "e": "text", "f": "no", "g": [1, 2.5]}'],
    ),
    ('options_kwargs: \'{"a": "1"}\'', {"a": "1"}, ['{"a": "1"}']),
    ("options_kwargs: {a: 2024-01-01}", {"a": "2024-01-01"}, ['{"a": "2024-01-01"}']),
]


@pytest.mark.parametrize(("line", "value", "flags"), SAME, ids=lambda part: str(part))
def test_yaml_and_flags_mean_the_same(line, value, flags, parse):
    key, _, text = line.partition(": ")
    found = getattr(parse(line), key)
    assert found == value and type(found) is type(value)
    assert getattr(parse([f"--{key}", *(flags or [text.strip("'")])]), key) == value


def test_null_is_for_what_may_be_none(parse):
    assert parse("name: x").name == "x" and parse("name: null").name is None
    assert parse("counts:").counts is None
    with pytest.raises(UsageError, match="`count` in .*given.yaml must have a value, got null"):
        parse("count: ~")


def test_lists_may_stand_where_a_flag_takes_one(parse):
    assert parse("names_or_one: [a, 1]").names_or_one == ["a", "1"]
    assert parse("names: []").names == []


@pytest.mark.parametrize("text", ["no", "ON", "y", "012", "0x1f", "1:30", "1_000"])
def test_what_could_mean_two_things_inside_a_mapping_is_refused(text, parse):
    with pytest.raises(UsageError, match=f"`options_kwargs` in .*given.yaml {text} may be a text"):
        parse(f"options_kwargs: {{a: {text}}}")
    assert parse(f"options_kwargs: {{a: '{text}'}}").options_kwargs == {"a": text}


def test_aliases_and_merged_keys_are_read():
    text = "a: &x {r: 1e-2, s: 1}\nb: {<<: *x, s: .5}\nc: -.inf"
    found = plain_data(parse_yaml(text, "text"))
    assert found["b"] == {"r": 0.01, "s": 0.5} and found["c"] == float("-inf")


def test_options_of_a_mixing_method_are_read_as_flags():
    found = config_of("skillit", ["eta=1e-1", "window=5", "graph={a: {a: 1e-1}}"])
    assert (found.eta, found.window, found.graph) == (0.1, 5, {"a": {"a": 0.1}})
    assert config_of("odm", ["full_information=null", "interval=3"]).full_information is None
    with pytest.raises(ValueError, match="odm has no 'windo', but update"):
        config_of("odm", ["windo=1"])


def test_letters_that_a_terminal_lacks_end_no_run(tmp_path):
    """Nor do they keep a file of settings from being read, in a locale without them."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom llmmix.cli import parse_args\n"
        "@dataclass\nclass A:\n    name: str = ''\n"
        "print(ascii(parse_args((A,), __file__)[0].name), '\\u00df')\n"
    )
    (tmp_path / "g.yaml").write_text("name: Gr\u00f6\u00dfe\n", encoding="utf-8")
    argv = [sys.executable, "-m", "llmmix.cli", "run", "mine.py", "--config", "g.yaml"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(argv, cwd=tmp_path, env={**os.environ, **plain}, capture_output=True)
    assert done.stdout == b"'Gr\\xf6\\xdfe' ?\n", done.stderr
