"""What the benchmark reports; how fast anything is, is never tested."""

import json
import logging

import pytest
from llmmix.eval import speed
from llmmix.eval.speed import SpeedArguments

SMALL = {
    "rows": 32,
    "hidden_size": 16,
    "vocab_size": 200,
    "masked": [0.0, 0.5],
    "rounds": 1,
    "device": "cpu",
    "batch_size": 2,
    "max_length": 24,
    "batch_sizes": [2],
    "memory": False,
    "prompts": 2,
    "num_samples": 3,
    "max_new_tokens": 8,
    "draws": 500,
}


@pytest.fixture(autouse=True)
def loud():
    """What `main` silences must be heard by the tests that follow."""
    yield
    logging.disable(logging.NOTSET)


def test_one_row_of_a_kind_is_printed_and_written(checkpoint, tmp_path, capsys):
    given = {**SMALL, "kinds": ["head", "draws"], "masked": [0.0]}
    result = speed.main(SpeedArguments(output_dir=str(tmp_path), **given))
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert [row["row"] for row in result["rows"]] == [
        "frozen head",
        "trained head, recomputing",
        "trained head, within the budget",
        "which of 500 rows come next",
        "10 rows read",
    ]
    assert "interleave_datasets, streaming" in capsys.readouterr().out


def test_padding_is_printed_beside_its_worth(checkpoint, tmp_path, monkeypatch, capsys):
    """The calls are timed in this process."""

    def in_this_process(cases, **_):
        calls = [case.built() for case in cases]
        times = zip(calls, (1.0, 2.0), strict=True)
        figures = [{"seconds": s, "peak_mib": None, **call()} for call, s in times]
        figures[1]["time_ratio"] = 0.5
        names = (case.contender for case in cases)
        return {"row": cases[0].row, "contenders": dict(zip(names, figures, strict=True))}

    monkeypatch.setattr(speed, "measure_apart", in_this_process)
    given = {**SMALL, "kinds": ["padding"], "methods": ["nll"], "batch_sizes": [4]}
    args = SpeedArguments(model_name_or_path=[checkpoint], output_dir=str(tmp_path), **given)
    (row,) = speed.main(args)["rows"]
    figures = row["contenders"]["padded"]
    assert row["row"].startswith("nll, ") and row["row"].endswith(", 4 rows")
    assert figures["padding"] == 1 - figures["tokens"] / figures["read"] > 0
    shown = capsys.readouterr().out
    assert f"{figures['padding']:.0%} padding" in shown
    half = (
        f"{figures['tokens']} real tokens a second without it, {figures['tokens'] / 2:.0f} padded"
    )
    assert half in shown and "2.00x" in shown


@pytest.mark.slow
def test_every_row_names_its_contenders_and_their_ratios(checkpoint, tmp_path, capsys):
    given = {**SMALL, "methods": ["SFT on our head", "dft", "nll"]}
    args = SpeedArguments(model_name_or_path=[checkpoint], output_dir=str(tmp_path), **given)
    result = speed.main(args)
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    names = [row["row"] for row in result["rows"]]
    assert names[:3] == [
        "frozen head",
        "trained head, recomputing",
        "trained head, within the budget",
    ]
    # shares masked, full and LoRA, a batch without padding, sampling, and draws
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 2 + 1 + 1 + 2
    *trained, sampled, drawn, read = result["rows"]
    for row in trained:
        ours, *peers = row["contenders"].values()
        assert len(peers) == (2 if "head" in row["row"] and "SFT" not in row["row"] else 1)
        for peer in peers:
            assert peer["time_ratio"] == ours["seconds"] / peer["seconds"] > 0
    assert [len(row["contenders"]) for row in (drawn, read)] == [3, 3]
    assert all("interleave_datasets" in row["contenders"] for row in (drawn, read))
    ours, theirs, bound = sampled["contenders"].values()
    assert ours["completions"] == theirs["completions"] == 6
    assert 0 < ours["tokens"] <= 48 and 0 < theirs["tokens"] <= 48
    assert bound["time_ratio"] == ours["seconds"] / bound["seconds"]
    shown = capsys.readouterr().out
    assert "frozen head" in shown and "tokens a second" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kinds": ["heads"]}, "`kinds`"),
        ({"masked": [1.0]}, "`masked`"),
        ({"rounds": 0}, "`rounds`"),
        ({"methods": ["dtf"]}, "`methods`"),
        ({"tuning": ["lora"]}, "`tuning`"),
        ({"batch_sizes": [3]}, "`batch_sizes`"),
        ({"device": "tpu"}, "`device`"),
    ],
)
def test_bad_input_names_the_argument(given, message):
    with pytest.raises(ValueError, match=message):
        speed.main(SpeedArguments(**{**SMALL, **given}))
