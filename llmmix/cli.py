"""`llmmix ls | cp | run | eval`: list, copy and launch recipes and evaluations.

    llmmix run --num_processes 2 sftmix --model_name_or_path ... --dataset_name ...
               launcher flags    name   flags of the recipe

What stands before the name is the launcher's, what stands after it the recipe's. The launcher's own
flags are taken behind the name too, unless the script has a flag of that name.
"""

import argparse
import ast
import os
import shutil
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from llmmix.command_line.boundary import TRACEBACK
from llmmix.command_line.flags import parse_args as parse_args  # scripts take it from here
from llmmix.command_line.flags import refuse
from llmmix.command_line.launching import (
    UsageError,
    command_line,
    is_unread,
    run_processes,
    run_script,
)
from llmmix.command_line.scripts import (
    KINDS,
    find_script,
    folder_of,
    is_shipped,
    scripts_of,
    summary_of,
)

INDENT = " " * 19  # of a summary in `llmmix ls`


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # TRL reports each run to the Hub by default; to allow that, set the variable to 0
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test reads it
            stream.reconfigure(errors="replace")  # a terminal without a letter ends no run
    try:
        try:
            parser = _parser()
            args = parser.parse_args(argv)
            if args.command is None:
                parser.print_help()
                return 0
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


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as `main` prints it."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UsageError: Always.
        """
        if message.startswith("the following arguments are required: "):
            raise UsageError(f"`{self.prog}` lacks a name; `llmmix ls` shows those that there are.")
        refuse(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="llmmix",
        description="List, copy and launch recipes (fine-tuning, data mixing) and evaluations.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="ls | cp | run | eval")
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
        _add_launcher_flags(launch)
        launch.add_argument("--launcher", type=int, help=argparse.SUPPRESS)  # by `command_line`
        launch.add_argument("name", help="a name that `llmmix ls` shows, or a file of your own")
        launch.add_argument(
            "flags", nargs=argparse.REMAINDER, help="flags of NAME, which follow it"
        )
    return parser


def _add_launcher_flags(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    options: dict[str, dict] = {
        "--num_processes": {
            "type": _count,
            "help": "processes to start on this machine (default: one)",
        },
        "--accelerate_config": {
            "help": "how processes share the work: ddp, fsdp2, deepspeed_zero2, deepspeed_zero3, "
            "or a file that `accelerate config` wrote",
        },
        "--traceback": {
            "action": "store_true",
            "help": "show where in the code an error arose (as LLMMIX_TRACEBACK=1 does)",
        },
    }
    for name, option in options.items():
        if name not in leave_out:
            parser.add_argument(name, **option)


def _count(text: str) -> int:
    if not text.lstrip("+").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}.")
    return int(text)


def _take_launcher_flags(args: argparse.Namespace, script: Path) -> None:
    """Take flags of the launcher that stand behind the name, unless they are the script's own."""
    names = ("--num_processes", "--accelerate_config", "--traceback")
    given = {flag.partition("=")[0] for flag in args.flags}
    own = [name for name in names if name not in given or _has_flag(script, name)]
    parser = _Parser(prog=f"llmmix {args.command}", add_help=False, allow_abbrev=False)
    _add_launcher_flags(parser, leave_out=own)
    found, args.flags = parser.parse_known_args(args.flags)
    for name, value in vars(found).items():
        if value:
            setattr(args, name, value)


def _has_flag(script: Path, name: str) -> bool:
    """Whether a script has a flag: a field of that name, or its text."""
    try:
        tree = ast.parse(script.read_bytes())
    except (SyntaxError, ValueError):  # it will say so itself
        return True
    fields = (node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign | ast.Constant))
    return any(
        getattr(node.target, "id", None) == name[2:]
        if isinstance(node, ast.AnnAssign)
        else node.value == name
        for node in fields
    )


def list_recipes(_args: argparse.Namespace) -> int:
    """Print every recipe and evaluation with the first line of its docstring."""
    for command, package in KINDS.items():
        print(f"llmmix {command} ...")
        for path in scripts_of(package):
            width = shutil.get_terminal_size().columns
            print(
                textwrap.fill(
                    f"  {path.stem:16} {summary_of(path)}", width, subsequent_indent=INDENT
                )
            )
    return 0


def copy_recipe(args: argparse.Namespace) -> int:
    """Copy a recipe's script and YAML.

    Raises:
        UsageError: There is no such recipe, a file of that name exists, or the folder is missing or
            cannot be written to.
    """
    source = find_script(args.name, "llmmix.recipes")
    to = Path(args.to).expanduser()
    named = to if to.suffix in ("", ".py", ".yaml") else Path(f"{to}.py")
    script = to / source.name if to.is_dir() else named.with_suffix(".py")
    if not script.parent.is_dir():
        raise UsageError(f"no folder {script.parent} to copy into; make it first.")
    files = [file for s in (".py", ".yaml") if (file := source.with_suffix(s)).exists()]
    targets = [script.with_suffix(file.suffix) for file in files]
    for target in targets:
        if target.exists():
            raise UsageError(f"{target} exists; name another file or remove it.")
    for file, target in zip(files, targets, strict=True):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".yaml":  # a run of the copy must not write over a run of the recipe
            text = text.replace(f"runs/{source.stem}\n", f"runs/{script.stem}\n")
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(target)  # whole, or not there
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error.strerror}.") from error
        print(f"wrote {target}")
    print(f"run it with: llmmix run {script}")
    return 0


def launch(args: argparse.Namespace) -> int:
    """Run a script in this process, or on several.

    Raises:
        UsageError: There is no such script, a launcher's flag has a value that it cannot have, or
            `--accelerate_config` is refused by accelerate.
    """
    package = KINDS[args.command]
    if args.name.endswith(".py"):
        script = Path(args.name).expanduser()
        if not script.is_file():
            raise UsageError(f"no file {args.name}.")
    else:
        script = find_script(args.name, package)
    _take_launcher_flags(args, script)
    if args.traceback:
        os.environ[TRACEBACK] = "1"  # which the processes that it starts have too
    title, count = f"llmmix {args.command} {args.name}", args.num_processes
    config = args.accelerate_config and _accelerate_config(args.accelerate_config)
    several = config is not None or (count or 1) > 1
    if several and not {"-h", "--help"} & set(args.flags):
        command = command_line(args.command, args.name, args.flags)
        return run_processes(command, title, count, config)
    sys.argv = [args.name, *args.flags]
    return run_script(script, title, shipped=is_shipped(script), launcher=args.launcher)


COMMANDS = {"ls": list_recipes, "cp": copy_recipe, "run": launch, "eval": launch}


def _accelerate_config(name: str) -> str:
    folder = folder_of("llmmix.recipes") / "accelerate"
    shipped = {path.stem: path for path in folder.glob("*.yaml")}
    if name in shipped:
        return str(shipped[name])
    name = os.path.expanduser(name)
    if not Path(name).is_file():
        raise UsageError(f"`--accelerate_config` {name!r} is neither a file nor {sorted(shipped)}.")
    return name


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():  # as `python -m` puts it there
        del sys.path[0]
    sys.exit(main())
