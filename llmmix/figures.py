"""Figures in one style: matplotlib without a screen, curves side by side, scatter plots.

Names come from users. `drawing` reads no mathematics in them, `label` makes them fit to be shown,
and `never_fatal` keeps what was computed from ending with a figure that cannot be drawn.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmmix.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LONGEST = 40  # characters of a name that a figure shows
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "text.parse_math": False,  # a `$` in a name is a dollar sign
}
COLOURS = ["#4269d0", "#ef8636", "#3ca951", "#a463f2", "#ff725c", "#6cc5b0", "#97bbf5", "#9c6b4e"]


@contextmanager
def drawing() -> Iterator[None]:
    """Our style, within the block or, as a decorator, the function; other figures keep theirs."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def pyplot() -> Any:
    """The module `matplotlib.pyplot`, without a screen."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


@contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """Tell an error of the block in one line and go on: what the block shows is done and saved.

    Args:
        what: What there will not be.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"No {what}, since it failed: {type(error).__name__}: {reason[:200]}", flush=True)


def label(name: object) -> str:
    """A name as a figure can show it: one line of at most 40 characters, none of them unknown.

    The middle of a longer name is left out. Characters that the font lacks are shown as Python
    escapes them, which tells names in a script that it lacks from each other.
    """
    text = " ".join(str(name).split())
    text = "".join(c if _has_glyph(c) else c.encode("unicode_escape").decode() for c in text)
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[: half - 1]}…{text[-half:]}"
    # Matplotlib leaves what begins with an underscore out of legends
    return f" {text}" if text.startswith("_") else text or "(no name)"


def _has_glyph(character: str) -> bool:
    from matplotlib import rcParams

    if not character.isprintable():
        return False
    fonts = _fonts(tuple(rcParams["font.family"]))
    return any(font.get_char_index(ord(character)) for font in fonts)


@lru_cache(maxsize=8)
def _fonts(families: tuple[str, ...]) -> list[Any]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return [get_font(findfont(FontProperties(family=[family]))) for family in families]


def styles(count: int) -> list[dict[str, Any]]:
    """A colour and a kind of line for each of so many curves, all different up to 32."""
    kinds = ["-", "--", ":", "-."]
    return [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": kinds[i // len(COLOURS) % len(kinds)]}
        for i in range(count)
    ]


def plain_log_ticks(axis: "Axis", low: float, high: float) -> None:
    """Ticks of a log axis from `low` to `high`, several at any range, labelled by plain numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if high < 5 * low:
        axis.set_major_locator(MaxNLocator(5))
    elif high < 200 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def png(figure: "Figure") -> bytes:
    """The bytes of a figure as a PNG; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def grid(panels: int, across: int, size: tuple[float, float]) -> "tuple[Figure, Sequence[Axes]]":
    """A figure with so many panels in rows.

    Args:
        panels: The number of panels.
        across: The most that stand side by side.
        size: Width and height of a panel, in inches.

    Returns:
        The figure and the axes of each panel.
    """
    columns = min(across, panels)
    rows = -(-panels // columns)
    width, height = size
    figure, axes = pyplot().subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, list(axes.flat[:panels])


@drawing()
def draw_panels(
    path: str | Path, x: list[float], panels: dict[str, dict[str, "np.ndarray"]], xlabel: str
) -> Path:
    """A PNG of curves side by side, each the mean over repeats within their range.

    Args:
        path: Path of the PNG.
        x: Positions of the points.
        panels: For each title, curves by name, each (repeats, points).
        xlabel: Label of the x axis.

    Returns:
        The path.
    """
    figure, axes = grid(len(panels), across=4, size=(3.2, 3.2))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for (name, values), style in zip(curves.items(), styles(len(curves)), strict=True):
            axis.plot(x, values.mean(0), marker="o", markersize=4, label=label(name), **style)
            colour = style["color"]
            axis.fill_between(
                x, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0
            )
        axis.set_title(label(title))
        axis.set_xlabel(xlabel)
        axis.set_ylim(bottom=0)
    legend(figure, axes)
    write_whole(path, png(figure))
    return Path(path)


def legend(figure: "Figure", axes: Iterable["Axes"]) -> None:
    """One legend of all curves of a figure, each name once, above its panels."""
    shown: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(name, handle)
    if not shown:
        return
    longest = max(len(name) for name in shown)
    room = int(figure.get_figwidth() * 14) // (longest + 6)  # characters of the legend's size
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="outside upper center",
        ncols=min(len(shown), max(1, room)),
        frameon=False,
        fontsize=8,
    )


@drawing()
def draw_scatter(
    path: str | Path,
    points: dict[str, tuple["np.ndarray", "np.ndarray"]],
    *,
    xlabel: str,
    ylabel: str,
    marks: dict[str, tuple[float, float]] | None = None,
) -> Path:
    """A PNG of points by name: the mean over repeats, and a bar to each end of their range.

    Args:
        path: Path of the PNG.
        points: For each name, x and y of the repeats. Names that differ in their last word alone
            share a colour, and the first of them is hollow.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
        marks: Single points by name, drawn as stars.

    Returns:
        The path.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    families: dict[str, list[str]] = {}
    for name in points:
        families.setdefault(name.rpartition(" ")[0] or name, []).append(name)
    for number, (family, names) in enumerate(families.items()):
        marker, colour = "os^Dv"[number // len(COLOURS) % 5], COLOURS[number % len(COLOURS)]
        for name in names:
            x, y = points[name]
            # The mean of equal numbers may be off by a rounding
            ends = [(v.mean() - v.min(), v.max() - v.mean()) for v in (x, y)]
            spread = [[[max(0.0, low)], [max(0.0, high)]] for low, high in ends]
            style = {"marker": marker, "color": colour, "elinewidth": 0.8, "linestyle": "none"}
            style["markerfacecolor"] = "white" if name == names[0] != names[-1] else colour
            style["label"] = label(family) if name == names[-1] else None
            axis.errorbar(x.mean(), y.mean(), spread[1], spread[0], **style)
    grid = max(families.values(), key=len)
    first, last = (name.rpartition(" ")[2] for name in (grid[0], grid[-1]))
    title = f"hollow: {label(first)}, filled: {label(last)}" if len(grid) > 1 else None
    figure.legend(
        loc="outside right upper", frameon=False, fontsize=8, title=title, title_fontsize=8
    )
    for name, place in (marks or {}).items():
        axis.plot(*place, marker="*", markersize=15, color="black", linestyle="none")
        axis.annotate(label(name), place, xytext=(8, 5), textcoords="offset points", fontsize=9)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    write_whole(path, png(figure))
    return Path(path)


@drawing()
def draw_ranges(
    path: str | Path,
    panels: dict[str, dict[str, "np.ndarray"]],
    *,
    marks: dict[str, float] | None = None,
    across: int = 3,
) -> Path:
    """A PNG of panels, a line a name: the mean over repeats, and a bar over their range.

    Args:
        path: Path of the PNG.
        panels: For each title, repeats by name; every panel has the same names.
        marks: A value to compare with by title, drawn as a dashed line.
        across: The most panels that stand side by side.

    Returns:
        The path.
    """
    lines = max(len(names) for names in panels.values())
    figure, axes = grid(len(panels), across, size=(3.2, 0.8 + 0.2 * lines))
    for place, (axis, (title, names)) in enumerate(zip(axes, panels.items(), strict=True)):
        for line, values in enumerate(names.values()):
            axis.plot([values.min(), values.max()], [line, line], color=COLOURS[0], linewidth=2)
            axis.plot(values.mean(), line, marker="o", markersize=5, color=COLOURS[0])
        if marks and title in marks:
            axis.axvline(marks[title], color="black", linestyle="--", linewidth=0.8)
        shown = map(label, names) if place % across == 0 else [""] * len(names)
        axis.set_yticks(range(len(names)), list(shown), fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.set_title(label(title), fontsize=9)
    write_whole(path, png(figure))
    return Path(path)
