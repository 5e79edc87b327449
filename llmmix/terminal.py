"""Tables in the terminal, or in a pipe, that lose nothing: they fold, and then they are split.

A table as wide as the terminal or less is printed as it is. In a wider one the names fold over
several lines. One that is wider still becomes several, each with the columns that name the rows. A
pipe has 80 columns, unless `COLUMNS` says otherwise.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

NARROWEST = 20  # columns of a terminal; a narrower one wraps the lines itself
LABEL = 12  # characters that a name folds to at the least
HEADING = 9  # the same of a column's heading
WIDE_HEADING = 16  # and where there are several tables in any case


def number(value: float | None, digits: int = 3, sign: str = "", missing: str = "none") -> str:
    """A number with so many decimal places; zero has no sign.

    Args:
        value: The number, or None.
        digits: Decimal places.
        sign: "+" to show the sign of positive numbers too.
        missing: What stands for None.
    """
    if value is None:
        return missing
    text = f"{value:{sign}z.{digits}f}"
    return text.lstrip("+") if not float(text) else text


def print_table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    pinned: Sequence[int] = (0,),
    left: Sequence[int] = (0,),
    notes: Sequence[str] = (),
    width: int | None = None,
) -> None:
    """Print a table of text.

    Args:
        title: A line above the table; "" for none.
        head: Headings of the columns.
        rows: Cells, with line breaks perhaps. A row of one cell is the heading of a section.
        pinned: Columns that every part of a split table has.
        left: Columns that are aligned left; the others are aligned right.
        notes: Lines below the table.
        width: Characters of a line; None for those of the terminal.
    """
    from rich.table import Table

    console = _console(width)
    if title:
        print_lines("", title, width=width)
    for part in fit(head, rows, console.width, pinned):
        folded = _longest([row[0] for row in rows]) > part[0]
        table = Table(show_lines=folded)  # which line belongs to which name
        for column, size in part.items():
            justify: Any = "left" if column in left else "right"
            table.add_column(
                _text(head[column], console), justify=justify, width=size, overflow="fold"
            )
        for row in rows:
            if len(row) == 1:
                table.add_section()
            table.add_row(*(_text(row[column], console) for column in part if column < len(row)))
        console.print(table)
    print_lines(*notes, width=width)


def print_lines(*lines: str, width: int | None = None) -> None:
    """Print lines, wrapped between words where they are longer than the terminal's."""
    console = _console(width)
    for line in lines:
        console.print(_text(line, console))


def _console(width: int | None) -> "Console":
    from rich.console import Console

    console = Console(width=width, highlight=False)
    console.width = max(console.width, NARROWEST)
    return console


def _text(text: str, console: "Console") -> "Text":
    """Text without markup, as the terminal can encode it."""
    from rich.text import Text

    return Text(text.encode(console.encoding, "replace").decode(console.encoding), overflow="fold")


def fit(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, pinned: Sequence[int] = (0,)
) -> list[dict[int, int]]:
    """How a table fits into a line: parts, each the width of its columns by their number.

    Args:
        head: Headings of the columns.
        rows: Cells; rows of one cell are headings of sections.
        width: Characters of a line.
        pinned: Columns that every part has.
    """
    full = [row for row in rows if len(row) > 1]
    heading = [_longest([name]) for name in head]
    body = [_longest([row[c] for row in full]) for c in range(len(head))]
    body[0] = _longest([row[0] for row in rows])
    # Names fold anywhere, cells of many words between those, numbers nowhere
    foldable = max(LABEL, width // 3)
    least = [size if size <= width // 2 else foldable for size in body]
    least[0] = min(body[0], LABEL)
    natural = [max(sizes) for sizes in zip(heading, body, strict=True)]
    smallest = [max(size, min(name, HEADING)) for size, name in zip(least, heading, strict=True)]
    every = list(range(len(head)))
    if _total([smallest[c] for c in every]) <= width:
        return [_grown(every, smallest, natural, width)]

    wide = [max(size, min(name, WIDE_HEADING)) for size, name in zip(least, heading, strict=True)]
    wide[0] = max(least[0], min(natural[0], width // 3))
    repeated = [c % len(head) for c in pinned]
    others = [c for c in every if c not in repeated]
    if others and _total([wide[c] for c in repeated] + [max(wide[c] for c in others)]) > width:
        repeated, others = [0], every[1:]
    parts = [list(repeated)]
    for column in others:
        if len(parts[-1]) > len(repeated) and (
            _total([wide[c] for c in [*parts[-1], column]]) > width
        ):
            parts.append(list(repeated))
        parts[-1].append(column)
    return [_grown(sorted(part), smallest, natural, width) for part in parts]


def _longest(cells: Sequence[str]) -> int:
    """Width of the longest line."""
    from rich.cells import cell_len

    return max((cell_len(line) for cell in cells for line in cell.splitlines()), default=0)


def _total(sizes: Sequence[int]) -> int:
    """Width of a table with its frame."""
    return sum(sizes) + 3 * len(sizes) + 1


def _grown(
    columns: Sequence[int], smallest: Sequence[int], natural: Sequence[int], width: int
) -> dict[int, int]:
    """Widths from the smallest to the natural ones, as far as the line has room."""
    sizes = {c: max(smallest[c], 1) for c in columns}
    while _total([*sizes.values()]) > width and max(sizes.values()) > 1:
        sizes[max(sizes, key=lambda c: sizes[c])] -= 1
    while _total([*sizes.values()]) < width:
        column = max(sizes, key=lambda c: natural[c] - sizes[c])
        if natural[column] <= sizes[column]:
            break
        sizes[column] += 1
    return sizes
