"""What a trainer reads under a mixture, and when weights bite."""

import json
import multiprocessing

import numpy as np
import pytest
import torch

from llmmix.mixing import attach_mixture
from tests.mixing.runs import (
    ONE_HOT,
    PHASES,
    SIZES,
    WEIGHTS,
    Moving,
    Phases,
    Setting,
    counts_of,
    domains_read,
    finish,
    mixed,
    record_of,
    sampler_of,
)

# When weights bite


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_weights_of_a_callback_govern_the_next_step_and_no_draw_before(make, accumulation, workers):
    sampler = sampler_of([1, 0, 0])
    order = "babcacbb"
    weights = {step + 1: ONE_HOT[name] for step, name in enumerate(order)}
    setting = Setting(sampler, weights)
    first = workers == accumulation  # before the mixture's own callback, or after it
    trainer = make(
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=workers,
        max_steps=len(order) + 1,
        trainer_options={"callbacks": [setting]} if first else None,
    )
    attach_mixture(trainer, sampler)
    if not first:
        trainer.add_callback(setting)
    trainer.train()
    expected = [
        (2 * accumulation * np.eye(3, dtype=int)["abc".index(x)]).tolist() for x in "a" + order
    ]
    assert counts_of(trainer.args.output_dir) == expected == domains_read(trainer)
    logged = [[e[f"mixture/{x}"] for x in "abc"] for e in trainer.state.log_history if "loss" in e]
    assert logged == np.sign(expected).tolist()


def test_weights_set_before_training_hold(make):
    for place in ("before attaching", "after it", "on_train_begin"):
        sampler = sampler_of([1, 0, 0])
        trainer = make(max_steps=2)
        if place == "before attaching":
            sampler.set_weights([0, 0, 1])
        attach_mixture(trainer, sampler)
        if place == "after it":
            sampler.set_weights([0, 0, 1])
        if place == "on_train_begin":
            trainer.add_callback(Setting(sampler, {0: [0, 0, 1]}, place))
        trainer.train()
        assert counts_of(trainer.args.output_dir) == [[0, 0, 4]] * 2, place


# What is read, and by whom


def test_a_step_reads_the_draws_in_their_order(phased):
    """Draw i of a step goes to micro-batch i // batch."""
    trainer = phased()[2]
    sampler = sampler_of()
    for (weights, steps, _), at in zip(PHASES[:3], (0, 1, 4), strict=True):
        sampler.set_plan([(weights, 4 * steps)])
        block = sampler.take(4 * steps)
        sampler.use(4 * steps)
        expected = list(zip(block.domains.tolist(), block.rows.tolist(), strict=True))
        assert sum(trainer.steps_read[at : at + steps], []) == expected


def test_workers_change_nothing(phased):
    alone, weights, one, *_ = phased()
    ahead, same, two, *_ = phased(workers=2)
    assert alone == ahead and torch.equal(weights, same)
    assert one.steps_read == two.steps_read


def test_workers_end_with_the_training(make):
    """Left to the garbage collector, each would wait five seconds for its end."""
    before = set(multiprocessing.active_children())
    trainer = make(dataloader_num_workers=2, max_steps=3)
    mixed(trainer)
    trainer.train()
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("cut", [{"size": 1, "accumulation": 4}, {"padding": "left"}])
def test_accumulation_and_padding_change_roundings_alone(phased, cut):
    log, weights, trainer, controller, _ = phased()
    other, same, again, told, _ = phased(**cut)
    assert trainer.steps_read == again.steps_read
    np.testing.assert_allclose(np.array(other), np.array(log), rtol=1e-4)
    for one, two in zip(controller.told, told.told, strict=True):
        for name, values in one["signal"].items():
            np.testing.assert_allclose(two["signal"][name], values, rtol=1e-4)


def test_a_run_by_epochs(make):
    """An epoch is as many draws as there are rows, in whole steps."""
    trainer = make(max_steps=-1, num_train_epochs=2.5, per_device_train_batch_size=1)
    sampler = mixed(trainer, Phases((WEIGHTS, 4, "losses")))
    log, _ = finish(trainer)
    assert trainer.state.global_step == 30 and sampler.position == 60
    assert [epoch for _, epoch, *_ in log] == pytest.approx(
        [(i + 1) / 12 for i in range(30)], abs=1e-3
    )
    assert trainer.state.num_train_epochs == 3
    assert np.sum(counts_of(trainer.args.output_dir), 0).tolist() == list(sampler.counts.values())


# The end of the rows


@pytest.mark.parametrize("workers", [0, 2])
def test_training_ends_where_the_domains_hold_no_further_step(make, caplog, workers):
    trainer = make(max_steps=50, dataloader_num_workers=workers)
    sampler = mixed(trainer, options={"exhausted": "stop"})
    reference = list(sampler_of(exhausted="stop"))
    trainer.train()
    steps = len(reference) // 4
    assert trainer.state.global_step == steps
    assert sum(sampler.counts.values()) == 4 * steps == sampler.position
    assert f"training ends after {steps} of 50 steps" in caplog.text


def test_spilling_reads_every_row_once(make):
    trainer = make(max_steps=50)
    mixed(trainer, options={"exhausted": "spill"})
    trainer.train()
    assert trainer.state.global_step == 6
    rows = sum(trainer.steps_read, [])
    assert sorted(rows) == [(d, r) for d, n in enumerate(SIZES.values()) for r in range(n)]


# Two processes


def read_by_two(folder, name):
    """Rows by step: of each micro-batch, what the first process reads and then the second."""
    first, second = (json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["read"]) == len(second["read"])
    steps = []
    for ours, theirs in zip(first["read"], second["read"], strict=True):
        steps.append(sum((ours[i : i + 2] + theirs[i : i + 2] for i in (0, 2)), []))
    return [[tuple(row) for row in step] for step in steps], first["log"]


def test_two_processes_read_and_train_as_one(two_ranks, make, tmp_path):
    trainer = make(max_steps=8, gradient_accumulation_steps=4)
    mixed(trainer, Moving())
    log, _ = finish(trainer)
    read, other = read_by_two(two_ranks / "mixing", "moving")
    assert read == trainer.steps_read
    np.testing.assert_allclose(np.array(other), np.array(log), rtol=1e-5)
    header, entries = record_of(tmp_path / "run")
    header_of_two, entries_of_two = record_of(two_ranks / "mixing" / "moving")
    assert header_of_two == header
    for mine, other in zip(entries, entries_of_two, strict=True):
        assert mine.keys() == other.keys() and mine["step"] == other["step"]
        assert mine.get("counts") == other.get("counts")
        np.testing.assert_allclose(other.get("weights", 0), mine.get("weights", 0), rtol=1e-4)
        for name, values in mine.get("measured", {}).items():
            theirs = np.array(other["measured"][name], dtype=float)  # null is not a number
            np.testing.assert_allclose(theirs, np.array(values, dtype=float), rtol=1e-4)


def test_a_checkpoint_of_two_processes_goes_on_in_one(two_ranks, make):
    read, log = read_by_two(two_ranks / "mixing", "moving")
    again = make(max_steps=8, gradient_accumulation_steps=4)
    mixed(again, Moving())
    resumed, _ = finish(again, resume_from_checkpoint=str(two_ranks / "mixing/moving/checkpoint-4"))
    assert again.steps_read == read[4:]
    np.testing.assert_allclose(np.array(resumed), np.array(log), rtol=1e-5)
    # and in steps half as large, where the order of the rows stays
    read, _ = read_by_two(two_ranks / "mixing", "still")
    again = make("half", max_steps=8)
    mixed(again)
    again.train(resume_from_checkpoint=str(two_ranks / "mixing/still/checkpoint-4"))
    assert sum(again.steps_read, []) == sum(read[4:], [])[:16]
