import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from llmmix import DCOConfig, report
from llmmix.figures import draw_scatter
from llmmix.report import print_report, read_runs, write_report

HISTORY = [
    {"loss": 2.0, "dco/weight": 0.9, "learning_rate": 1e-3, "step": 1, "epoch": 0.1},
    {"loss": 1.0, "dco/weight": 0.5, "learning_rate": 1e-3, "step": 2, "epoch": 0.2},
    {"train_runtime": 3.0, "train_loss": 1.5, "step": 2, "epoch": 0.2},
]
EVALUATION = {
    "pass_at_n": {"1": 0.1, "4": 0.3},
    "interval": {"1": [0.08, 0.12], "4": [0.26, 0.34]},
    "loss": 0.5,
}


def make_run(folder, history=HISTORY, evaluation=EVALUATION):
    folder.mkdir(parents=True)
    if history is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    if evaluation is not None:
        (folder / "pass_at_n.json").write_text(json.dumps(evaluation))


def test_page_of_several_runs_is_self_contained(tmp_path):
    make_run(tmp_path / "A <b>")
    make_run(tmp_path / "B", evaluation={**EVALUATION, "loss": 0.4})
    page = write_report(tmp_path, title="Runs & more", note="a note").read_text()
    assert "Runs &amp; more" in page and "A &lt;b&gt;" in page and "<b>" not in page
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page and 'src="/' not in page
    assert '<td class="best">0.400</td>' in page and '<td class="best">0.500</td>' not in page
    for name in ("pass_at_n", "training"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_and_no_evaluation(tmp_path):
    make_run(tmp_path / "run", evaluation=None)
    histories, evaluations, _ = read_runs(tmp_path / "run")
    assert list(histories) == ["run"] and not evaluations
    assert write_report(tmp_path / "run").read_text().count("<img") == 1


def test_a_run_too_short_for_curves_still_reports(tmp_path):
    make_run(tmp_path / "run", history=HISTORY[:1], evaluation=None)
    page = write_report(tmp_path / "run").read_text()
    assert "<img" not in page and "<td>loss</td><td>2</td>" in page


def test_one_problem_has_no_interval(tmp_path):
    document = {"pass_at_n": {"1": 0.1}, "interval": {"1": None}}
    (tmp_path / "pass_at_n.json").write_text(json.dumps(document))
    assert write_report(tmp_path).exists()


def test_an_evaluation_written_into_a_run_s_own_folder_is_shown(tmp_path):
    make_run(tmp_path / "run", evaluation=None)
    make_run(tmp_path / "run" / "my model", history=None)
    make_run(tmp_path / "run" / "checkpoint-2", evaluation=None)
    for runs in ((), ("my model",)):
        page = write_report(tmp_path / "run", runs=runs).read_text()
        assert page.count("<img") == 2 and "<td>my model</td>" in page
        assert "<th>run</th>" in page and "checkpoint-2" not in page


def test_the_page_says_what_was_run_and_how_it_ended(tmp_path):
    args = DCOConfig(str(tmp_path / "run"), n_samples=17, learning_rate=2e-4, seed=5, bf16=False)
    make_run(tmp_path / "run", evaluation=None)
    trainer = SimpleNamespace(args=args, train_dataset=range(256), eval_dataset={"a": range(9)})
    trainer.state = SimpleNamespace(global_step=300, epoch=2.5)
    trainer.model = SimpleNamespace(name_or_path="a/model <b>")
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    print_report(tmp_path / "run", trainer)
    page = (tmp_path / "run" / "report.html").read_text()
    facts = {"model": "a/model &lt;b&gt;", "training rows": "256", "evaluation rows": "9"}
    facts |= {"steps": "300", "epochs": "2.5", "learning rate": "0.0002", "seed": "5"}
    facts |= {"n samples": "17", "loss": "1", "dco/weight": "0.5"}  # the last of each
    for fact, value in facts.items():
        assert f"<tr><td>{fact}</td><td>{value}</td></tr>" in page
    assert re.search(r"<td>ended</td><td>20\d\d-\d\d-\d\d \d\d:\d\d</td>", page)


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="Nothing to report"):
        write_report(tmp_path)


def test_missing_estimates_majority_votes_and_temperatures(tmp_path):
    for t in (0.5, 1.0):
        document = {
            **EVALUATION,
            "pass_at_n": {"1": 0.1, "4": None},
            "interval": {"1": [0.0, 0.2], "4": None},
            "maj_at_n": {"1": 0.1, "4": 0.2},
            "maj_interval": {"1": [0.0, 0.2], "4": [0.1, 0.3]},
            "model": "m",
            "adapter": None,
            "temperature": t,
        }
        make_run(tmp_path / f"m-T{t:g}", history=None, evaluation=document)
    page = write_report(tmp_path).read_text()
    assert page.count("<img") == 2 and "Coverage against temperature" in page
    assert (tmp_path / "figures" / "temperature.png").exists()


def test_scatter_of_repeats_and_marks(tmp_path):
    points = {
        "a 1": (np.array([0.1, 0.1, 0.1]), np.array([-3.0, -1.0, -0.7])),
        "b": (np.ones(1), np.zeros(1)),
    }
    names = {"xlabel": "x", "ylabel": "y", "marks": {"target": (0.5, 0.0)}}
    path = draw_scatter(tmp_path / "points.png", points, **names)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_half_a_document_in_a_folder_counts_as_absent(tmp_path, caplog):
    make_run(tmp_path / "A")
    make_run(tmp_path / "B")
    (tmp_path / "B" / "pass_at_n.json").write_text('{"pass_at_n": {"1": 0.')
    (tmp_path / "B" / "trainer_state.json").write_text("")
    histories, evaluations, _ = read_runs(tmp_path)
    assert list(histories) == list(evaluations) == ["A"]
    assert write_report(tmp_path).exists() and "pass_at_n.json is not whole" in caplog.text


def test_a_figure_that_fails_is_left_out_and_told(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no such\nfont")

    make_run(tmp_path / "run")
    monkeypatch.setattr(report, "draw_training", fails)
    print_report(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_text().count("<img") == 1
    failed, written = capsys.readouterr().out.splitlines()
    assert failed == (
        "No figure training.png in the report, since it failed: RuntimeError: no such font"
    )
    assert written == f"Report: {tmp_path / 'run' / 'report.html'}"


def test_a_report_that_fails_is_told_in_one_line(tmp_path, capsys):
    print_report(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"No report of {tmp_path}, since it failed: FileNotFoundError: Nothing")
