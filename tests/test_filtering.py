import json

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from llmmix import DCOConfig, DCOTrainer, attach_weights
from llmmix.dco import dco_weight
from llmmix.filtering import (
    FilteredSampler,
    LikelihoodFilter,
    attach_filter,
)
from llmmix.grading.verify import Verifier
from llmmix.rows.turn_ends import score_what_is_sampled
from llmmix.solve_rates import SolveRates

SETTINGS = {
    "max_steps": 6,
    "optim": "sgd",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SAMPLING = {"num_samples": 8, "max_new_tokens": 6, "refresh_every": 2, "warmup_steps": 2}


def has_even_length(completion, answer):
    return len(completion) % 2 == 0


@pytest.fixture
def make(checkpoint, math_rows, tmp_path):
    def build(name="run", rows=math_rows, **given):
        args = DCOConfig(str(tmp_path / name), **{**SETTINGS, "n_samples": 4, **given})
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        return DCOTrainer(checkpoint, args, train_dataset=rows, processing_class=tokenizer)

    return build


def finish(trainer, **options):
    trainer.train(**options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).cpu()


def assert_same_run(a, b):
    """Equal to the last digit; a GPU adds up in any order, and is held to `CLOSE`."""
    exact = not torch.cuda.is_available()
    assert a[0] == (b[0] if exact else pytest.approx(b[0], rel=1e-5))
    torch.testing.assert_close(a[1], b[1], **({"rtol": 0, "atol": 0} if exact else CLOSE))


def test_sampler_fills_up_from_further_candidates():
    asked = []

    def even(rows):
        asked.append(rows)
        return [row % 2 == 0 for row in rows]

    sampler = FilteredSampler(10, even, candidates=4, seed=0)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(second) == 10 and all(row % 2 == 0 for row in first + second)
    # each pass asks about every row once, and what was kept of it comes once
    passes = sum(asked, [])
    for start in range(0, len(passes) - 9, 10):
        assert sorted(passes[start : start + 10]) == list(range(10))
    assert (first + second)[:5] != (first + second)[5:10]
    assert sorted((first + second)[:5]) == [0, 2, 4, 6, 8]


def test_sampler_goes_on_from_its_state():
    def some(rows):
        return [row % 3 != 0 for row in rows]

    whole = FilteredSampler(12, some, 5, seed=1)
    expected = list(whole) + list(whole)
    stopped = FilteredSampler(12, some, 5, seed=1)
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(7)]
    resumed = FilteredSampler(12, some, 5, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    again = list(resumed)
    assert again[:7] == seen and again + list(resumed) == expected
    # read to its end, as by a loader that reads ahead, and then resumed before or after that end
    ahead = FilteredSampler(12, some, 5, seed=1)
    list(ahead)
    resumed.load_state_dict(ahead.state_dict())
    assert list(resumed) + list(resumed) == expected
    resumed.load_state_dict(ahead.state_dict(), new_epoch=True)
    assert list(resumed) == expected[12:]


def test_sampler_ends_when_a_pass_keeps_nothing():
    sampler = FilteredSampler(10, lambda rows: [False] * len(rows), 4, seed=0)
    assert list(sampler) == [] and sampler.exhausted


def test_likelihood_filter_is_f_above_the_threshold(make):
    trainer = make()

    def last_alone(row):
        last = max(place for place, label in enumerate(row["labels"]) if label != -100)
        return {"labels": [-100 if at != last else y for at, y in enumerate(row["labels"])]}

    # the last token alone: a random model is too unsure of whole answers for F to differ
    trainer.train_dataset = trainer.train_dataset.map(last_alone)
    rows = list(range(len(trainer.train_dataset)))
    logps = []
    for row in rows:
        example = trainer.train_dataset[row]
        ids, labels = example["input_ids"], example["labels"]
        with torch.no_grad():
            given = torch.tensor([ids], device=trainer.args.device)
            scores = trainer.model(given).logits[0, :-1].log_softmax(-1)
        logps.append(sum(scores[i, y] for i, y in enumerate(labels[1:]) if y != -100))
    logps = torch.stack(logps)
    n = max(2, int(1 / logps.double().exp().median()))  # splits them
    trainer.model.train()
    kept = LikelihoodFilter(trainer, n_samples=n, threshold=0.5)(rows)
    expected = dco_weight(logps, n) > 0.5
    assert torch.equal(kept, expected) and 0 < kept.sum() < len(rows)
    assert trainer.model.training


def test_a_filter_that_keeps_all_is_its_warm_up(make):
    plain, filtered = make("a"), make("b")
    attach_filter(plain, lambda rows: torch.zeros(len(rows), dtype=torch.bool), warmup_steps=99)
    attach_filter(filtered, lambda rows: torch.ones(len(rows), dtype=torch.bool), warmup_steps=0)
    (losses, weights), (again, same) = finish(plain), finish(filtered)
    assert_same_run((losses, weights), (again, same))


def test_batches_stay_full_and_hold_kept_rows_alone(make):
    trainer = make(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    kept = {1, 3, 5, 7, 11, 13}
    attach_filter(trainer, lambda rows: torch.tensor([r in kept for r in rows]), warmup_steps=2)
    seen = []

    def ones(rows):
        seen.append(rows)
        return torch.ones(len(rows))

    attach_weights(trainer, ones)
    trainer.train()
    assert len(seen) == 6 and {len(rows) for rows in seen} == {4}
    # the last micro-batch before the end of the warm-up is read before it ends
    assert all(set(rows) <= kept for rows in seen[3:])
    assert not set(seen[0]) <= kept
    logged = [entry["filter/kept"] for entry in trainer.state.log_history if "filter/kept" in entry]
    assert len(logged) == 4 and 0 < max(logged) < 0.6  # none is logged in the warm-up


def test_training_ends_when_nothing_is_kept(make, caplog):
    trainer = make(max_steps=50)
    attach_filter(trainer, lambda rows: torch.zeros(len(rows), dtype=torch.bool), warmup_steps=2)
    trainer.train()
    assert 2 <= trainer.state.global_step <= 4
    assert "kept none of the 24 rows" in caplog.text


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_weights_of_one_are_cross_entropy_and_of_zero_stand_still(make, reduction):
    plain = make("plain", n_samples=1, reduction=reduction)
    score_what_is_sampled(plain)  # as it is with a larger N
    weighed = make("weighed", n_samples=64, reduction=reduction)
    attach_weights(weighed, lambda rows: torch.ones(len(rows)))
    (losses, weights), (again, same) = finish(plain), finish(weighed)
    close = CLOSE if torch.cuda.is_available() else {"rtol": 1e-6, "atol": 1e-8}
    assert losses == pytest.approx(again, rel=close["rtol"])
    torch.testing.assert_close(weights, same, **close)
    frozen = make("frozen", n_samples=64, reduction=reduction)
    before = torch.cat([p.detach().flatten().clone() for p in frozen.model.parameters()])
    attach_weights(frozen, lambda rows: torch.zeros(len(rows)))
    losses, after = finish(frozen)
    assert losses == [0.0] * 6 and torch.equal(before.cpu(), after)


def test_weights_reach_their_own_rows_under_accumulation(make):
    def weights(rows):
        return torch.tensor([(row % 3) / 2 for row in rows])

    runs = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make(
            f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        attach_weights(trainer, weights)
        runs.append(finish(trainer))
    close = CLOSE if torch.cuda.is_available() else {"rtol": 1e-5, "atol": 1e-7}
    for losses, parameters in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        torch.testing.assert_close(parameters, runs[0][1], **close)


def test_solve_rates_are_shares_of_right_samples(make):
    trainer = make()
    seen = []

    def verify(completion, answer):
        seen.append((completion, answer))
        return completion < "5"

    rates = SolveRates(trainer, Verifier(verify), **{**SAMPLING, "num_samples": 20})
    rows = [3, 5, 3]
    assert torch.equal(rates(rows), torch.zeros(3, dtype=torch.float64)) and not seen  # warm-up
    trainer.state.global_step = 2
    first = rates(rows)
    assert first[0] == first[2] and (first * 20 == (first * 20).round()).all() and 0 < first.sum()
    assert {answer for _, answer in seen} == set(trainer.train_dataset[[3, 5]]["answer"])
    count = len(seen)
    trainer.state.global_step = 3
    assert torch.equal(rates(rows), first) and len(seen) == count  # still fresh
    trainer.state.global_step = 4
    rates(rows)
    assert len(seen) > count  # sampled again, other completions
    torch.testing.assert_close(
        rates.weights(rows), dco_weight(rates(rows).log(), trainer.args.n_samples)
    )
    assert torch.equal(rates.below(0.5)(rows), rates(rows) < 0.5)


def test_soft_weights_of_shares_of_64():
    rates = torch.arange(9, dtype=torch.float64) / 64
    expected = [1, 0.583893, 0.311451, 0.15281, 0.069709, 0.029902, 0.012178, 0.004744, 0.001777]
    assert dco_weight(rates.log(), 64).tolist() == pytest.approx(expected, abs=1e-6)


def test_failed_verifications_leave_the_estimate(make, caplog):
    trainer = make()

    def verify(completion, answer):
        return 1 / 0

    rates = SolveRates(trainer, Verifier(verify), min_samples=2, **SAMPLING)
    trainer.state.global_step = 2
    assert rates([0, 1]).tolist() == [0, 0]
    assert trainer._metrics["train"]["solve_rate/failed"] == [1.0]
    assert "100% of the verifications failed (ZeroDivisionError" in caplog.text


def chain_of_thought(trainer):
    rates = SolveRates(trainer, Verifier(has_even_length), **SAMPLING)
    attach_filter(trainer, rates.below(0.5), warmup_steps=2)
    attach_weights(trainer, rates.weights)
    return trainer


def test_samples_are_drawn_under_bf16(make):
    losses, _ = finish(chain_of_thought(make(bf16=True, max_steps=3)))
    assert len(losses) == 3


@pytest.mark.parametrize(
    "stop", [pytest.param(3, marks=pytest.mark.slow), 5, 6, pytest.param(7, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_equals_never_stopped(make, math_rows, stop):
    """In the middle of an epoch, before its short last batch, at its end, and after it."""
    given = {"rows": math_rows.take(22), "max_steps": 9}  # six steps an epoch
    whole = chain_of_thought(make("whole", **given))
    losses, weights = finish(whole)
    given |= {"save_strategy": "steps", "save_steps": stop}
    stopped = make("half", **given)
    stopped.add_callback(StopAt(stop))
    finish(chain_of_thought(stopped))
    again = chain_of_thought(make("half", **given))
    resumed, same = finish(again, resume_from_checkpoint=True)
    assert_same_run((losses, weights), (resumed, same))
    metrics = [entry for entry in whole.state.log_history if "filter/kept" in entry]
    assert 0 < min(entry["filter/kept"] for entry in metrics) < 1
    assert any(0 < entry["solve_rate/mean"] < 1 for entry in metrics)


def test_training_twice_begins_anew(make):
    trainer = chain_of_thought(make())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    losses, _ = finish(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(before[name])
    trainer.optimizer = trainer.lr_scheduler = None
    assert finish(trainer)[0] == (
        pytest.approx(losses, rel=1e-5) if torch.cuda.is_available() else losses
    )


def test_rows_that_end_inside_a_window_end_the_training(make, caplog):
    trainer = make(max_steps=50, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    attach_filter(trainer, lambda rows: torch.zeros(len(rows), dtype=torch.bool), warmup_steps=1)
    trainer.train()
    assert "kept none of the 24 rows" in caplog.text


def test_a_filter_may_be_added_to_a_run_that_is_resumed(make):
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    stopped = make("half", **given)
    stopped.add_callback(StopAt(2))
    stopped.train()
    again = make("half", **given)
    attach_filter(again, lambda rows: torch.ones(len(rows), dtype=torch.bool))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_samples": 9, "num_samples": 8}, "`min_samples` must lie between"),
        ({"refresh_every": 0}, "`min_samples` must lie between"),
        ({"verifier": "maths"}, "no 'maths'"),
    ],
)
def test_bad_arguments_of_solve_rates(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        SolveRates(make(), **{"max_new_tokens": 8} | arguments)


def test_what_cannot_be_filtered_is_refused(make, math_rows):
    with pytest.raises(ValueError, match=r"\['answer'\] is missing"):
        SolveRates(make(rows=math_rows.remove_columns("answer")))
    blank = math_rows.remove_columns("answer").add_column("answer", ["1"] * 23 + [""])
    with pytest.raises(ValueError, match="Row 23 has no `answer`"):
        SolveRates(make(rows=blank))
    with pytest.raises(ValueError, match="`dataloader_num_workers=2`"):
        attach_filter(make(dataloader_num_workers=2), lambda rows: rows)
    with pytest.raises(ValueError, match="`dispatch_batches`"):
        attach_filter(make(accelerator_config={"dispatch_batches": True}), lambda rows: rows)
    streamed = make()
    streamed.train_dataset = streamed.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="must not be streamed; got IterableDataset"):
        attach_filter(streamed, lambda rows: rows)
    twice = make()
    attach_filter(twice, lambda rows: rows)
    with pytest.raises(ValueError, match="has a filter already"):
        attach_filter(twice, lambda rows: rows)
    with pytest.raises(
        ValueError, match="leave no room for max_new_tokens=1024 in a context of 256"
    ):
        SolveRates(make())
    with pytest.raises(ValueError, match="`token_budget` of 50"):
        SolveRates(make(), max_new_tokens=40, token_budget=50)
    with pytest.raises(ValueError, match="`threshold` must lie"):
        LikelihoodFilter(make(), threshold=0.0)
