"""Names of a table's columns: shorten them, and find the one that a user means."""

import itertools
import os
import re
from collections.abc import Callable, Sequence

SEPARATORS = "/_.: -"  # characters at which a column's name may be cut
BEFORE = re.compile(
    r"^(metrics?/)?(eval/(lm/|downstream/)?)?((train|valid|val|eval)[/_])?(the_pile_)?"
)
AFTER = re.compile(r"([/_ ](val|valid|eval|ce|cross_entropy))?[/_ ](loss|bpb)$", re.IGNORECASE)


class Column(str):
    """A shortened name, with the full name of its column in `column`."""

    column: str


def shorten_names(
    domains: Sequence[str], targets: Sequence[str]
) -> tuple[list[Column], list[Column]]:
    """Cut the parts that all names share, so that most targets get the name of a domain."""
    pairs = itertools.product(_cuts(domains), _cuts(targets))
    best = max(
        pairs,
        key=lambda pair: (len({*pair[0]} & {*pair[1]}), -len("".join((*pair[0], *pair[1])))),
    )
    for short, names in zip(best, (domains, targets), strict=True):
        for name, column in zip(short, names, strict=True):
            name.column = column
    return best


def _cuts(names: Sequence[str]) -> list[list[Column]]:
    """Every way to shorten a table's names."""
    if len(names) == 1:
        return [[Column(name)] for name in {names[0]: 0, _bare(names[0]): 0}]
    before = os.path.commonprefix(list(names))
    after = os.path.commonprefix([name[::-1] for name in names])
    starts = [0, *(i for i, char in enumerate(before, start=1) if char in SEPARATORS)]
    ends = [0, *(i for i, char in enumerate(after, start=1) if char in SEPARATORS)]
    shortened = [
        [Column(name[start : len(name) - end]) for name in names]
        for start, end in itertools.product(starts, ends)
    ]
    # A name needs a letter: 1 and 2 would say too little about data_1 and data_2
    return [s for s in shortened if all(re.search("[^\\W\\d_]", name) for name in s)] or [
        [Column(name) for name in names]
    ]


def _bare(name: str) -> str:
    short = AFTER.sub("", name)
    return BEFORE.sub("", short, count=1) or name


def _column_of(name: str) -> str:
    return name.column if isinstance(name, Column) else name


def find_target(name: str, targets: Sequence[str]) -> int:
    """Index of the target that a name stands for, in short or as in the table.

    Args:
        name: Name of a target.
        targets: Names of all targets, as `Runs` has them.

    Raises:
        ValueError: `name` stands for no target, or for several.
    """
    readings: list[Callable[[str], str]] = [str, _column_of, _bare]
    for known in readings:
        found = [i for i, target in enumerate(targets) if known(target) == known(name)]
        if len(found) == 1:
            return found[0]
    choices = ", ".join(targets)
    raise ValueError(f"`objective`: no target {name!r}; there are {choices}.")
