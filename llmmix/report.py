"""Figures and one self-contained HTML page from a run folder.

Reads what a run leaves behind: `trainer_state.json` of the folder, or of each of its subfolders
when it holds several runs to compare, the `run.json` beside it, the JSON documents of evaluations
(`pass_at_n.json`, of subfolders too), and the `mixture.jsonl` of a run on several domains.

Writes `report.html`, with every picture inside it, and the same pictures as PNG in `figures/`. A
picture that cannot be drawn is told in one line, and left out.
"""

import base64
import html
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import Trainer

from llmmix.curves import draw_training, has_curves, last_values
from llmmix.facts import note_run, read_facts
from llmmix.figures import COLOURS, drawing, label, never_fatal, png, pyplot, styles
from llmmix.files import RECORD, read_json, write_whole
from llmmix.mixing.figure import draw_mixture
from llmmix.terminal import number

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem;
       color: #1b1e23; background: #fff }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.note { color: #5f6670; margin-top: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #e4e7eb }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; color: #5f6670 }
td.best { font-weight: 700 }
div { overflow-x: auto }
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
    histories, evaluations, facts = read_runs(folder)
    if runs:
        own = folder.resolve().name  # a run that was evaluated into its own folder
        histories = {name: run for name, run in histories.items() if name in (*runs, own)}
        evaluations = {name: run for name, run in evaluations.items() if name in runs}
    if not histories and not evaluations:
        raise FileNotFoundError(
            f"Nothing to report: {folder} holds no trainer_state.json and no pass_at_n.json."
        )
    names = list(dict.fromkeys([*histories, *evaluations]))
    kinds = dict(zip(names, styles(len(names)), strict=True))
    methods = {name: known["method"] for name, known in facts.items() if "method" in known}
    wanted: dict[str, Callable[[], bytes]] = {}
    if evaluations:
        wanted["pass_at_n"] = lambda: _pass_at_n_figure(evaluations, kinds)
        if _by_temperature(evaluations):
            wanted["temperature"] = lambda: _temperature_figure(evaluations)
    if has_curves(histories):
        wanted["training"] = lambda: draw_training(histories, methods)
    if (folder / RECORD).exists():
        wanted["mixture"] = lambda: draw_mixture(folder)
    (folder / "figures").mkdir(exist_ok=True)
    figures = {}
    for name, draw in wanted.items():
        with never_fatal(f"figure {name}.png in the report"):
            figures[name] = draw()
            write_whole(folder / "figures" / f"{name}.png", figures[name])
    tables = [_pass_at_n_table(evaluations)] if evaluations else []
    tables += [_facts_table(histories, facts)] if histories else []
    page = folder / "report.html"
    write_whole(page, _page(title or folder.resolve().name, note, tables, figures))
    return page


def print_report(folder: str | Path, trainer: Trainer | None = None, **options: Any) -> None:
    """Write the report of what is finished and saved, and print its path; tell a failure in a line.

    Args:
        folder: The folder of the run.
        trainer: The trainer that has just ended there: the report says what it trained.
        **options: As `write_report` takes them.
    """
    with never_fatal(f"report of {folder}"):
        if trainer is not None:
            note_run(trainer)
        print(f"Report: {write_report(folder, **options)}")


def read_runs(
    folder: Path,
) -> tuple[dict[str, list[dict]], dict[str, dict], dict[str, dict[str, str]]]:
    """Log histories, pass@N documents and facts of a run folder, by run name.

    A folder with a state of its own is one run, and its subfolders may hold evaluations of it; else
    each subfolder with one is.
    """
    subfolders = sorted(filter(_written, folder.glob("*/")), key=_written)
    own = [folder] if _written(folder) else subfolders
    histories, evaluations, facts = {}, {}, {}
    for run in own:
        name = run.resolve().name
        if (state := read_json(run / "trainer_state.json")) is not None:
            histories[name] = state["log_history"]
            facts[name] = read_facts(run)
    for run in dict.fromkeys([*own, *subfolders]):
        if (document := read_json(run / "pass_at_n.json")) is not None:
            evaluations[run.resolve().name] = document
    return histories, evaluations, facts


def _written(run: Path) -> float:
    """When the run left its first file, 0 if it left none: runs are shown in this order."""
    files = (run / "trainer_state.json", run / "pass_at_n.json")
    return min((file.stat().st_mtime for file in files if file.exists()), default=0)


@drawing()
def _pass_at_n_figure(evaluations: dict[str, dict], kinds: dict[str, dict[str, Any]]) -> bytes:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    ticks = {int(n) for document in evaluations.values() for n in document["pass_at_n"]}
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(ticks) / 1.2, max(ticks) * 1.2)
    for name, document in evaluations.items():
        n, values, low, high = _curve(document, "pass_at_n", "interval")
        axis.plot(n, values, marker="o", label=label(name), linewidth=2, **kinds[name])
        axis.fill_between(n, low, high, color=kinds[name]["color"], alpha=0.12, linewidth=0)
        if "maj_at_n" in document:
            n, values, *_ = _curve(document, "maj_at_n", "maj_interval")
            style = kinds[name] | {"label": f"{label(name)}, maj@N", "linewidth": 1.0}
            axis.plot(n, values, marker="x", **style)
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


def _page(title: str, note: str, tables: list[str], figures: dict[str, bytes]) -> str:
    captions = {
        "pass_at_n": "pass@N on held-out problems, with 95% bands over problems",
        "temperature": "Coverage against temperature",
        "mixture": "The mixture, and what was measured for it",
        "training": "Training",
    }
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{html.escape(note)}</p>']
    parts += tables[:1]
    for name, image in figures.items():
        data = base64.b64encode(image).decode()
        parts.append(f"<h2>{captions[name]}</h2>")
        parts.append(f'<img alt="{captions[name]}" src="data:image/png;base64,{data}">')
    parts += tables[1:]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>"
    )


def _pass_at_n_table(evaluations: dict[str, dict]) -> str:
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
            cells += f"<td{mark}>{number(value, missing='')}</td>"
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<div><table><tr><th></th>{head}</tr>{body}</table></div>"


def _facts_table(histories: dict[str, list[dict]], facts: dict[str, dict[str, str]]) -> str:
    """What each run was, and the last value of all that it logged."""
    last = {
        name: {metric: f"{value:z.4g}" for metric, value in last_values(history).items()}
        for name, history in histories.items()
    }
    head = "".join(f"<th>{html.escape(name)}</th>" for name in histories)
    parts = []
    for title, known in (("The runs", facts), ("Last values", last)):
        body = ""
        for fact in dict.fromkeys(fact for of_run in known.values() for fact in of_run):
            cells = (html.escape(known[name].get(fact, "")) for name in histories)
            cells_text = "".join(f"<td>{cell}</td>" for cell in cells)
            body += f"<tr><td>{html.escape(fact)}</td>{cells_text}</tr>"
        parts.append(f"<h2>{title}</h2><div><table><tr><th></th>{head}</tr>{body}</table></div>")
    return "".join(parts)
