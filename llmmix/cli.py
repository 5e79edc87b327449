"""`llmmix ls | cp | run | eval`: list, copy and launch recipes and evaluations.

    llmmix run --num_processes 2 sftmix --model_name_or_path ... --dataset_name ...
               launcher flags    name   flags of the recipe

What stands before the name is the launcher's, what stands after it the recipe's.
"""

import argparse
import ast
import copy
import dataclasses
import difflib
import functools
import math
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from llmmix.launching import UsageError, command_line, is_unread, run_processes, run_script

KINDS = {"run": "llmmix.recipes", "eval": "llmmix.eval"}
UPSTREAM = ("trl", "transformers")  # whose options come second in --help, but for these:
INDENT = " " * 19  # of a summary in `llmmix ls`
NAMED = (
    *("model_name_or_path", "dataset_name", "dataset_config", "output_dir", "use_peft"),
    "resume_from_checkpoint",
)
RESUME = (
    "auto: go on from the newest complete checkpoint, and start where there is none. true: refuse "
    "to start. Or a checkpoint's folder. By default the run starts."
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # TRL reports each run to the Hub by default; to allow that, set the variable to 0
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        try:
            args = _parser().parse_args(argv)
            return COMMANDS[args.command](args)
        finally:
            sys.stdout.flush()  # fails here rather than at the end, if nobody reads any more
    except UsageError as error:
        print(f"llmmix: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not is_unread(sys.stdout):
            raise
        return 141  # as of a process that SIGPIPE has ended
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmmix",
        description="List, copy and launch recipes (fine-tuning, data mixing) and evaluations.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls | cp | run | eval")
    commands.add_parser("ls", help="list recipes and evaluations")
    copy = commands.add_parser("cp", help="copy a recipe and its YAML, to make them your own")
    copy.add_argument("name", help="a recipe that `llmmix ls` shows")
    copy.add_argument("to", nargs="?", default=".", help="folder or file name (default: here)")
    for command, what in (("run", "a recipe"), ("eval", "an evaluation")):
        launch = commands.add_parser(
            command,
            help=f"launch {what}: llmmix {command} [launcher flags] NAME [its flags]",
            usage=f"llmmix {command} [launcher flags] NAME [flags of NAME]",
            description=f"Launch {what}. `llmmix {command} NAME --help` lists the flags of NAME.",
            allow_abbrev=False,
        )
        launch.add_argument(
            "--num_processes", type=int, help="processes to start on this machine (default: one)"
        )
        launch.add_argument(
            "--accelerate_config",
            help="how processes share the work: ddp, fsdp2, deepspeed_zero2, deepspeed_zero3, or a "
            "file that `accelerate config` wrote",
        )
        launch.add_argument("--launcher", type=int, help=argparse.SUPPRESS)  # by `command_line`
        launch.add_argument("name", help="a name that `llmmix ls` shows, or a file of your own")
        launch.add_argument(
            "flags", nargs=argparse.REMAINDER, help="flags of NAME, which follow it"
        )
    return parser


def list_recipes(_args: argparse.Namespace) -> int:
    """Print every recipe and evaluation with the first line of its docstring."""
    for command, package in KINDS.items():
        print(f"llmmix {command} ...")
        for path in _scripts(package):
            width = shutil.get_terminal_size().columns
            print(
                textwrap.fill(f"  {path.stem:16} {_summary(path)}", width, subsequent_indent=INDENT)
            )
    return 0


def copy_recipe(args: argparse.Namespace) -> int:
    """Copy a recipe's script and YAML.

    Raises:
        UsageError: There is no such recipe, or a file of that name exists.
    """
    source = _find(args.name, "llmmix.recipes")
    to = Path(args.to)
    script = to / source.name if to.is_dir() else to.with_suffix(".py")
    files = [file for s in (".py", ".yaml") if (file := source.with_suffix(s)).exists()]
    targets = [script.with_suffix(file.suffix) for file in files]
    for target in targets:
        if target.exists():
            raise UsageError(f"{target} exists; name another file or remove it.")
    for file, target in zip(files, targets, strict=True):
        text = file.read_text()
        if file.suffix == ".yaml":  # a run of the copy must not write over a run of the recipe
            text = text.replace(f"runs/{source.stem}\n", f"runs/{script.stem}\n")
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(text)
        partial.replace(target)  # whole, or not there
        print(f"wrote {target}")
    print(f"run it with: llmmix run {script}")
    return 0


def launch(args: argparse.Namespace) -> int:
    """Run a script in this process, or on several.

    Raises:
        UsageError: There is no such script, `--num_processes` is below 1, or `--accelerate_config`
            names no file or is refused by accelerate.
    """
    package = KINDS[args.command]
    if args.name.endswith(".py"):
        script = Path(args.name)
        if not script.is_file():
            raise UsageError(f"no file {args.name}.")
    else:
        script = _find(args.name, package)
    title, count = f"llmmix {args.command} {args.name}", args.num_processes
    if count is not None and count < 1:
        raise UsageError(f"`--num_processes` must be 1 or more, got {count}.")
    config = args.accelerate_config and _accelerate_config(args.accelerate_config)
    several = config is not None or (count or 1) > 1
    if several and not {"-h", "--help"} & set(args.flags):
        command = command_line(args.command, args.name, args.flags)
        return run_processes(command, title, count, config)
    sys.argv = [args.name, *args.flags]
    return run_script(script, title, shipped=_is_shipped(script), launcher=args.launcher)


COMMANDS = {"ls": list_recipes, "cp": copy_recipe, "run": launch, "eval": launch}


def parse_args(
    dataclass_types: tuple[type, ...], script: str, argv: list[str] | None = None
) -> tuple[Any, ...]:
    """Parse a script's flags with TRL's parser, over its own YAML and the user's `--config`.

    Later wins: the dataclass's default, `SCRIPT.yaml` beside the script, `--config`, the flags.

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
        usage=f"{_command_of(path)} [--config FILE.yaml] [flags]",
        description=_summary(path),
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
    for file in filter(None, [defaults if defaults.exists() else None, given.config]):
        parser.set_defaults_with_config(**_read_yaml(Path(file), fields))
    values, rest = parser.parse_known_args(argv)
    flags = [flag[2:].partition("=")[0] for flag in rest if flag.startswith("--")]
    _check_keys(flags, fields, "the command line")
    if rest:
        raise UsageError(f"unexpected {' '.join(rest)!r} on the command line.")
    for name, value in vars(values).items():
        if any(isinstance(x, float) and math.isnan(x) for x in _listed(value)):
            raise UsageError(f"`{name}` must be a number, got NaN.")
    # A file of more flags that lies in the current folder is not for us
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


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


def _command_of(script: Path) -> str:
    """The command that starts a script."""
    for command, package in KINDS.items():
        if script.resolve() in map(Path.resolve, _scripts(package)):
            return f"llmmix {command} {script.stem}"
    return f"llmmix run {script.name}"


def _is_shipped(script: Path) -> bool:
    return script.resolve() in {path.resolve() for p in KINDS.values() for path in _scripts(p)}


def _summary(script: Path) -> str:
    """The first line of a script's docstring."""
    text = script.read_text() if script.is_file() else ""
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def _read_yaml(path: Path, fields: dict[str, dataclasses.Field]) -> dict:
    """The `key: value` pairs of a file, its `env` put into the environment, as TRL does."""
    import yaml

    if not path.is_file():
        raise UsageError(f"`--config` names no file: {path}.")
    given = yaml.safe_load(path.read_text())
    if given is None:  # comments alone
        return {}
    if not isinstance(given, dict):
        raise UsageError(f"{path} must hold `key: value` lines.")
    os.environ.update({key: str(value) for key, value in given.pop("env", {}).items()})
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


def _folder(package: str) -> Path:
    """The folder of a package, found without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{package} is not installed.")
    return Path(spec.submodule_search_locations[0])


def _scripts(package: str) -> list[Path]:
    return sorted(path for path in _folder(package).glob("*.py") if not path.stem.startswith("_"))


def _find(name: str, package: str) -> Path:
    paths = {path.stem: path for path in _scripts(package)}
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(paths)}."
        raise UsageError(f"no {name!r} in {package}; {hint}")
    return paths[name]


def _accelerate_config(name: str) -> str:
    folder = _folder("llmmix.recipes") / "accelerate"
    shipped = {path.stem: path for path in folder.glob("*.yaml")}
    if name in shipped:
        return str(shipped[name])
    if not Path(name).is_file():
        raise UsageError(f"`--accelerate_config` {name!r} is neither a file nor {sorted(shipped)}.")
    return name


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():  # as `python -m` puts it there
        del sys.path[0]
    sys.exit(main())
