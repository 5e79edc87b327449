"""A mixture's run begins, is stopped and goes on as if it never had been."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmmix.files import read_record
from llmmix.mixing import MixtureCallback, MixtureSampler, attach_mixture, label_domains
from llmmix.mixing.record import drawn_shares
from tests.mixing.runs import (
    ONE_HOT,
    PHASES,
    SETTINGS,
    WEIGHTS,
    Moving,
    Phases,
    build,
    counts_of,
    domain_rows,
    finish,
    labelled_rows,
    mixed,
    pad_left,
    record_of,
    sampler_of,
    targets,
    tiny_model,
)


class EpochEnds(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_training_twice_begins_anew(make):
    trainer = make(max_steps=7, dropout=0.2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    sampler = mixed(trainer, Moving())
    torch.manual_seed(5)
    log, _ = finish(trainer)
    record, state = read_record(trainer.args.output_dir), sampler.state_dict()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(before[name])
    trainer.optimizer = trainer.lr_scheduler = None
    torch.manual_seed(5)
    assert finish(trainer)[0] == log and sampler.state_dict() == state
    assert read_record(trainer.args.output_dir)[1][:-1] == record[1][:-1]


def test_a_trainer_of_transformers(make, tmp_path):
    args = TrainingArguments(str(tmp_path / "plain"), **{**SETTINGS, "max_steps": 4})

    trainer = Trainer(
        tiny_model(),
        args,
        data_collator=pad_left,
        train_dataset=labelled_rows(),
        eval_dataset=targets(),
    )
    sampler = sampler_of()
    controller = Phases((ONE_HOT["b"], 2, "losses"), (ONE_HOT["c"], 1, "train"))
    attach_mixture(trainer, sampler, MixtureCallback(sampler, lambda *_: controller))
    trainer.train()
    assert counts_of(tmp_path / "plain") == [[0, 4, 0]] * 2 + [[0, 0, 4]] + [[0, 4, 0]]
    assert np.isfinite(controller.told[0]["signal"]["losses"]).all()


def test_targets_may_be_told_by_a_column_or_given_to_the_callback(make):
    by_column = make(trainer_options={"eval_dataset": label_domains(targets()).shuffle(seed=0)})
    controller = Phases((WEIGHTS, 1, "losses"))
    given = make("given", trainer_options={"eval_dataset": None})
    told = []
    for trainer, options in ((by_column, {}), (given, {"targets": targets()})):
        sampler = sampler_of()
        callback = MixtureCallback(sampler, lambda *_: controller, measured_rows=None, **options)
        attach_mixture(trainer, sampler, callback)
        assert callback.signals.targets == ["a", "b", "c"]
        told.append(callback.signals.take("losses", [], 3)["losses"])
    np.testing.assert_allclose(told[0], told[1], rtol=1e-6)


# Killed and resumed


def test_resumed_from_any_checkpoint_equals_never_stopped(make, tmp_path):
    """In the middle of a phase, at its ends and at an epoch's, dropout on: to the last digit."""
    given = {"dropout": 0.2, "max_steps": 10}
    whole = make(**given, save_strategy="steps", save_steps=1)
    controller, ends = Moving(), EpochEnds()
    sampler = mixed(whole, controller)
    whole.add_callback(ends)
    log, weights = finish(whole)
    assert ends.steps == [6, 10]
    record = record_of(tmp_path / "run")
    assert len({tuple(t["signal"].get("losses", ())) for t in controller.told}) > 2
    for step in range(1, 10):
        again = make(**given)
        resumed_controller, ends = Moving(), EpochEnds()
        resumed = mixed(again, resumed_controller)
        again.add_callback(ends)
        path = str(tmp_path / f"run/checkpoint-{step}")
        once_more, same = finish(again, resume_from_checkpoint=path)
        assert once_more == log, step
        assert torch.equal(same, weights), step
        assert again.steps_read == whole.steps_read[step:], step
        assert resumed.state_dict() == sampler.state_dict(), step
        assert resumed_controller.state_dict() == controller.state_dict(), step
        assert record_of(tmp_path / "run") == record, step
        assert ends.steps == ([6, 10] if step < 6 else [10]), step


def test_resumed_with_workers_and_without_a_controller(make, tmp_path):
    given = {"dropout": 0.2, "max_steps": 8}
    whole = make(**given, save_strategy="steps", save_steps=3)
    mixed(whole, options={"method": "even"})
    log, weights = finish(whole)
    for step, workers in ((3, 2), (6, 0)):
        again = make(**given, dataloader_num_workers=workers)
        mixed(again, options={"method": "even"})
        once_more, same = finish(
            again, resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}")
        )
        assert once_more == log and torch.equal(same, weights)
        assert again.steps_read == whole.steps_read[step:]


def test_the_record_of_a_run_that_was_stopped_is_that_of_one_that_was_not(make, tmp_path):
    """The end of the first part, which is written too, was none."""
    whole = make("whole", max_steps=5)
    mixed(whole, Moving())
    whole.train()
    stopped = make(max_steps=5, save_strategy="steps", save_steps=3)
    mixed(stopped, Moving())
    stopped.add_callback(StopAt(3))
    stopped.train()
    assert stopped.state.global_step == 3
    again = make(max_steps=5)
    mixed(again, Moving())
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert record_of(tmp_path / "run") == record_of(tmp_path / "whole")
    lines = (tmp_path / "run/mixture.jsonl").read_text()
    assert lines.count("spent") == 1


def test_a_record_is_readable_where_a_run_is_resumed_elsewhere(make, tmp_path):
    whole = make(max_steps=4, save_strategy="steps", save_steps=2)
    mixed(whole)
    whole.train()
    again = make("elsewhere", max_steps=4)
    mixed(again)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    header, entries = read_record(tmp_path / "elsewhere")
    assert header == read_record(tmp_path / "run")[0]
    assert [e["step"] for e in entries if "counts" in e] == [3, 4]
    assert sum(drawn_shares(tmp_path / "elsewhere").values()) == pytest.approx(1)


def test_a_run_that_ended_may_go_on_for_longer(make, tmp_path):
    whole = make(max_steps=5, save_strategy="steps", save_steps=5)
    mixed(whole, Phases(*PHASES))
    whole.train()
    longer = make(max_steps=9)
    mixed(longer, Phases(*PHASES))
    longer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-5"))
    assert longer.state.global_step == 9
    assert len(counts_of(tmp_path / "run")) == 9


# Checkpoints that do not serve


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """Of two steps: without a mixture, with a fixed one and with one that moves."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("none", "fixed", "moving"):
        trainer = build(folder / name, tokenizer, max_steps=2, save_strategy="steps", save_steps=2)
        if name != "none":
            mixed(trainer, Moving() if name == "moving" else None)
        trainer.train()
    return {path.name: str(path / "checkpoint-2") for path in folder.iterdir()}


def test_a_checkpoint_written_without_a_mixture_is_refused(make, checkpoints):
    trainer = make()
    mixed(trainer)
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.*no state of MixtureCallback"):
        trainer.train(resume_from_checkpoint=checkpoints["none"])


@pytest.mark.parametrize("before", ["fixed", "moving"])
def test_a_checkpoint_of_another_method_is_refused(make, checkpoints, before):
    trainer = make()
    mixed(trainer, Moving() if before == "fixed" else None)
    with pytest.raises(ValueError, match="resume"):
        trainer.train(resume_from_checkpoint=checkpoints[before])


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"a": 7, "b": 12, "c": 4}, "`domains`"),
        ({"a": 7, "b": 12}, "`domains`"),
        ({"b": 12, "a": 7, "c": 5}, "`domains`"),
        ({"a": 7, "b": 12, "d": 5}, "`domains`"),
    ],
)
def test_a_checkpoint_of_other_domains_is_refused(make, checkpoints, sizes, match):
    rows = domain_rows(0, sizes)
    trainer = make(rows=label_domains(rows))
    attach_mixture(trainer, MixtureSampler(rows, seed=3))
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=checkpoints["fixed"])
