"""A controller's plan lands on its steps, and measuring moves nothing else."""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from llmmix.mixing import AioliCallback, AioliConfig, MixtureCallback, attach_mixture
from llmmix.mixing.controllers import Segment
from llmmix.mixing.record import drawn_shares
from tests.mixing.runs import (
    ONE_HOT,
    PHASE_OF_STEP,
    PHASES,
    WEIGHTS,
    Phases,
    Setting,
    counts_of,
    domains_read,
    finish,
    mixed,
    sampler_of,
)

# Plans


@pytest.mark.parametrize("workers", [0, 2])
def test_the_phases_of_a_plan_land_on_their_steps(phased, workers):
    log, _, trainer, controller, sampler = phased(workers=workers)
    counts = counts_of(trainer.args.output_dir)
    assert counts == domains_read(trainer) and len(counts) == 16
    for count, domain in zip(counts, PHASE_OF_STEP, strict=False):
        assert sum(count) == 4
        assert count[2] == 0 if domain is None else count[domain] == 4
    told = [(t["step"], t["steps"], sorted(t["signal"])) for t in controller.told]
    turn = [(1, 1, "losses"), (6, 2, "train"), (6, 0, "losses"), (7, 1, "losses")]
    expected = [(7 * n + s, k, [name]) for n in range(3) for s, k, name in turn]
    assert told == [*expected[:9], (16, 0, ["losses"])]  # cut short by the end
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "loss" in e}
    drawn = np.array(counts)
    for t in controller.told:
        steps = range(t["step"] - t["steps"] + 1, t["step"] + 1)
        assert t["learning_rate"] == pytest.approx(sum(rates[s] for s in steps))
        own = drawn[t["step"] - t["steps"] : t["step"]].sum(0)
        assert t["shares"] == pytest.approx((own / max(own.sum(), 1)).tolist())
    assert list(sampler.counts.values()) == drawn.sum(0).tolist()
    assert drawn_shares(trainer.args.output_dir) == dict(
        zip("abc", (drawn.sum(0) / drawn.sum()).tolist(), strict=True)
    )


def test_the_signal_train_is_of_the_step_and_of_what_was_drawn(phased):
    controller = phased()[3]
    for told in controller.told:
        if "train" in told["signal"]:
            known = np.isfinite(told["signal"]["train"])
            assert known.tolist() == [False, True, False]  # two steps on b


def test_phases_keep_their_steps_when_a_run_is_resumed_with_other_batches(make, tmp_path):
    """Or it is refused."""
    whole = make(max_steps=14, save_strategy="steps", save_steps=3)
    mixed(whole, Phases(*PHASES))
    whole.train()
    again = make(max_steps=14, gradient_accumulation_steps=4)
    mixed(again, Phases(*PHASES))
    try:
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    except ValueError as error:
        assert "batch" in str(error)
        return
    assert again.state.global_step == 14
    for count, domain in zip(domains_read(again), PHASE_OF_STEP[3:], strict=False):
        assert sum(count) == 8
        assert count[2] == 0 if domain is None else count[domain] == 8


def test_two_cannot_decide_the_weights(make):
    sampler = sampler_of()
    trainer = make(max_steps=6)
    attach_mixture(
        trainer, sampler, MixtureCallback(sampler, lambda *_: Phases((WEIGHTS, 3, None)))
    )
    trainer.add_callback(Setting(sampler, {1: ONE_HOT["a"]}))
    with pytest.raises(ValueError, match="set by another than Phases"):
        trainer.train()


def test_a_plan_past_the_end_or_of_no_step_is_refused(make):
    for steps in (0, 9):
        controller = Phases()
        controller.plan = lambda step, total, n=steps: [Segment(np.array(WEIGHTS), n, "losses")]
        trainer = make(f"{steps}")
        mixed(trainer, controller)
        with pytest.raises(ValueError, match=f"Phases.plan gave {steps} steps at step 0 of 8"):
            trainer.train()


# A mixture that does not move


FROZEN = (
    (WEIGHTS, 0, "losses"),
    (WEIGHTS, 2, "gradients"),
    (WEIGHTS, 1, "train"),
    (WEIGHTS, 3, "losses"),
    (WEIGHTS, 2, None),
)


LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("extra", ["dropout", "lora", "bf16"])
def test_measuring_leaves_a_run_as_it_is(make, extra):
    """Losses, gradients and weights to the last digit, with dropout on."""
    given = {"dropout": 0.2, "max_steps": 14}
    if extra == "lora":
        given["trainer_options"] = {"peft_config": LORA}
    if extra == "bf16":
        given["bf16"] = True
    plain = make("plain", **given)
    mixed(plain)
    log, weights = finish(plain)
    assert len({loss for _, _, loss, _ in log}) == 14
    measured = make("measured", **given)
    controller = Phases(*FROZEN)
    mixed(measured, controller)
    again, same = finish(measured)
    assert len(controller.told) == 8
    assert again == log and torch.equal(weights, same)
    assert measured.steps_read == plain.steps_read
    assert counts_of(plain.args.output_dir) == counts_of(measured.args.output_dir)
    if extra != "dropout":
        return
    frozen = make("frozen", **given)
    sampler = sampler_of()
    config = AioliConfig(estimator="regression", tilt=0.0, eta=0.0, update_steps=2)
    callback = attach_mixture(frozen, sampler, AioliCallback(sampler, config))
    again, same = finish(frozen)
    assert callback.controller.weights.tolist() == list(WEIGHTS)
    assert callback.controller.influence() is not None
    assert again == log and torch.equal(weights, same)
    free = make("free", **{**given, "dropout": 0.0})
    mixed(free)
    assert finish(free)[0] != log  # the dropout was on


def test_bf16_is_what_is_measured_in(make):
    """Under autocast, as a step of training is."""
    trainer = make(bf16=True, max_steps=2)
    kinds = {True: set(), False: set()}
    trainer.model.model.layers[0].mlp.register_forward_hook(
        lambda module, _, output: kinds[module.training].add(output.dtype)
    )
    mixed(trainer, Phases((WEIGHTS, 1, "losses"), (WEIGHTS, 1, "train")))
    trainer.train()
    assert kinds[True] == {torch.bfloat16} == kinds[False]
