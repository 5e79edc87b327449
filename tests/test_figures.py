"""Figures with the names that users give, which no figure may stumble over."""

import json
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from llmmix.figures import (
    LONGEST,
    draw_panels,
    draw_ranges,
    draw_scatter,
    drawing,
    label,
    never_fatal,
)
from llmmix.laws import figures as of_laws
from llmmix.mixing.figure import draw_mixture, draw_paths
from llmmix.report import write_report

ODD = [
    "$a$ and $b$",
    r"$\frac$",
    "_hidden",
    "two\nlines",
    "long " * 500,
    "中文",
    "",
    "\x00\x07",
    "\ud800",
    "<b>&{x:g}%s",
]
K = len(ODD)
MIXTURES = np.random.default_rng(0).dirichlet(np.ones(K), 6)
CURVES = {name: MIXTURES[:2, :3] for name in ODD}
POINTS = {name: (MIXTURES[:3, i], MIXTURES[3:, i]) for i, name in enumerate(ODD)}


def panels(folder):
    draw_panels(folder / "a.png", [1, 2, 3], {name: CURVES for name in ODD}, "x")


def ranges(folder):
    found = {name: MIXTURES[:3, i] for i, name in enumerate(ODD)}
    marks = {name: 0.1 * i for i, name in enumerate(ODD)}
    draw_ranges(folder / "a.png", {name: found for name in ODD}, marks=marks)


def scatter(folder):
    marks = {name: (0.1 * i, 0.5) for i, name in enumerate(ODD)}
    draw_scatter(folder / "a.png", POINTS, xlabel="x", ylabel="y", marks=marks)


def paths(folder):
    draw_paths(folder / "a.png", ODD[:8], {ODD[0]: [[(0, MIXTURES[0][:8])]]}, 4)


def predictions(folder):
    of_laws.draw_predictions(MIXTURES, MIXTURES, 0.1 * MIXTURES, ODD, ODD[0])


def effects(folder):
    of_laws.draw_effects(MIXTURES.T @ MIXTURES, ODD, ODD, 0.05)


def mixtures(folder):
    of_laws.draw_mixtures({name: MIXTURES[0] for name in ODD}, ODD)


def budget(folder):
    curve = [{"runs": 4, "error": 0.8}, {"runs": 8, "error": 0.3}]
    of_laws.draw_budget({name: curve for name in ODD})


def transfer(folder):
    of_laws.draw_transfer(MIXTURES[0], MIXTURES[1], "$\\frac$ $b", 0.5)


def record(folder):
    lines: list[dict] = [{"domains": ODD, "targets": ODD, "method": "X"}]
    for step in range(1, 4):
        lines.append({"step": step, "counts": [1] * K})
        lines.append({"step": step, "measured": {"losses": MIXTURES[step].tolist()}})
        matrix = (MIXTURES.T @ MIXTURES).tolist()
        lines.append({"step": step, "weights": MIXTURES[0].tolist(), "matrix": matrix})
    (folder / "mixture.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_mixture(folder)


def report(folder):
    for i, name in enumerate(("$\\frac$", "_hidden", "中文")):
        run = folder / name
        run.mkdir()
        log = [{"loss": 2.0 / n, "step": n, f"mixture/{ODD[0]}": 0.1 * n} for n in (1, 2, 3)]
        (run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        estimates = {"pass_at_n": {"1": 0.1}, "interval": {"1": [0.0, 0.2]}}
        estimates |= {"maj_at_n": {"1": 0.1}, "maj_interval": {"1": [0.0, 0.2]}}
        estimates |= {"model": "$\\frac$ $x", "adapter": None, "temperature": 0.5 + i}
        (run / "pass_at_n.json").write_text(json.dumps(estimates))
    page = write_report(folder).read_text()
    assert page.count("<img") == 3


DRAWN = [
    panels,
    ranges,
    scatter,
    paths,
    predictions,
    effects,
    mixtures,
    budget,
    transfer,
    record,
    report,
]


@pytest.mark.parametrize("draw", DRAWN)
def test_odd_names_are_drawn_as_they_are(draw, tmp_path, monkeypatch, capsys):
    """No error, no warning, no text read as mathematics; the names stand in the figure."""
    texts, math, save = [], [], Figure.savefig

    def note(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        for text in figure.findobj(Text):
            texts.append(text.get_text())
            math.append(text.get_parse_math())

    monkeypatch.setattr(Figure, "savefig", note)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path)
    assert not any(math) and not any("mathdefault" in text for text in texts)
    assert any("$" in text for text in texts)
    if draw in (panels, ranges, mixtures, budget):
        assert {label(name) for name in ODD} <= set(texts)  # more of them than colours
    if draw not in (paths, transfer):
        assert any("_hidden" in text or "frac" in text for text in texts)
    assert capsys.readouterr().out == ""  # no figure was left out


def test_names_in_a_legend_are_all_there():
    with drawing():
        figure = Figure()
        axis = figure.subplots()
        for name in ODD:
            axis.plot([0, 1], label=label(name))
        shown = [text.get_text() for text in axis.legend().get_texts()]
    assert len(shown) == len(set(shown)) == K and max(map(len, shown)) <= LONGEST


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("code", "code"),
        (3, "3"),
        ("_a", " _a"),
        (" two\n lines\t", "two lines"),
        ("", "(no name)"),
        ("\n", "(no name)"),
        ("é中", r"é\u4e2d"),
        ("a\x00", r"a\x00"),
        ("x" * LONGEST, "x" * LONGEST),
        ("a" * 50 + "b" * 50, "a" * 19 + "…" + "b" * 20),
    ],
)
def test_labels(name, shown):
    assert label(name) == shown


def test_figures_of_the_user_keep_their_mathematics():
    with drawing():
        assert not matplotlib.rcParams["text.parse_math"]
    assert matplotlib.rcParams["text.parse_math"]


def test_what_fails_is_told_in_one_line(capsys):
    with never_fatal("figure a.png"):
        raise ValueError("one\ntwo")
    assert capsys.readouterr().out == "No figure a.png, since it failed: ValueError: one two\n"
    with pytest.raises(KeyboardInterrupt), never_fatal("figure a.png"):
        raise KeyboardInterrupt
