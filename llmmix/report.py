"""Figures and one self-contained HTML page from a run folder.

Reads what a run leaves behind: `trainer_state.json` of the folder, or of each of its subfolders
when it holds several runs to compare, the JSON documents of evaluations (`pass_at_n.json`), and the
`mixture.jsonl` of a run on several domains.

Writes `report.html`, with every picture inside it, and the same pictures as PNG in `figures/`. A
picture that cannot be drawn is told in one line, and left out.
"""

import base64
import html
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from llmmix.figures import COLOURS, drawing, label, never_fatal, plain_log_ticks, png, pyplot
from llmmix.files import RECORD, read_json, write_whole
from llmmix.mixing.figure import draw_mixture

# Not curves: bookkeeping, and totals that the Trainer logs once at the end
SKIPPED = {"step", "epoch", "total_flos", "num_tokens", "learning_rate"}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem;
       color: #1b1e23; background: #fff }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.note { color: #5f6670; margin-top: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #e4e7eb }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; color: #5f6670 }
td.best { font-weight: 700 }
img { max-width: 100%; height: auto }
"""


def write_report(
    folder: str | Path, *, title: str | None = None, note: str = "", runs: Collection[str] = ()
) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder.

    Args:
        folder: The folder of one run, or of several in its subfolders.
        title: Heading; the folder's name by default.
        note: One plain sentence or two under the heading: what was run.
        runs: Subfolders to show; all by default.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The folder holds neither a trainer state nor an evaluation that is whole.
    """
    folder = Path(folder)
    histories, evaluations = read_runs(folder)
    if runs:
        histories = {name: run for name, run in histories.items() if name in runs}
        evaluations = {name: run for name, run in evaluations.items() if name in runs}
    if not histories and not evaluations:
        raise FileNotFoundError(
            f"Nothing to report: {folder} holds no trainer_state.json and no pass_at_n.json."
        )
    names = list(dict.fromkeys([*histories, *evaluations]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    wanted: dict[str, Callable[[], bytes]] = {}
    if evaluations:
        wanted["pass_at_n"] = lambda: _pass_at_n_figure(evaluations, colours)
        if _by_temperature(evaluations):
            wanted["temperature"] = lambda: _temperature_figure(evaluations)
    if histories:
        wanted["training"] = lambda: _training_figure(histories, colours)
    if (folder / RECORD).exists():
        wanted["mixture"] = lambda: draw_mixture(folder)
    (folder / "figures").mkdir(exist_ok=True)
    figures = {}
    for name, draw in wanted.items():
        with never_fatal(f"figure {name}.png in the report"):
            figures[name] = draw()
            write_whole(folder / "figures" / f"{name}.png", figures[name])
    page = folder / "report.html"
    write_whole(page, _page(title or folder.resolve().name, note, evaluations, figures))
    return page


def print_report(folder: str | Path, **options: Any) -> None:
    """Write the report of what is finished and saved, and print its path; tell a failure in a line.

    Args:
        folder: The folder of the run.
        **options: As `write_report` takes them.
    """
    with never_fatal(f"report of {folder}"):
        print(f"Report: {write_report(folder, **options)}")


def read_runs(folder: Path) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Log histories and pass@N documents of a run folder, by run name.

    A folder with a state of its own is one run; else each subfolder with one is.
    """
    own = (
        [folder] if _written(folder) else sorted(filter(_written, folder.glob("*/")), key=_written)
    )
    histories, evaluations = {}, {}
    for run in own:
        name = run.resolve().name
        if (state := read_json(run / "trainer_state.json")) is not None:
            histories[name] = state["log_history"]
        if (document := read_json(run / "pass_at_n.json")) is not None:
            evaluations[name] = document
    return histories, evaluations


def _written(run: Path) -> float:
    """When the run left its first file, 0 if it left none: runs are shown in this order."""
    files = (run / "trainer_state.json", run / "pass_at_n.json")
    return min((file.stat().st_mtime for file in files if file.exists()), default=0)


@drawing()
def _pass_at_n_figure(evaluations: dict[str, dict], colours: dict[str, str]) -> bytes:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    ticks = {int(n) for document in evaluations.values() for n in document["pass_at_n"]}
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(ticks) / 1.2, max(ticks) * 1.2)
    for name, document in evaluations.items():
        n, values, low, high = _curve(document, "pass_at_n", "interval")
        axis.plot(n, values, marker="o", color=colours[name], label=label(name), linewidth=2)
        axis.fill_between(n, low, high, color=colours[name], alpha=0.12, linewidth=0)
        if "maj_at_n" in document:
            n, values, *_ = _curve(document, "maj_at_n", "maj_interval")
            style = {"color": colours[name], "label": f"{label(name)}, maj@N"}
            axis.plot(n, values, "--", linewidth=1.4, **style)
    axis.set_xticks(sorted(ticks), [str(n) for n in sorted(ticks)])
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("N, samples drawn")
    axis.set_ylabel("pass@N")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False)
    return png(figure)


def _curve(document: dict, estimate: str, interval: str) -> tuple[list, list, list, list]:
    """N, estimates and bounds, with NaN where there is none."""
    nothing = float("nan")
    values = [nothing if value is None else value for value in document[estimate].values()]
    bounds = [given or (nothing, nothing) for given in document[interval].values()]
    low, high = zip(*bounds, strict=True)
    return [int(n) for n in document[estimate]], values, list(low), list(high)


@drawing()
def _temperature_figure(evaluations: dict[str, dict]) -> bytes:
    """pass@N against temperature, a panel a model, a line for each N."""
    plt = pyplot()
    models = _by_temperature(evaluations)
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.2 * len(models), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (model, documents) in zip(axes.flat, models.items(), strict=True):
        documents = sorted(documents, key=lambda document: document["temperature"])
        temperatures = [document["temperature"] for document in documents]
        for n, colour in zip(documents[0]["pass_at_n"], COLOURS * 9, strict=False):
            values = [document["pass_at_n"].get(n) for document in documents]
            axis.plot(temperatures, values, marker="o", color=colour, label=f"pass@{n}")
        axis.set_title(label(model), fontsize=10)
        axis.set_xlabel("temperature")
        axis.set_ylim(0, 1)
    axes.flat[0].legend(frameon=False)
    return png(figure)


def _by_temperature(evaluations: dict[str, dict]) -> dict[str, list[dict]]:
    """The documents of each model that was sampled at several temperatures."""
    models: dict[str, list[dict]] = {}
    for document in evaluations.values():
        if "temperature" in document:
            models.setdefault(document["adapter"] or document["model"], []).append(document)
    return {model: documents for model, documents in models.items() if len(documents) > 1}


@drawing()
def _training_figure(histories: dict[str, list[dict]], colours: dict[str, str]) -> bytes:
    plt = pyplot()
    curves = _curves(histories)
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.5 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    for axis, (metric, runs) in zip(axes.flat, curves.items(), strict=False):
        for name, (steps, values) in runs.items():
            axis.plot(steps, values, color=colours[name], linewidth=1.6, label=label(name))
        drawn = [value for _, values in runs.values() for value in values]
        if metric.endswith(("loss", "grad_norm")) and min(drawn, default=0) > 0:
            axis.set_yscale("log")  # it falls by orders of magnitude, and differs so between losses
            plain_log_ticks(axis.yaxis, *axis.get_ylim())
        axis.set_title(label(metric), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
    if len(histories) > 1:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return png(figure)


def _curves(histories: dict[str, list[dict]]) -> dict[str, dict[str, tuple[list, list]]]:
    """Metric -> run -> (steps, values), `loss` first, of every metric logged at least twice."""
    curves: dict[str, dict[str, tuple[list, list]]] = {}
    for name, history in histories.items():
        for entry in history:
            for metric, value in entry.items():
                if metric in SKIPPED or not isinstance(value, int | float):
                    continue
                steps, values = curves.setdefault(metric, {}).setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    kept = {
        metric: {name: curve for name, curve in runs.items() if len(curve[0]) > 1}
        for metric, runs in curves.items()
        if not metric.endswith(("runtime", "per_second"))
    }
    order = sorted(filter(kept.get, kept), key=lambda metric: (metric != "loss", "/" in metric))
    return {metric: kept[metric] for metric in order} or {"loss": {}}


def _page(title: str, note: str, evaluations: dict[str, dict], figures: dict[str, bytes]) -> str:
    captions = {
        "pass_at_n": "pass@N on held-out problems, with 95% bands over problems",
        "temperature": "Coverage against temperature",
        "mixture": "The mixture, and what was measured for it",
        "training": "Training",
    }
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{html.escape(note)}</p>']
    if evaluations:
        parts.append(_table(evaluations))
    for name, image in figures.items():
        data = base64.b64encode(image).decode()
        parts.append(f"<h2>{captions[name]}</h2>")
        parts.append(f'<img alt="{captions[name]}" src="data:image/png;base64,{data}">')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>"
    )


def _table(evaluations: dict[str, dict]) -> str:
    columns: dict[str, dict[str, float]] = {}
    for name, document in evaluations.items():
        if document.get("loss") is not None:
            columns.setdefault("loss a token", {})[name] = document["loss"]
        for n, value in document["pass_at_n"].items():
            columns.setdefault(f"pass@{n}", {})[name] = value
    known = {c: [v for v in values.values() if v is not None] for c, values in columns.items()}
    best = {c: (min if "loss" in c else max)(values, default=None) for c, values in known.items()}
    head = "".join(f"<th>{c}</th>" for c in columns)
    body = ""
    for name in evaluations:
        cells = ""
        for column, values in columns.items():
            value = values.get(name)
            mark = ' class="best"' if value == best[column] and len(evaluations) > 1 else ""
            cells += f"<td{mark}>{'' if value is None else f'{value:.3f}'}</td>"
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table><tr><th></th>{head}</tr>{body}</table>"
