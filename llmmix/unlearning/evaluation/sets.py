"""The rows of each role, found by name: what to forget, to retain, to hold out, and facts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from llmmix.data import load_role
from llmmix.rows.row_files import COMPRESSED
from llmmix.rows.sources import split_name


def load_roles(
    names: Mapping[str, str | None],
    facts: Sequence[str] = (),
    *,
    config: str | None = None,
    max_rows: int | None = None,
) -> dict[str, Dataset]:
    """The rows of each role, in the format of their datasets.

    Args:
        names: Datasets by role, as `llmmix.data.load_role` takes them; None for a role without.
        facts: Sets of facts: the only one is called `facts`, several by their own names.
        config: Configuration of datasets whose name gives none.
        max_rows: Number of rows to take of each, from the first on.

    Raises:
        ValueError: Two sets would have one name.
    """
    titles = ["facts"] if len(facts) == 1 else [_title(name) for name in facts]
    if len({*titles, *names}) < len(titles) + len(names):
        raise ValueError(f"`facts` names one twice, or like another set: {', '.join(facts)}.")
    wanted = [(role, role, name) for role, name in names.items() if name is not None]
    wanted += [(title, "facts", name) for title, name in zip(titles, facts, strict=True)]
    found = {
        title: load_role(name, role, config=config, arguments=(role, role))
        for title, role, name in wanted
    }
    if max_rows is None:
        return found
    return {title: rows.take(min(max_rows, len(rows))) for title, rows in found.items()}


def _title(name: str) -> str:
    """The short name of a set: its configuration, the stem of its file, or the built-in's name."""
    source, config = split_name(name)
    path = Path(source)
    stem = Path(path.stem).stem if path.suffix in COMPRESSED else path.stem
    return (config or stem.split(":")[-1]).removesuffix("_perturbed")
