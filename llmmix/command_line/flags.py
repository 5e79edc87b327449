"""The flags of a script: TRL's parser, over YAML files, with a word for each mistake."""

import argparse
import copy
import difflib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

from llmmix.command_line.boundary import keep_arguments
from llmmix.command_line.inputs import check_inputs
from llmmix.command_line.launching import UsageError
from llmmix.command_line.scripts import command_of, summary_of
from llmmix.command_line.values import from_yaml, hints_of, is_plain, text_reader
from llmmix.command_line.yaml_files import read_yaml
from llmmix.training.ranges import check_settings

logger = logging.getLogger(__name__)

UPSTREAM = ("trl", "transformers")  # whose options come last in --help, and these before them:
NAMED = (
    *("model_name_or_path", "dataset_name", "dataset_config", "output_dir", "use_peft"),
    "resume_from_checkpoint",
)
# Options that the recipes of mixtures have not
OF_ONE_DATASET = ("dataset_name", "datasets", "streaming", "dataset_streaming", "test_split_size")
# What other trainers call a loss of ours
ELSEWHERE = {
    **dict.fromkeys(("use_dft_loss", "enable_dft_loss"), "dft"),
    **dict.fromkeys(("use_eaft_loss", "use_eaft"), "eaft"),
    "use_asft_loss": "asft",
}
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
        UsageError: A key or flag names no field (the nearest one is suggested); or `--config` names
            no file, or one that is no YAML or holds no mapping; or a value is of another type.
        ValueError: A value is out of its range, or names a file or folder that cannot serve.
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
        epilog="Of the launcher: --num_processes N, --accelerate_config NAME, --traceback; "
        "`llmmix run --help` explains them.",
        formatter_class=functools.partial(_Help, first=_own_options(dataclass_types)),
        allow_abbrev=False,
    )
    # --config is taken here and not by TRL's parser, so that a mistake in it is named
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = ours.error = refuse  # type: ignore[method-assign]
    ours.add_argument("--config")
    given, argv = ours.parse_known_args(sys.argv[1:] if argv is None else argv)
    hints = hints_of(dataclass_types)
    readers = _set_readers(parser, hints)
    defaults = path.with_suffix(".yaml")
    files = [defaults] if defaults.exists() else []
    if given.config is not None:
        files.append(Path(given.config).expanduser())
    layers = [_from_file(file, hints, readers) for file in files]
    for settings, _ in layers:
        parser.set_defaults_with_config(**settings)
    values, rest = parser.parse_known_args(argv)
    if getattr(values, "use_peft", False):
        values = _fit_to_adapter(parser, layers, argv, values)
    flags = [flag[2:].partition("=")[0] for flag in rest if flag.startswith("--")]
    _check_keys(flags, hints, "the command line")
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)!r} on the command line.")
    keep_arguments([values])
    check_inputs([values])
    # A file of more flags that lies in the current folder is not for us
    parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for arguments in parsed:
        check_settings(arguments)
        _keep_lists(arguments)
        if isinstance(folder := getattr(arguments, "output_dir", None), str):
            arguments.output_dir = os.path.expanduser(folder)  # a shell leaves --output_dir=~/run
    return parsed


def _fit_to_adapter(
    parser: Any, layers: list[tuple[dict, dict]], argv: list[str], plain: argparse.Namespace
) -> argparse.Namespace:
    """The flags' values once what each file says of adapters has won over the rest of that file."""
    from llmmix.files import is_main_process

    for settings, with_adapter in layers:
        parser.set_defaults_with_config(**{**settings, **with_adapter})
    values, _ = parser.parse_known_args(argv)
    for name in sorted({name for _, with_adapter in layers for name in with_adapter}):
        before, after = getattr(plain, name), getattr(values, name)
        if after != before and is_main_process():
            logger.warning(
                "With an adapter `%s` is %s, in place of %s; a value that you give wins.",
                name,
                after,
                before,
            )
    return values


def _set_readers(parser: argparse.ArgumentParser, hints: dict[str, tuple]) -> dict[str, Callable]:
    """Have each flag read by our words for its type; returns what reads a text of each field."""
    readers: dict[str, Callable] = {}
    for action in parser._actions:
        if action.dest not in hints or action.nargs == 0:
            continue
        if not is_plain(hints[action.dest]):
            kind: Any = action.type or str
            readers[action.dest] = kind
        else:
            choices: Any = action.choices  # checked by the reader, which names them
            readers[action.dest] = text_reader(action.dest, hints[action.dest], choices)
            action.type = readers[action.dest]
    return readers


def _keep_lists(arguments: Any) -> None:
    """Undo what TRL does to one `--lora_target_modules`, whose name PEFT would take for a pattern.

    A pattern (`.*q_proj`) and the word all-linear stay what they are.
    """
    modules = getattr(arguments, "lora_target_modules", None)
    if isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules):
        arguments.lora_target_modules = [modules]


def refuse(message: str) -> NoReturn:
    """Say in our words what argparse refuses.

    Raises:
        UsageError: Always.
    """
    if found := re.match(r"argument --(\w+)(?:/\S+)?: (.*)", message, re.DOTALL):
        colon = "" if found[2].startswith(("must", "takes")) else ":"
        message = f"`{found[1]}`{colon} {found[2]}"
    elif message.startswith("the following arguments are required: "):
        names = re.findall(r"--(\w+)(?:/\S+)?", message)
        message = f"missing: {', '.join(f'`{name}`' for name in names)}; `--help` lists all."
    raise UsageError(message)


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
        """Three sections in the place of one, where some options are TRL's."""
        actions = list(actions)
        own = [action for action in actions if action.dest in self._first]
        named = [action for action in actions if action.dest in NAMED and action not in own]
        rest = [action for action in actions if action not in (*own, *named)]
        sections = {"rows, model and folder": named, "options of TRL and transformers": rest}
        super().add_arguments(own)
        for title, section in sections.items():
            if section:
                self.end_section()
                self.start_section(title)
                super().add_arguments(section)

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
    """What a script adds to TRL's options."""
    bases = {base for kind in dataclass_types for base in kind.__mro__}
    ours = [base for base in bases if base.__module__.partition(".")[0] not in UPSTREAM]
    return [name for base in ours for name in vars(base).get("__annotations__", {})]


def _from_file(
    path: Path, hints: dict[str, tuple], readers: dict[str, Callable[[str], Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values in a YAML file, and those under its `with_adapter`.

    What is under its `env` is put into the environment, as TRL does.
    """
    if not path.is_file():
        raise UsageError(f"`--config` names no file: {str(path)!r}.")
    try:
        given = read_yaml(path)
    except ValueError as error:
        raise UsageError(f"`--config`: {error}") from error
    _set_environment(given.pop("env", {}), path)
    with_adapter = given.pop(WITH_ADAPTER, {})
    if not isinstance(with_adapter, dict):
        raise UsageError(f"`{WITH_ADAPTER}` of {path} must hold `key: value` lines.")

    def settings(texts: dict[str, Any]) -> dict[str, Any]:
        _check_keys(texts, hints, str(path))
        return {k: _value(k, text, path, hints[k], readers[k]) for k, text in texts.items()}

    return settings(given), settings(with_adapter)


def _value(key: str, given: Any, path: Path, hint: tuple, reader: Callable[[str], Any]) -> Any:
    try:
        return from_yaml(given, hint, reader)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"`{key}` in {path} {error}") from error


def _set_environment(given: Any, path: Path) -> None:
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise UsageError(f"`env` in {path} must hold `NAME: value` lines, each with a value.")
    for name, value in given.items():
        try:
            os.environ[name] = str(value)
        except ValueError:  # `=` in a name, or a null character
            raise UsageError(f"`env` in {path}: no variable can be {name!r}: {value!r}.") from None


def _check_keys(given: Iterable[str], known: Collection[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists all."
            if "domains" in known and key in OF_ONE_DATASET:
                hint = ": name each dataset as a domain, `domains: [a=rows.jsonl, b=ORG/NAME]`"
                hint += ", whose `validation_rows` are held out."
            if key in ELSEWHERE:
                hint = f": here it is `llmmix run token_losses --loss_type {ELSEWHERE[key]}`."
            raise UsageError(f"unknown option {key!r} in {where}{hint}")
