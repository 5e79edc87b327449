"""Figures of a mixture law: its predictions, the effect of each domain, and what it proposes.

`Study` (llmmix/laws/study.py) writes them.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from llmmix.figures import COLOURS, drawing, label, legend, plain_log_ticks, png, pyplot, styles
from llmmix.laws.accuracy import weighted
from llmmix.laws.judge import Judgement

PANELS = 12  # most panels of predicted against observed losses


def draw_judgement(judgement: Judgement, weights: np.ndarray, law: str) -> bytes:
    """A PNG of held-out predictions against observed losses: the objective, then each target.

    Args:
        judgement: The law's judgement.
        weights: (m,) weights of the targets in the objective.
        law: Name of the law.
    """
    used = weights > 0
    parts = judgement.observed, judgement.predictions, judgement.stds
    observed, predicted, stds = (np.column_stack([weighted(part, weights), part]) for part in parts)
    stds[:, 0] = np.sqrt((judgement.stds[:, used] ** 2) @ weights[used] ** 2)
    titles = ["objective", *map(str, judgement.targets)]
    return draw_predictions(observed, predicted, stds, titles, law)


@drawing()
def draw_predictions(
    observed: np.ndarray, predicted: np.ndarray, std: np.ndarray, titles: list[str], law: str
) -> bytes:
    """A PNG of held-out predictions against observed losses, one panel a title.

    Args:
        observed: (n, p) losses.
        predicted: (n, p).
        std: (n, p) standard deviations, drawn as bars of 90 %.
        titles: p titles; the first 12 panels are drawn.
        law: Name of the law.
    """
    shown = min(len(titles), PANELS)
    columns = min(shown, 4)
    rows = -(-shown // columns)
    plt = pyplot()
    size = (3.0 * columns + 0.4, 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[shown:]:
        axis.set_axis_off()
    for i, axis in enumerate(axes.flat[:shown]):
        x, y = observed[:, i], predicted[:, i]
        ends = [np.nanmin([x, y]), np.nanmax([x, y])]
        axis.plot(ends, ends, color="#5f6670", linewidth=0.8)
        bars = norm.ppf(0.95) * std[:, i]
        style = {"markersize": 3, "elinewidth": 0.5, "alpha": 0.6}
        axis.errorbar(x, y, bars, fmt="o", color=COLOURS[i > 0], **style)
        axis.set_title(label(titles[i]), fontsize=9)
    figure.supxlabel("observed loss (nats)", fontsize=9)
    figure.supylabel(f"predicted by {label(law)}, run held out", fontsize=9)
    return png(figure)


@drawing()
def draw_effects(
    changes: np.ndarray, domains: Sequence[str], targets: Sequence[str], moved: float
) -> bytes:
    """A PNG of a matrix: the change of each loss if a part of the mixture goes to a domain.

    Args:
        changes: (m, k) nats, NaN where unknown.
        domains: k names.
        targets: m names.
        moved: The part of the mixture that is moved.
    """
    m, k = changes.shape
    plt = pyplot()
    size = (2.6 + 0.42 * k, 1.7 + 0.34 * m)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    most = np.nanmax(np.abs(changes)) or 1.0
    image = axis.imshow(changes, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    if m * k <= 400:
        for i, j in np.ndindex(m, k):
            shade = "white" if abs(changes[i, j]) > 0.6 * most else "black"
            text = "?" if np.isnan(changes[i, j]) else f"{100 * changes[i, j]:z.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=shade)
    axis.set_xticks(range(k), list(map(label, domains)), rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(m), list(map(label, targets)), fontsize=8)
    axis.grid(False)
    axis.set_title(f"change of loss (0.01 nats) if {moved:.0%} goes to the domain", fontsize=9)
    figure.colorbar(image, ax=axis, label="nats")
    return png(figure)


@drawing()
def draw_mixtures(mixtures: dict[str, np.ndarray], domains: Sequence[str]) -> bytes:
    """A PNG of mixtures side by side, one group of bars a domain.

    Args:
        mixtures: (k,) shares by name; the first mixture orders the domains.
        domains: k names.
    """
    order = np.argsort(-next(iter(mixtures.values())), kind="stable")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(2.5 + 0.5 * len(domains), 3.4), layout="constrained")
    width = 0.8 / len(mixtures)
    for number, (name, shares) in enumerate(mixtures.items()):
        x = np.arange(len(domains)) + (number - (len(mixtures) - 1) / 2) * width
        axis.bar(x, shares[order], width, label=label(name), color=COLOURS[number % len(COLOURS)])
    labels = [label(domains[j]) for j in order]
    axis.set_xticks(range(len(domains)), labels, rotation=60, ha="right", fontsize=8)
    axis.set_ylabel("share")
    axis.grid(False, axis="x")
    legend(figure, [axis])
    return png(figure)


@drawing()
def draw_budget(curves: dict[str, list[dict]]) -> bytes:
    """A PNG of held-out error against the number of runs, by law, as from `learning_curve`."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    for (name, curve), style in zip(curves.items(), styles(len(curves)), strict=True):
        points = [p for p in curve if np.isfinite(p.get("error", np.nan))]
        if points:
            x, y = [p["runs"] for p in points], [p["error"] for p in points]
            axis.plot(x, y, marker="o", markersize=4, label=label(name), **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({p["runs"] for curve in curves.values() for p in curve})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_formatter("")
    plain_log_ticks(axis.yaxis, *axis.get_ylim())
    axis.set_xlabel("runs the law was fitted to")
    axis.set_ylabel("error on held-out runs\n(1: as the mean)")
    legend(figure, [axis])
    return png(figure)


@drawing()
def draw_transfer(
    predicted: np.ndarray, observed: np.ndarray, name: str, correlation: float
) -> bytes:
    """A PNG of the objective of other models' runs against the calibrated law.

    Args:
        predicted: (n,) objective by the calibrated law.
        observed: (n,) objective of the runs.
        name: Name of the runs.
        correlation: Rank correlation of the two.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(4.8, 3.8), layout="constrained")
    ends = [np.nanmin([predicted, observed]), np.nanmax([predicted, observed])]
    axis.plot(ends, ends, color="#5f6670", linewidth=0.8)
    axis.plot(predicted, observed, "o", markersize=4, color=COLOURS[0], alpha=0.7)
    axis.set_xlabel("predicted, with a fitted offset and slope a target (nats)")
    axis.set_ylabel("observed (nats)")
    axis.set_title(f"{label(name)}: rank correlation {correlation:z.3f}", fontsize=9)
    return png(figure)
