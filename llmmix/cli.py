"""`llmmix ls | cp | run | eval`: list, copy and launch recipes and evaluations.

    llmmix run --num_processes 2 sftmix --model_name_or_path ... --dataset_name ...
               launcher flags    name   flags of the recipe

What stands before the name is the launcher's, what stands after it the recipe's.
"""

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path

from llmmix.flags import parse_args as parse_args  # scripts take it from here
from llmmix.launching import UsageError, command_line, is_unread, run_processes, run_script
from llmmix.scripts import KINDS, find_script, folder_of, is_shipped, scripts_of, summary_of

INDENT = " " * 19  # of a summary in `llmmix ls`


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
        UsageError: There is no such recipe, or a file of that name exists.
    """
    source = find_script(args.name, "llmmix.recipes")
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
        script = find_script(args.name, package)
    title, count = f"llmmix {args.command} {args.name}", args.num_processes
    if count is not None and count < 1:
        raise UsageError(f"`--num_processes` must be 1 or more, got {count}.")
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
    if not Path(name).is_file():
        raise UsageError(f"`--accelerate_config` {name!r} is neither a file nor {sorted(shipped)}.")
    return name


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():  # as `python -m` puts it there
        del sys.path[0]
    sys.exit(main())
