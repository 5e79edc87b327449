"""The flags of a script: TRL's parser, over YAML files, with a word for each mistake."""

import argparse
import copy
import dataclasses
import difflib
import functools
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

from llmmix.launching import UsageError
from llmmix.scripts import command_of, summary_of

logger = logging.getLogger(__name__)

UPSTREAM = ("trl", "transformers")  # whose options come second in --help, but for these:
NAMED = (
    *("model_name_or_path", "dataset_name", "dataset_config", "output_dir", "use_peft"),
    "resume_from_checkpoint",
)
RESUME = (
    "auto: go on from the newest complete checkpoint, and start where there is none. true: refuse "
    "to start. Or a checkpoint's folder. By default the run starts."
)
WITH_ADAPTER = "with_adapter"  # in a YAML file: what `--use_peft` takes in place of the rest of it


def parse_args(
    dataclass_types: tuple[type, ...], script: str, argv: list[str] | None = None
) -> tuple[Any, ...]:
    """Parse a script's flags with TRL's parser, over its own YAML and the user's `--config`.

    Later wins: the dataclass's default, `SCRIPT.yaml` beside the script, `--config`, the flags.
    With `--use_peft` the settings under a file's `with_adapter` win over the others of that file.

    Args:
        dataclass_types: The dataclasses whose fields are the flags.
        script: The script's `__file__`.
        argv: The flags; those of the process by default.

    Returns:
        One instance of each dataclass.

    Raises:
        UsageError: A key or flag names no field (the nearest one is suggested), or `--config` names
            no file or one that holds no mapping; or a value is NaN, or of another type.
    """
    from trl import TrlParser

    # TRL 1.16 sets a flag that transformers 5.23 has renamed; the user can do nothing about it
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    path = Path(script)
    # Any: TRL's own type variable takes no dataclass in general
    parser: Any = TrlParser(
        dataclass_types,  # type: ignore[arg-type]
        prog=path.stem,
        usage=f"{command_of(path)} [--config FILE.yaml] [flags]",
        description=summary_of(path),
        formatter_class=functools.partial(_Help, first=_own_options(dataclass_types)),
        allow_abbrev=False,
    )
    parser.error = _refuse
    # --config is taken here and not by TRL's parser, so that a mistake in it is named
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--config")
    given, argv = ours.parse_known_args(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for kind in dataclass_types for f in dataclasses.fields(kind)}
    defaults = path.with_suffix(".yaml")
    files = filter(None, [defaults if defaults.exists() else None, given.config])
    layers = [_read_yaml(Path(file), fields) for file in files]
    for settings, _ in layers:
        parser.set_defaults_with_config(**settings)
    values, rest = parser.parse_known_args(argv)
    if getattr(values, "use_peft", False):
        values = _fit_to_adapter(parser, layers, argv, values)
    flags = [flag[2:].partition("=")[0] for flag in rest if flag.startswith("--")]
    _check_keys(flags, fields, "the command line")
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)!r} on the command line.")
    for name, value in vars(values).items():
        if any(isinstance(x, float) and math.isnan(x) for x in _listed(value)):
            raise UsageError(f"`{name}` must be a number, got NaN.")
    # A file of more flags that lies in the current folder is not for us
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _fit_to_adapter(
    parser: Any, layers: list[tuple[dict, dict]], argv: list[str], plain: argparse.Namespace
) -> argparse.Namespace:
    """The flags' values once what each file says of adapters has won over the rest of that file."""
    for settings, with_adapter in layers:
        parser.set_defaults_with_config(**{**settings, **with_adapter})
    values, _ = parser.parse_known_args(argv)
    for name in sorted({name for _, with_adapter in layers for name in with_adapter}):
        before, after = getattr(plain, name), getattr(values, name)
        if after != before and os.environ.get("RANK", "0") == "0":
            logger.warning(
                "With an adapter `%s` is %s, in place of %s; a value that you give wins.",
                name,
                after,
                before,
            )
    return values


def _refuse(message: str) -> NoReturn:
    raise UsageError(message)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """What a script adds to TRL comes first; each option is written once, each default told once.

    Args:
        prog: Name of the program.
        first: Names of the options to show first.
    """

    def __init__(self, prog: str, first: Collection[str] = ()):
        super().__init__(prog)
        self._first = {"help", *first}

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Two sections in the place of one, where some options are TRL's."""
        actions = list(actions)
        rest = [action for action in actions if action.dest not in self._first]
        super().add_arguments([action for action in actions if action.dest in self._first])
        if rest:
            self.end_section()
            self.start_section("options of TRL and transformers")
            super().add_arguments(rest)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.dest == "resume_from_checkpoint":
            return RESUME  # the Trainer's own help leaves it to the scripts
        told = re.search(r"\bdefault(s to|:| is|ing)|by default", action.help or "", re.IGNORECASE)
        bare = told or action.default is None or action.default == []
        text = action.help if bare else super()._get_help_string(action)
        return f"{text} One of: {', '.join(map(str, action.choices))}." if action.choices else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)  # `--max-steps` is `--max_steps`, and choices stand in the help
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        shown.metavar = shown.metavar or (action.dest.upper() if action.choices else None)
        return super()._format_action_invocation(shown)


def _own_options(dataclass_types: Iterable[type]) -> list[str]:
    """What a script adds to TRL's options, and what every run names."""
    bases = {base for kind in dataclass_types for base in kind.__mro__}
    ours = [base for base in bases if base.__module__.partition(".")[0] not in UPSTREAM]
    return [*NAMED, *(name for base in ours for name in vars(base).get("__annotations__", {}))]


def _read_yaml(path: Path, fields: dict[str, dataclasses.Field]) -> tuple[dict, dict]:
    """The `key: value` pairs of a file, and those under its `with_adapter`.

    What is under its `env` is put into the environment, as TRL does.
    """
    import yaml

    if not path.is_file():
        raise UsageError(f"`--config` names no file: {path}.")
    given = yaml.safe_load(path.read_text())
    if given is None:  # comments alone
        return {}, {}
    if not isinstance(given, dict):
        raise UsageError(f"{path} must hold `key: value` lines.")
    os.environ.update({key: str(value) for key, value in given.pop("env", {}).items()})
    with_adapter = given.pop(WITH_ADAPTER, None) or {}
    if not isinstance(with_adapter, dict):
        raise UsageError(f"`{WITH_ADAPTER}` of {path} must hold `key: value` lines.")
    return _settings(given, fields, path), _settings(with_adapter, fields, path)


def _settings(given: dict, fields: dict[str, dataclasses.Field], path: Path) -> dict:
    """The pairs of a file, checked, as the parser takes them."""
    _check_keys(given, fields, str(path))
    # One value of a list may be written without brackets, as on the command line
    return {
        key: [value] if "list[" in str(fields[key].type) and isinstance(value, str) else value
        for key, value in given.items()
    }


def _check_keys(given: Iterable[str], known: Collection[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists all."
            raise UsageError(f"unknown option {key!r} in {where}{hint}")
