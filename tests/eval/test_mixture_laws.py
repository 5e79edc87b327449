"""`llmmix eval mixture_laws`: from two tables to judged laws, a proposal and what to run next."""

import csv
import functools
import json
from contextlib import nullcontext

import numpy as np
import pytest
from joblib import parallel_config
from llmmix.eval.mixture_laws import LAWS, MixtureLawsArguments, main

from llmmix import cli, laws
from llmmix.files import CLAIM

QUICK = ["linear", "effective"]


def write(path, columns, rows, ids=None):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run_id", "name", *columns])
        for i, row in enumerate(rows):
            name = f"run-{i:04d}" if ids is None else ids[i]
            writer.writerow([name, name, *row])
    return str(path)


def world(mixtures, offset=0.0):
    """Code wants code, docs wants docs, and a little of code."""
    code = 2 + (0.05 + mixtures[:, 0]) ** -0.4
    docs = 3 + (0.05 + mixtures[:, 1] + 0.3 * mixtures[:, 0]) ** -0.3
    return np.stack([code, docs], 1) - offset


@pytest.fixture
def tables(tmp_path):
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(3), 30).round(4)
    mixtures /= mixtures.sum(1, keepdims=True)
    losses = world(mixtures) + 0.005 * rng.standard_normal((30, 2))
    ratios = write(tmp_path / "ratios.csv", ["code", "docs", "noise"], mixtures)
    return ratios, write(tmp_path / "metrics.csv", ["code_val_loss", "docs_val_loss"], losses)


@pytest.fixture
def run(tables, tmp_path):
    def go(**options):
        options = {"laws": QUICK, "output_dir": str(tmp_path / "out")} | options
        return main(MixtureLawsArguments(*tables, **options))

    return go


def test_from_tables_to_a_proposal(run, tmp_path, capsys):
    document = run()
    printed = capsys.readouterr().out
    assert "30 runs of 3 domains: code, docs, noise." in printed
    assert document["law"] == "effective" and "Best on held-out runs: effective." in printed
    assert document["judged"]["effective"]["error"] < document["judged"]["linear"]["error"]
    proposal = document["proposal"]
    shares = np.array(list(proposal["mixture"].values()))
    assert shares.sum() == pytest.approx(1) and shares[2] < 0.02
    grid = np.random.default_rng(1).dirichlet(np.ones(3), 20_000)
    assert world(shares[None]).mean() < world(grid).mean(1).min() + 0.01
    assert proposal["low"]["code"] < proposal["losses"]["code"] < proposal["high"]["code"]
    assert proposal["best_observed"] > proposal["objective"] - 0.05
    files = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {"predicted.png", "effects.png", "proposal.png"}
    assert files == figures | {"mixture_laws.json", "proposal.csv", CLAIM}
    kept = json.loads((tmp_path / "out/mixture_laws.json").read_text())
    assert kept["proposal"]["mixture"] == proposal["mixture"]
    assert kept["judged"]["mean"]["objective_spearman"]["estimate"] is None


def test_names_that_look_like_mathematics_and_figures_that_fail(tmp_path, monkeypatch, capsys):
    mixtures = np.random.default_rng(0).dirichlet(np.ones(3), 20)
    names = ["$a$ $", r"$\frac$", "_c"]
    ratios = write(tmp_path / "r.csv", names, mixtures)
    metrics = write(tmp_path / "$m$ $.csv", [f"{n}_loss" for n in names], 3 - mixtures)
    given = {"laws": ["linear"], "budget": True, "transfer": [ratios, metrics]}
    out = tmp_path / "out"
    main(MixtureLawsArguments(ratios, metrics, output_dir=str(out), **given))
    assert "since it failed" not in capsys.readouterr().out
    assert len(list(out.glob("*.png"))) == 5

    def fails(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr("llmmix.laws.study.draw_effects", fails)
    main(MixtureLawsArguments(ratios, metrics, output_dir=str(tmp_path / "next"), **given))
    said = "No figure effects.png, since it failed: RuntimeError: no room"
    assert capsys.readouterr().out.count(said) == 1
    assert (tmp_path / "next/mixture_laws.json").exists()
    assert len(list((tmp_path / "next").glob("*.png"))) == 4


def test_the_objective_is_what_was_asked_for(run):
    by_name = run(objective=["code"])["proposal"]["mixture"]
    by_column = run(objective=["code_val_loss"])["proposal"]["mixture"]
    assert by_name == by_column and by_name["code"] > 0.95
    docs = run(objective=["code=0", "docs=2"])["proposal"]["mixture"]
    assert docs["docs"] > docs["code"]


def test_bounds_data_and_prior_hold(run):
    mixture = run(objective=["code"], upper=["code=0.5"], lower=["noise=0.2"])["proposal"][
        "mixture"
    ]
    assert mixture["code"] == pytest.approx(0.5) and mixture["noise"] >= 0.2 - 1e-9
    plan = {"available": ["code=1e9"], "tokens": 1e10, "max_epochs": 4}
    assert run(objective=["code"], **plan)["proposal"]["mixture"]["code"] == pytest.approx(0.4)
    prior = {"prior": ["code=0.1", "docs=0.1", "noise=0.8"], "closeness": 100.0}
    assert run(**prior)["proposal"]["mixture"]["noise"] == pytest.approx(0.8, abs=0.01)


def test_the_next_runs_are_a_table_that_can_be_read(run, tmp_path):
    document = run(next=4)
    assert len(document["next"]["mixtures"]) == 4
    with (tmp_path / "out/next.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run_id"] for row in rows] == [f"next-{i:04d}" for i in range(4)]
    assert all(
        sum(float(row[d]) for d in ("code", "docs", "noise")) == pytest.approx(1) for row in rows
    )
    assert document["next"]["after"][-1] < document["next"]["before"]


def test_the_budget_is_error_against_runs(run, tmp_path):
    budget = run(budget=True)["budget"]
    errors = [point["error"] for point in budget["curves"]["effective"]]
    assert errors[-1] < errors[0]
    assert budget["runs_needed"] in [point["runs"] for point in budget["curves"]["effective"]]
    assert (tmp_path / "out/budget.png").exists()


def test_large_runs_judge_the_law_of_small_ones(run, tmp_path, capsys):
    mixtures = np.random.default_rng(5).dirichlet(np.ones(3), 12)
    # Their domains and targets come in another order
    ratios = write(tmp_path / "big_ratios.csv", ["noise", "docs", "code"], mixtures[:, ::-1])
    losses = 0.5 * world(mixtures)[:, ::-1]
    metrics = write(tmp_path / "big_metrics.csv", ["docs_val_loss", "code_val_loss"], losses)
    (transfer,) = run(transfer=[ratios, metrics])["transfer"]
    assert min(transfer["laws"]["effective"]["by_target"]["spearman"]) > 0.97
    assert transfer["laws"].keys() == {"linear", "effective"}
    assert transfer["calibration"]["slope"] == pytest.approx([0.5, 0.5], abs=0.05)
    assert "effective on these 12 runs" in capsys.readouterr().out
    assert (tmp_path / "out/transfer_1.png").exists()


def test_fewer_runs_may_be_used(run, capsys):
    first, again, other = (run(max_runs=12, seed=seed)["judged"] for seed in (0, 0, 1))
    assert "12 of 30 runs are used" in capsys.readouterr().out
    assert first["effective"]["error"] == again["effective"]["error"] != other["effective"]["error"]


def test_a_law_that_cannot_be_fitted_says_why_and_the_others_go_on(tmp_path, capsys):
    mixtures = np.random.default_rng(0).dirichlet(np.ones(6), 5)
    names = list("abcdef")
    ratios = write(tmp_path / "r.csv", names, mixtures)
    metrics = write(tmp_path / "m.csv", ["a_loss"], 2 - mixtures[:, :1])
    document = main(
        MixtureLawsArguments(ratios, metrics, laws=QUICK, output_dir=str(tmp_path / "out"))
    )
    assert "LinearLaw" in document["judged"]["linear"]
    assert "Note: linear: " in capsys.readouterr().out
    assert document["law"] == "effective"


@pytest.mark.parametrize(
    "names",
    [["linear", "boosted"], pytest.param(LAWS, marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_all_laws_on_a_few_runs(names, run, monkeypatch):
    few = functools.partial(laws.GradientBoostedLaw, n_estimators=20, learning_rate=0.2)
    monkeypatch.setattr(laws, "GradientBoostedLaw", few)
    # Processes take seconds to start: the slow case has them, as a user does
    with nullcontext() if names is LAWS else parallel_config(backend="threading"):
        document = run(laws=list(names), law="boosted")
    assert not [name for name in names if isinstance(document["judged"][name], str)]
    assert "mean of the best 128" in document["proposal"]["found"]["method"]


def test_from_the_command_line(tables, tmp_path):
    command = ["eval", "mixture_laws", "--ratios", tables[0], "--metrics", tables[1]]
    cli.main([*command, "--laws", "linear", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/mixture_laws.json").exists()


def test_what_an_online_run_believed_is_assessed(tmp_path, capsys):
    lines = [
        {
            "domains": ["a", "b"],
            "rows": [9, 9],
            "targets": ["x", "y", "z"],
            "method": "Told",
            "draws_a_step": 10,
            "weights": [0.5, 0.5],
        }
    ]
    matrix, losses = np.array([[0.02, 0.0], [0.0, 0.01], [0.01, 0.01]]), np.array([4.0, 3.0, 5.0])
    rng = np.random.default_rng(0)
    lines.append({"step": 0, "measured": {"losses": losses.tolist()}})
    lines.append({"step": 0, "weights": [0.5, 0.5], "matrix": matrix.tolist()})
    for step in range(1, 201):
        shares = np.array([0.8, 0.2] if step // 10 % 2 else [0.3, 0.7])
        losses = losses - matrix @ shares
        lines.append({"step": step, "counts": (10 * shares).round().astype(int).tolist()})
        if step % 10 == 0:
            measured = losses + 1e-4 * rng.standard_normal(3)
            lines.append({"step": step, "measured": {"losses": measured.tolist()}})
    (tmp_path / "mixture.jsonl").write_text("\n".join(map(json.dumps, lines)))
    document = main(MixtureLawsArguments(run=str(tmp_path), output_dir=str(tmp_path / "out")))
    assert document["fidelity"]["similarity_of_mean"] > 0.95
    assert document["fidelity"]["implied_r2"] > 0.6
    assert "Told: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": ["web"]}, "web"),
        ({"objective": ["code=x"]}, "`objective` takes NAME=NUMBER"),
        ({"objective": ["code=1", "code=2"]}, "`objective` has a name twice"),
        ({"objective": ["code=-1"]}, "weights of at least 0"),
        ({"laws": ["linear", "magic"]}, "`laws`: no law magic; there are linear"),
        ({"law": "exponential"}, "`law` 'exponential' is not among the `laws`"),
        ({"holdout": 0.9}, "`holdout` must lie above 0"),
        ({"level": 90.0}, "`level` must lie between 0.5 and 1"),
        ({"transfer": ["a.csv"]}, "`transfer` takes pairs of tables"),
        ({"upper": ["web=0.5"]}, "`upper`: no domain web"),
        ({"prior": ["code=0.5"]}, "`prior`"),
        ({"max_runs": 2}, "`max_runs` must be 3 or more, got 2"),
        ({"next": -1}, "`next` must be 0 or more"),
        ({"tokens": 1e9}, "A limit on epochs takes"),
    ],
)
def test_bad_requests_are_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_half_a_request_is_refused(tables):
    with pytest.raises(ValueError, match="`ratios` and `metrics` go together"):
        main(MixtureLawsArguments(ratios=tables[0]))
    with pytest.raises(ValueError, match="or the folder of a `run`"):
        main(MixtureLawsArguments())


def test_large_runs_of_other_domains_are_refused(run, tmp_path):
    ratios = write(tmp_path / "r.csv", ["code", "web"], [[0.5, 0.5], [0.2, 0.8], [0.1, 0.9]])
    metrics = write(tmp_path / "m.csv", ["code_val_loss"], [[1], [2], [3]])
    with pytest.raises(ValueError, match="must have the domains of `ratios`"):
        run(transfer=[ratios, metrics])
