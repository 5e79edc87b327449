"""The scripts that `llmmix run` and `llmmix eval` start: where they lie, and what they are."""

import ast
import difflib
from importlib.util import find_spec
from pathlib import Path

from llmmix.command_line.launching import UsageError

KINDS = {"run": "llmmix.recipes", "eval": "llmmix.eval"}


def folder_of(package: str) -> Path:
    """The folder of a package, found without importing it.

    Raises:
        UsageError: There is no such package.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{package} is not installed.")
    return Path(spec.submodule_search_locations[0])


def scripts_of(package: str) -> list[Path]:
    """The scripts of a package, by name."""
    return sorted(path for path in folder_of(package).glob("*.py") if not path.stem.startswith("_"))


def find_script(name: str, package: str) -> Path:
    """The script of a package that a name stands for.

    Raises:
        UsageError: There is none of that name; the nearest one is suggested.
    """
    paths = {path.stem: path for path in scripts_of(package)}
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(paths)}."
        what = "recipe" if package.endswith("recipes") else "evaluation"
        raise UsageError(f"no {what} {name!r}; {hint}")
    return paths[name]


def summary_of(script: Path) -> str:
    """The first line of a script's docstring."""
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def command_of(script: Path) -> str:
    """The command that starts a script."""
    for command, package in KINDS.items():
        if script.resolve() in map(Path.resolve, scripts_of(package)):
            return f"llmmix {command} {script.stem}"
    return f"llmmix run {script.name}"


def is_shipped(script: Path) -> bool:
    """Whether a script is one of llmmix's own."""
    return script.resolve() in {path.resolve() for p in KINDS.values() for path in scripts_of(p)}
