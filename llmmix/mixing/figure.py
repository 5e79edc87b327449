"""Figures of mixture runs: shares, losses and the estimated effect of each domain."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmmix.figures import draw_panels, drawing, label, png, pyplot, styles
from llmmix.files import read_record


@drawing()
def draw_mixture(folder: str | Path) -> bytes:
    """A PNG of a run's record: shares, losses by target, gains by domain and the mean matrix.

    A panel is left out where the run has nothing for it, such as a matrix under fixed shares.

    Args:
        folder: Folder with the `mixture.jsonl` of a run.

    Raises:
        FileNotFoundError: `folder` holds no record of a mixture.
    """
    header, entries = read_record(folder)
    header |= {key: list(map(label, header.get(key, []))) for key in ("domains", "targets")}
    measured = [e for e in entries if "losses" in e.get("measured", {})]
    found = [e for e in entries if e.get("matrix")]
    panels = [_shares]
    panels += [_losses] if len(measured) > 1 else []
    panels += [_gains, _matrix] if found else []
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.0 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        panel(axis, header, entries, measured, found)
    return png(figure)


def _lines(axis, x, values: np.ndarray, names: Sequence[str | None], **style) -> None:
    for line, name, kind in zip(values.T, names, styles(len(names)), strict=True):
        axis.plot(x, line, label=name, **kind, **style)
    axis.set_xlabel("step")


def _shares(axis, header, entries, measured, found) -> None:
    drawn = [e for e in entries if "counts" in e]
    if not drawn:
        axis.set_axis_off()
        return
    steps = np.array([e["step"] for e in drawn])
    counts = np.array([e["counts"] for e in drawn], dtype=float)
    decided = [e for e in entries if "weights" in e]
    if decided:
        x = [e["step"] for e in decided] + [steps[-1]]
        y = np.array([e["weights"] for e in decided] + [decided[-1]["weights"]])
        for line, name, kind in zip(y.T, header["domains"], styles(y.shape[1]), strict=True):
            axis.step(x, line, where="post", label=name, **kind)
    width = max(1, len(steps) // 40)
    whole = len(steps) // width * width
    means = counts[:whole].reshape(-1, width, counts.shape[1]).mean(1)
    middle = steps[:whole].reshape(-1, width).mean(1)
    style = {"alpha": 0.35, "linewidth": 1.0} if decided else {}
    names = [None] * len(header["domains"]) if decided else header["domains"]
    _lines(axis, middle, means / means.sum(1, keepdims=True), names, **style)
    axis.set_title("share of the rows" + (" (pale: as drawn)" if decided else ""), fontsize=10)
    axis.set_ylim(0, None)
    axis.legend(frameon=False, fontsize=8)


def _losses(axis, header, entries, measured, found) -> None:
    losses = np.array([e["measured"]["losses"] for e in measured], dtype=float)
    _lines(axis, [e["step"] for e in measured], losses, header["targets"])
    axis.set_title("validation loss, nats", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _gains(axis, header, entries, measured, found) -> None:
    gains = np.array([np.sum(e["matrix"], axis=0) for e in found])
    _lines(axis, [e["step"] for e in found], gains, header["domains"])
    axis.axhline(0, color="#5f6670", linewidth=0.6)
    axis.set_title("gain of each domain, nats a step", fontsize=10)


def _matrix(axis, header, entries, measured, found) -> None:
    matrix = np.mean([e["matrix"] for e in found], axis=0)
    limit = np.abs(matrix).max() or 1.0
    axis.grid(False)
    axis.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(matrix):
        shade = "white" if abs(value) > 0.6 * limit else "black"
        axis.text(j, i, f"{1000 * value:z.2f}", ha="center", va="center", fontsize=8, color=shade)
    axis.set_xticks(range(len(header["domains"])), header["domains"], fontsize=8, rotation=30)
    axis.set_yticks(range(len(header["targets"])), header["targets"], fontsize=8)
    axis.set_xlabel("trained on")
    axis.set_title("mean matrix, 1/1000 nats a step", fontsize=10)


def draw_paths(
    path: str | Path, domains: Sequence[str], paths: Mapping[str, Sequence], steps: int
) -> Path:
    """A PNG of shares over a run, one panel a method: the mean over runs, and their range.

    Args:
        path: Path of the PNG.
        domains: Names of the domains.
        paths: Runs by method; each run is a list of (step, weights from that step on).
        steps: Steps of a run.

    Returns:
        The path.
    """
    grid, panels = np.linspace(0, steps, 41), {}
    for name, runs in paths.items():
        places = [np.searchsorted([at for at, _ in run], grid, "right") - 1 for run in runs]
        shares = [[run[i][1] for i in at] for run, at in zip(runs, places, strict=True)]
        panels[name] = dict(zip(domains, np.array(shares).transpose(2, 0, 1), strict=True))
    return draw_panels(path, grid.tolist(), panels, "step")
