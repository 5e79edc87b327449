"""What ends a run of unlearning, and what it says."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from llmmix.unlearning.guards import STEPS_AVERAGED, UnlearningGuard, check_limit
from tests.unlearning.runs import lora, weights_of

pytestmark = pytest.mark.usefixtures("quick_collections")


class FakeAccelerator:
    """Two processes, of which the other adds what is given."""

    def __init__(self, other=None):
        self.other = other

    def gather(self, sums):
        return sums if self.other is None else torch.cat([sums, self.other.unsqueeze(0)])


def guard_of(other=None, **limits):
    trainer = SimpleNamespace(
        accelerator=FakeAccelerator(other),
        model=SimpleNamespace(training=True),
        evaluation_loop=None,
        _metrics={"train": {}, "eval": {}},
    )
    for mode in trainer._metrics:
        trainer._metrics[mode] = {"x/forget_prob": [], "x/retain_loss": []}
    return UnlearningGuard(trainer, **limits), trainer


def step(guard, control, number, steps=8, epochs=2, **means):
    """Add a step's means in two micro-batches of unequal counts, and end it."""
    for part, count in ((0.5, 1.0), (1.5, 3.0)):
        values = {
            name: (torch.tensor(mean * part * 4 / 5 * count), torch.tensor(count))
            for name, mean in means.items()
        }
        guard.add("x", values, (), {})
    state = TrainerState(global_step=number, max_steps=steps, num_train_epochs=epochs)
    guard.on_step_end(None, state, control)


def test_a_step_is_a_mean_over_its_counts_and_processes():
    other = torch.tensor([6.0, 2.0, 0.0, 0.0])  # sum and count of each
    guard, trainer = guard_of(other)
    values = {
        "forget_prob": (torch.tensor(1.0), torch.tensor(2.0)),
        "retain_loss": (torch.tensor(0.0), torch.tensor(0)),
    }
    guard.add("x", values, (), {})
    assert trainer._metrics["train"] == {"x/forget_prob": [7 / 4], "x/retain_loss": [0.0]}
    guard.add("x", values, (), {})
    trainer.model.training = False
    guard.add("x", {name: (s + 99, n) for name, (s, n) in values.items()}, (), {})
    trainer.model.training = True
    guard.on_step_end(None, TrainerState(max_steps=4, num_train_epochs=1), TrainerControl())
    assert guard.step == {"forget_prob": 14 / 8, "retain_loss": 0.0}  # evaluation is left out
    assert len(trainer._metrics["eval"]["x/forget_prob"]) == 1
    guard.add("x", values, (), {})
    guard.on_step_end(None, TrainerState(max_steps=4, num_train_epochs=1), TrainerControl())
    assert guard.step["forget_prob"] == 7 / 4  # each step anew


def test_the_mean_of_an_epoch_ends_a_run(caplog):
    guard, _ = guard_of(min_forget_prob=0.3)
    control = TrainerControl()
    for number, prob in enumerate((0.5, 0.1, 0.4, 0.3), 1):  # an epoch is four steps
        step(guard, control, number, forget_prob=prob)
        assert not control.should_training_stop
    with caplog.at_level(logging.WARNING):
        step(guard, control, 5, forget_prob=0.2)
    assert control.should_training_stop
    said = "Training ends at step 5: forget_prob has been 0.25 over the last 4 steps, below "
    assert said + "min_forget_prob=0.3" in caplog.text


def test_no_more_than_a_pass_of_steps_is_waited_for(caplog):
    guard, _ = guard_of(max_retain_loss=2.0)
    control = TrainerControl()
    for number in range(1, STEPS_AVERAGED + 1):
        assert not control.should_training_stop
        step(guard, control, number, steps=1000, epochs=1, retain_loss=2.5)
    assert control.should_training_stop
    assert (
        f"retain_loss has been 2.5 over the last {STEPS_AVERAGED} steps, above max_retain_loss=2"
        in (caplog.text)
    )


def test_state_goes_through_json_and_a_new_run_begins_anew():
    guard, _ = guard_of(min_forget_prob=0.3)
    control = TrainerControl()
    for number in range(1, 4):
        step(guard, control, number, forget_prob=0.2)
    saved = json.loads(json.dumps(guard.state()))
    state = TrainerState(
        global_step=3,
        max_steps=8,
        num_train_epochs=2,
        stateful_callbacks={"UnlearningGuard": saved},
    )
    again, _ = guard_of(min_forget_prob=0.3)
    again.on_train_begin(None, state, control)
    step(again, control, 4, forget_prob=0.2)
    assert control.should_training_stop  # the fourth of an epoch, three of them before the stop
    control = TrainerControl()
    again.on_train_begin(None, TrainerState(), control)
    step(again, control, 1, forget_prob=0.2)
    assert not control.should_training_stop


@pytest.mark.parametrize("value", [0, -1, 1, math.nan, math.inf])
def test_limits_outside_their_range_are_refused(value):
    with pytest.raises(ValueError, match=f"`x` must lie between 0 and 1, got {value}"):
        check_limit("x", value, top=1)
    check_limit("x", None)
    check_limit("x", 5.0)


@pytest.mark.parametrize("name", ["flat", "npo"])
def test_enough_forgotten_ends_training_after_an_epoch(make, name, caplog):
    trainer = make(name, min_forget_prob=0.999, max_steps=20)
    trainer.train()
    assert trainer.state.global_step == 3  # ten rows by four
    assert "Training ends at step 3: forget_prob has been" in caplog.text
    assert "over the last 3 steps, below min_forget_prob=0.999." in caplog.text


def test_a_run_that_was_ended_and_is_resumed_trains_no_step_more(make):
    given = {"min_forget_prob": 0.999, "max_steps": 20, "save_strategy": "steps", "save_steps": 1}
    ended = make("npo", **given)
    ended.train()
    again = make("npo", **given)
    again.training_step = None  # a step would fail
    again.train(resume_from_checkpoint=f"{ended.args.output_dir}/checkpoint-3")
    assert torch.equal(weights_of(again), weights_of(ended))
    longer = make("npo", **{**given, "min_forget_prob": None, "max_steps": 4})
    longer.train(resume_from_checkpoint=f"{ended.args.output_dir}/checkpoint-3")
    assert longer.state.global_step == 4


@pytest.mark.parametrize("peft", [None, lora()])
def test_lost_utility_ends_training(make, peft, caplog):
    trainer = make("grad_diff", max_retain_loss=0.01, max_steps=20, peft=peft)
    trainer.train()
    assert trainer.state.global_step == 3
    assert "retain_loss has been" in caplog.text and "above max_retain_loss=0.01." in caplog.text


def test_a_limit_that_is_not_reached_ends_nothing(make, caplog):
    trainer = make("grad_diff", max_retain_loss=1e6, min_forget_prob=1e-30, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and "Training ends" not in caplog.text


def test_the_probability_of_idk_is_watched_or_its_limit_refused(make, caplog):
    """Its run has no forward of the answers to forget."""
    try:
        trainer = make("idk", min_forget_prob=0.999, max_steps=6)
    except ValueError as error:
        assert "min_forget_prob" in str(error)
    else:
        trainer.train()
        assert trainer.state.global_step == 3 and "Training ends" in caplog.text
