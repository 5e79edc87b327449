"""What the benchmark reports; how fast anything is, is never tested."""

import json
import logging

import pytest
from llmmix.eval import speed
from llmmix.eval.speed import SpeedArguments

from llmmix.timing import Case, measure_apart

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


def test_contenders_of_the_head_compute_the_same_loss(monkeypatch):
    """Else they could not be compared."""
    args = SpeedArguments(**SMALL)
    losses = []
    monkeypatch.setattr("torch.Tensor.backward", lambda loss: losses.append(loss.item()))
    for group in speed.head_cases(args):
        losses.clear()
        for case in group:
            case.built()()
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_contenders_of_a_step_train_on_the_same_rows(checkpoint, monkeypatch):
    args = SpeedArguments(model_name_or_path=[checkpoint], **SMALL)
    seen = []
    step = "transformers.Trainer.training_step"
    monkeypatch.setattr(step, lambda self, model, inputs, *_: seen.append(inputs))
    for group in speed.step_cases(args):
        seen.clear()
        for case in group:
            case.built()()
        ours, peers = (batch["input_ids"].sort(0).values.tolist() for batch in seen)
        assert ours == peers
        assert seen[0]["input_ids"].size(1) <= args.max_length


def test_peak_memory_is_that_of_one_call():
    """A call that holds 64 MiB, in a process of its own."""
    row = measure_apart([Case("row", "contender", hold, {"mib": 64})], rounds=1, device="cpu")
    assert 60 < row["contenders"]["contender"]["peak_mib"] < 90


def hold(mib):
    import torch

    return lambda: torch.zeros(mib * 2**18).add_(1)


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
