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


@pytest.mark.slow
def test_every_row_names_its_contenders_and_their_ratios(checkpoint, tmp_path, capsys):
    args = SpeedArguments(model_name_or_path=[checkpoint], output_dir=str(tmp_path), **SMALL)
    result = speed.main(args)
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    names = [row["row"] for row in result["rows"]]
    assert names[:3] == [
        "frozen head",
        "trained head, recomputing",
        "trained head, within the budget",
    ]
    # shares masked, full and LoRA, sampling, and draws
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 5 + 1 + 2
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
        ({"device": "tpu"}, "`device`"),
    ],
)
def test_bad_input_names_the_argument(given, message):
    with pytest.raises(ValueError, match=message):
        speed.main(SpeedArguments(**{**SMALL, **given}))
