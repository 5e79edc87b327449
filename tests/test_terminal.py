"""Every table is whole: each cell's text stands in the output, and no line is longer than asked."""

import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from llmmix.eval.speed import _print_table as print_speed
from llmmix.recipes import dco_study, mixing_study, token_losses_study, unlearning_study
from rich.cells import cell_len

from llmmix.grading.printing import print_tables
from llmmix.laws import printing as laws
from llmmix.terminal import fit, number, print_table
from llmmix.unlearning.evaluation.printing import print_table as print_unlearning

NAMES = [f"runs/an-organisation/model-{i}-trained-on-everything-there-is" for i in range(6)]


def columns_of(out: str) -> list[str]:
    """The text of each column of each table in print, folded lines joined, without spaces."""
    found, current = [], []
    for line in out.splitlines():
        if line[:1] in ("┃", "│"):
            cells = [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]
            if len(current) != len(cells):
                current = [""] * len(cells)
            current = [text + cell for text, cell in zip(current, cells, strict=True)]
        elif line[:1] == "└":
            found, current = found + current, []
    return ["".join(text.split()) for text in found]


def assert_whole(out: str, cells: list[str], width: int) -> None:
    assert max(map(cell_len, out.splitlines())) <= width
    columns = columns_of(out)
    assert "…" not in out
    missing = [c for c in cells if not any("".join(c.split()) in column for column in columns)]
    assert not missing, missing


@pytest.fixture(params=[40, 60, 80, 200])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.mark.parametrize(
    ("value", "digits", "sign", "shown"),
    [
        (-0.0001, 3, "", "0.000"),
        (-0.0, 2, "+", "0.00"),
        (0.0001, 3, "+", "0.000"),
        (0.5, 2, "+", "+0.50"),
        (-0.0006, 3, "", "-0.001"),
        (math.nan, 3, "", "nan"),
        (None, 3, "", "none"),
    ],
)
def test_number(value, digits, sign, shown):
    assert number(value, digits, sign) == shown


def test_a_table_that_fits_is_one_and_keeps_its_widths():
    head, rows = ["model", "a", "long heading"], [["x", "1", "2"], ["section"]]
    assert fit(head, rows, 80) == [{0: 7, 1: 1, 2: 12}]


def test_names_fold_before_a_table_is_split_and_pinned_columns_stand_in_each_part():
    head, rows = ["model", "↓", *"abcdef", "retain"], [["m" * 30, "↓", *["0.123"] * 7]]
    (part,) = fit(head, rows, 90)
    assert 12 <= part[0] < 30 and sum(part.values()) + 3 * len(part) + 1 == 90
    parts = fit(head, rows, 50, pinned=(0, 1, -1))
    assert len(parts) > 1 and all({0, 1, 8} <= set(part) for part in parts)
    assert sorted({c for part in parts for c in part}) == list(range(9))
    assert all(sum(part.values()) + 3 * len(part) + 1 <= 50 for part in parts)


def test_names_that_look_like_markup_or_hold_wide_characters(capsys, width):
    print_table("[b]title[/b]", ["[red]", "値"], [["[bold]x[/]", "漢字" * 30], ["混合", "1"]])
    out = capsys.readouterr().out
    assert "[b]title[/b]" in out
    assert_whole(out, ["[red]", "[bold]x[/]", "漢字" * 30, "混合", "1"], width)


def test_pass_at_n(capsys, width):
    n = ["1", "4", "16", "64", "256"]
    run = {"rows": 9, "num_samples": 256, "loss": 1.23456, "cut": 0, "errors": {}, "left_out": []}
    run |= {"verdicts": {"right": 1, "wrong": 1, "unparsable": 0, "failed": 0}}
    run |= {"problems": dict.fromkeys(n, 9)}
    results, differences, cells = {}, {}, ["loss", "1.235"]
    for i, name in enumerate(NAMES):
        values = {k: (10 * i + j) / 100 for j, k in enumerate(n)}
        interval = {k: [value, value + 0.3] for k, value in values.items()}
        results[name] = run | {"pass_at_n": values, "interval": interval}
        results[name] |= {"maj_at_n": values, "maj_interval": interval}
        differences[name] = {k: {"difference": -0.0001, "interval": [-0.5, 0.25]} for k in n}
        cells += [f"{value:.3f}\n{value:.2f} to {value + 0.3:.2f}" for value in values.values()]
    print_tables(results, differences)
    out = capsys.readouterr().out
    heads = [f"{what}@{k}" for what in ("pass", "maj") for k in n]
    assert_whole(out, [*NAMES, *heads, *cells, "0.000\n-0.50 to +0.25"], width)
    assert "-0.000" not in out


def test_the_table_of_the_quickstart_is_one_at_80_columns():
    head = ["model", "loss", *(f"pass@{n}" for n in (1, 4, 16, 64))]
    cells = ["1.234", *["0.123\n0.12 to 0.34"] * 4]
    (part,) = fit(head, [[name, *cells] for name in ("SFT", "SFTMix", "DCO")], 80)
    assert list(part) == list(range(6)) and part[0] == len("SFTMix")


def test_unlearning(capsys, width):
    entries = {
        name: {"value": 0.123 + i / 100, "direction": "lower"}
        for i, name in enumerate(["forget_rouge", "forget_extraction_strength", "model_utility"])
    }
    entries["mia_min_k"] = {"value": -0.0, "direction": "retained", "interval": [-0.001, 0.9]}
    probe = {"before": {"forget_rouge": 0.1}, "after": {"forget_rouge": 12345.0}}
    one = {"rows": {"forget": 40, "retain": 400}, "metrics": entries, "items": {}}
    one["probes"] = {"relearning": probe}
    print_unlearning(dict.fromkeys(NAMES, one), one)
    out = capsys.readouterr().out
    cells = [*NAMES, "retain model", "forget extraction strength", "0.123", "0.133", "0.143"]
    cells += ["0.000\n0.00 to 0.90", "0.100 to 1.2e+04", "forget rouge, relearning", "→"]
    assert_whole(out, cells, width)


def test_speed(capsys, width):
    figures = {"seconds": 12.3456, "peak_mib": 98765.4, "time_ratio": 0.5, "memory_ratio": 1.25}
    settings = {"rounds": 5, "rows": 4096, "hidden_size": 576, "vocab_size": 49152}
    settings |= {"batch_size": 8, "max_length": 512}
    row = {"row": "a training step of SFT", "contenders": {name: figures for name in NAMES}}
    print_speed({"machine": {"device": "cpu", "threads": 2}, "settings": settings, "rows": [row]})
    cells = [*NAMES, "a training step of SFT", "12.346", "98765", "0.50x", "1.25x", "peak MiB"]
    assert_whole(capsys.readouterr().out, cells, width)


def test_laws(capsys, width):
    domains = [f"a domain of many words number {i}" for i in range(12)]
    rank = SimpleNamespace(estimate=0.98765, low=0.9, high=0.999, spearman=0.5)
    rank.spearman_low, rank.spearman_high = 0.25, 0.75
    found = SimpleNamespace(error=-0.0001, objective_spearman=rank, objective_mae=0.012345)
    found.regret, found.coverage, found.seconds, found.problems = 0.1, {0.9: 0.9}, 12.3, ["odd"]
    found.targets, found.mae, found.spearman = domains, np.full(12, 0.0123), np.full(12, 0.987)
    judged = dict.fromkeys(NAMES, found) | {"broken": "no fit"}
    laws.print_judged(judged, [0.9])
    laws.print_by_target(judged)
    plan = MagicMock(mixtures=np.full((2, 12), 1 / 12), expected=[1.5, 2.5], std=[0.1, 0.2])
    plan.configure_mock(nearest=[0.3, 0.4], after=[0.01, 0.02], before=0.5, notes=["a note"])
    laws.print_plan(plan, domains)
    curve = [{"runs": 10} | {k: 0.5 for k in ("error", "error_sd", "spearman", "spearman_sd")}]
    curve[0] |= {"mae": 0.25, "mae_sd": 0.125}
    laws.print_curves(dict.fromkeys(NAMES, curve))
    out = capsys.readouterr().out
    cells = [*NAMES, *domains, "0.988 (0.900 to 0.999)", "0.0123   98.7", "rank corr.", "in 90%"]
    cells += [" ".join(f"{d} 0.083" for d in domains[:5]) + " +7", "1.5000 +- 0.1000"]
    cells += ["0.250 +- 0.125", "rank corr. of the objective", "0.000"]
    tables = "\n".join(line for line in out.splitlines() if not line.startswith("Note"))
    assert_whole(tables, cells, width)


def test_studies(capsys, width, tmp_path, monkeypatch):
    for study, figure in ((dco_study, "draw_panels"), (mixing_study, "draw_paths")):
        monkeypatch.setattr(study, figure, lambda *_: "figure")
    monkeypatch.setattr(unlearning_study, "draw_scatter", lambda *_, **__: "figure")
    metrics = {name: {"value": 0.5 + i / 8} for i, name in enumerate(unlearning_study.SHOWN)}
    metrics["forget_quality"]["log10_p"] = -0.0001
    args = unlearning_study.StudyArguments(losses=["npo"], learning_rates=[1e-4], seeds=[0, 1])
    names = ("original", "retrained", "npo 0.0001")
    unlearning_study.show(args, {name: [{"metrics": metrics}] * 2 for name in names})
    cells = ["0.500\n0.50 to 0.50", "0.000\n0.0 to 0.0", "quality, log10 of p", *names]
    assert_whole(capsys.readouterr().out.partition("Figure")[0], cells, width)

    monkeypatch.setattr(token_losses_study, "draw_ranges", lambda *_, **__: "figure")
    args = token_losses_study.StudyArguments(losses=["label_smoothing"])
    run = dict.fromkeys(token_losses_study.SHOWN, 0.125)
    found = {f"{rows}, label_smoothing": [run] * 3 for rows in token_losses_study.SETS}
    token_losses_study.show(args, {"before": [run], **found})
    cells = ["0.125\n0.12 to 0.12", "label_smoothing", "before", "pass@8", "greedy"]
    assert_whole(capsys.readouterr().out.partition("Figure")[0], cells, width)

    args = dco_study.StudyArguments(str(tmp_path), steps=[80 * i for i in range(1, 10)], seeds=[0])
    measured = {step: dict.fromkeys(args.n, step / 10_000) for step in args.steps}
    dco_study.show(args, {f"N={n} seed=0": measured for n in args.n_samples})
    cells = ["0.008", "0.040", "0.072\n0.07 to 0.07", "DCO, N = 64", "cross-entropy", "pass@16"]
    assert_whole(capsys.readouterr().out.partition("Figure")[0], cells, width)

    args = mixing_study.StudyArguments(domains=["web", "code", "books", "papers", "news", "law"])
    run = {"mean": 2.0, "test": [2.0] * 6, "shares": [1 / 6] * 6, "path": [], "seconds": 9}
    others = {0: run | {"mean": 1.5}, 1: run | {"mean": 1.25}}
    both = {0: run, 1: run}
    mixing_study.show(args, {mixing_study.EQUAL: both, "Skill-It by a long name": others}, [1.0])
    cells = ["Skill-It by a long name", "-0.625", "-2.213 +0.963", "0.17 0.17 0.17 0.17 0.17 0.17"]
    out = capsys.readouterr().out.partition("Equal shares:")[0]
    assert_whole(out, [*cells, *args.domains, "95% interval"], width)
