"""Training curves of runs: a panel a metric, training and evaluation in one, methods apart.

Losses of different methods have different units, and share no axis. What is logged for one of
several evaluation sets, such as `eval_code_loss`, stands in the panel of a single run's `loss`.
"""

import re
from typing import Any

from llmmix.figures import drawing, grid, label, legend, plain_log_ticks, png, styles

History = list[dict[str, Any]]

# Not curves: bookkeeping, and totals that the Trainer logs once at the end
SKIPPED = {"step", "epoch", "total_flos", "num_tokens", "learning_rate"}
TRAINED: dict[str, Any] = {"linewidth": 1.6}
EVALUATED: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.0}
BY_METHOD = ("loss", "grad_norm")  # their units are the method's


def last_values(history: History) -> dict[str, float]:
    """The last number logged of each metric."""
    return {
        metric: value
        for entry in history
        for metric, value in entry.items()
        if metric not in SKIPPED and isinstance(value, int | float)
    }


def has_curves(histories: dict[str, History]) -> bool:
    """Whether anything was logged at least twice."""
    return bool(_panels(histories, {}))


@drawing()
def draw_training(histories: dict[str, History], methods: dict[str, str]) -> bytes:
    """A PNG of all that was logged at least twice.

    Args:
        histories: What each run logged, by its name.
        methods: The method of each run; runs without one count as of one method.
    """
    panels = _panels(histories, methods)
    figure, axes = grid(len(panels), across=3, size=(3.4, 2.6))
    curves = dict.fromkeys(name for panel in panels.values() for name in panel)
    of_one = len(histories) == 1
    names = [*curves] if of_one else [*histories]
    kinds = dict(zip(names, styles(len(names)), strict=True))
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        drawn = [value for _, values in panel.values() for value in values]
        for (run, part), (steps, values) in panel.items():
            style = kinds[(run, part) if of_one else run] | (EVALUATED if part else TRAINED)
            shown = part or "training" if of_one else run
            axis.plot(steps, values, label=None if part and not of_one else label(shown), **style)
        if title.startswith(BY_METHOD) and drawn and max(drawn) > 10 * min(drawn) > 0:
            axis.set_yscale("log")  # it falls by orders of magnitude
            plain_log_ticks(axis.yaxis, *axis.get_ylim())
        axis.set_title(label(title), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
    if not of_one and any(part for _, part in curves):
        axes[0].plot([], [], color="black", label="evaluation", **EVALUATED)
    if len(curves) > 1:
        legend(figure, axes)
    return png(figure)


def _panels(
    histories: dict[str, History], methods: dict[str, str]
) -> dict[str, dict[tuple[str, str], tuple[list, list]]]:
    """Title -> (run, "" or evaluation set) -> (steps, values), losses first."""
    several = len({methods.get(name) for name in histories}) > 1
    found: dict[str, dict[tuple[str, str], tuple[list, list]]] = {}
    for name, history in histories.items():
        logged = {metric for entry in history for metric in entry} - SKIPPED
        for entry in history:
            for metric, value in entry.items():
                if metric not in logged or not isinstance(value, int | float):
                    continue
                if metric.endswith(("runtime", "per_second")):
                    continue
                base, part = _base(metric, logged, len(histories) == 1)
                of_method = several and name in methods and base in BY_METHOD
                title = f"{base}, {methods[name]}" if of_method else base
                steps, values = found.setdefault(title, {}).setdefault((name, part), ([], []))
                steps.append(entry["step"])
                values.append(value)
    kept = {
        title: panel
        for title, panel in found.items()
        if any(len(steps) > 1 for steps, _ in panel.values())
    }
    bases = [title.partition(", ")[0] for title in kept]
    order = sorted(
        kept,
        key=lambda title: (
            not title.startswith("loss"),
            "/" in title,
            bases.index(title.partition(", ")[0]),
        ),
    )
    return {title: kept[title] for title in order}


def _base(metric: str, logged: set[str], with_parts: bool) -> tuple[str, str]:
    """The metric of training that one of evaluation belongs to, and the name of its curve."""
    rest = metric.removeprefix("eval_")
    if rest != metric and rest in logged:
        return rest, "evaluation"
    if with_parts and rest != metric:
        for base in sorted(logged, key=len, reverse=True):
            if match := re.fullmatch(f"(.+)_{re.escape(base)}", rest):
                return base, f"evaluation, {match[1]}"
    return metric, ""
