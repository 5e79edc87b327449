"""A trainer under a mixture: what it reads, when weights bite, and that nothing else moves."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmmix import (
    FLATConfig,
    FLATTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    attach_filter,
)
from llmmix.mixing import (
    AioliCallback,
    AioliConfig,
    MixtureCallback,
    MixtureSampler,
    attach_mixture,
    label_domains,
)
from llmmix.mixing.controllers import Segment
from llmmix.mixing.record import drawn_shares, read_record

SIZES = {"a": 7, "b": 12, "c": 5}  # 24 rows: six steps of four draws an epoch
WEIGHTS = (0.5, 0.25, 0.25)
SETTINGS = {
    "max_steps": 8,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
# `SFTTrainer` would build what the rows have already
PREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def tokens_of(domain: int, row: int) -> list[int]:
    """Of uneven lengths, and told by the first of them."""
    first = 10 + 30 * domain + row
    return [first, *((7 * first + 11 * k) % 300 + 10 for k in range(2 + row % 5))]


@functools.cache  # `datasets` takes long to fingerprint what it makes
def rows_of(number: int, name: str, start: int, size: int) -> Dataset:
    ids = [tokens_of(number, row) for row in range(start, start + size)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def domain_rows(start: int = 0, sizes=SIZES) -> dict[str, Dataset]:
    return {name: rows_of(i, name, start, size) for i, (name, size) in enumerate(sizes.items())}


@functools.cache
def labelled_rows() -> Dataset:
    return label_domains(domain_rows())


def targets() -> dict[str, Dataset]:
    return domain_rows(12, dict.fromkeys(SIZES, 4))


def tiny_model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=375,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            attention_dropout=dropout,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


class Watched(SFTTrainer):
    """Notes (domain, row) of what each step reads."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        read = [
            divmod(int(ids[mask.bool()][0]) - 10, 30)
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        if read:
            self.__dict__.setdefault("steps_read", []).append(read)
        return batches, items


def build(
    folder, tokenizer, *, kind=Watched, rows=None, dropout=0.0, trainer_options=None, **given
):
    """A trainer of the domains' rows."""
    args = SFTConfig(str(folder), **{**SETTINGS, **PREPARED, **given})
    return kind(
        tiny_model(dropout),
        args=args,
        train_dataset=labelled_rows() if rows is None else rows,
        processing_class=tokenizer,
        **{"eval_dataset": targets(), **(trainer_options or {})},
    )


def sampler_of(weights=WEIGHTS, **options) -> MixtureSampler:
    rows = {name: range(size) for name, size in SIZES.items()}
    return MixtureSampler(rows, weights, **{"seed": 3, **options})


@pytest.fixture
def make(tokenizer, tmp_path):
    def build_here(name="run", **given):
        return build(tmp_path / name, tokenizer, **given)

    return build_here


def mixed(trainer, controller=None, weights=WEIGHTS, options=None, **callback_options):
    """Attach a mixture, with a controller where there is one."""
    sampler = sampler_of(weights, **(options or {}))
    make = None if controller is None else (lambda *_: controller)
    attach_mixture(trainer, sampler, MixtureCallback(sampler, make, **callback_options))
    return sampler


def finish(trainer, **options):
    """What is logged of each step, and the weights in the end."""
    trainer.train(**options)
    kept = ("step", "epoch", "loss", "grad_norm")
    log = [[e[k] for k in kept if k in e] for e in trainer.state.log_history if "loss" in e]
    weights = [p.detach().flatten().float() for p in trainer.model.parameters()]
    return log, torch.cat(weights)


def counts_of(folder) -> list[list[int]]:
    _, entries = read_record(folder)
    steps = [(e["step"], e["counts"]) for e in entries if "counts" in e]
    assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
    return [counts for _, counts in steps]


def domains_read(trainer) -> list[list[int]]:
    """Rows of each domain that the steps read in truth."""
    return [
        np.bincount([domain for domain, _ in step], minlength=3).tolist()
        for step in trainer.steps_read
    ]


class Phases:
    """A sequence of segments, again and again, which notes what it is told."""

    def __init__(self, *phases):
        self.phases, self.weights = phases, np.array(WEIGHTS)
        self.told = []

    def plan(self, step, total_steps):
        plan, left = [], total_steps - step
        for weights, steps, measure in self.phases:
            now = min(steps, left)
            if now == steps or now:
                plan.append(Segment(np.array(weights, dtype=float), now, measure))
            left -= now
        return plan

    def observe(self, observation):
        told = observation._asdict() | {"shares": observation.shares.tolist()}
        told["signal"] = {name: x.tolist() for name, x in observation.signal.items()}
        self.told.append(told)

    def state_dict(self):
        return {"told": json.loads(json.dumps(self.told)), "weights": self.weights.tolist()}

    def load_state_dict(self, state):
        self.told = json.loads(json.dumps(state["told"]))
        self.weights = np.array(state["weights"])

    def record(self):
        return {"told": len(self.told)}


class Moving(Phases):
    """Whose mixtures follow from the losses: a run that errs once goes another way."""

    def __init__(self):
        super().__init__()

    def plan(self, step, total_steps):
        probe = np.eye(3)[len(self.told) % 3]
        first = () if self.told else ((self.weights, 0, "losses"),)
        self.phases = (*first, (probe, 2, "train"), (self.weights, 3, "losses"))
        return super().plan(step, total_steps)

    def observe(self, observation):
        super().observe(observation)
        if "losses" in observation.signal:
            tilt = np.exp(5 * (observation.signal["losses"] - observation.signal["losses"].mean()))
            self.weights = tilt / tilt.sum()


class Setting(TrainerCallback):
    """A user's own, which sets weights when an event has come to a step."""

    def __init__(self, sampler, weights: dict, event="on_step_end"):
        def act(args, state, control, **kwargs):
            if state.global_step in weights:
                sampler.set_weights(weights[state.global_step])

        setattr(self, event, act)


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


ONE_HOT = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}


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


def test_two_cannot_decide_the_weights(make):
    sampler = sampler_of()
    trainer = make(max_steps=6)
    attach_mixture(
        trainer, sampler, MixtureCallback(sampler, lambda *_: Phases((WEIGHTS, 3, None)))
    )
    trainer.add_callback(Setting(sampler, {1: ONE_HOT["a"]}))
    with pytest.raises(ValueError, match="set by another than Phases"):
        trainer.train()


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


PHASES = (
    (ONE_HOT["a"], 1, "losses"),
    (ONE_HOT["c"], 3, None),
    (ONE_HOT["b"], 2, "train"),
    (ONE_HOT["a"], 0, "losses"),
    ([0.5, 0.5, 0], 1, "losses"),
)
PHASE_OF_STEP = [0, 2, 2, 2, 1, 1, None] * 3


@pytest.fixture(scope="module")
def phased(tokenizer, tmp_path_factory):
    """A run of phases by how it is cut, each made once."""
    made = {}

    def run(size=2, accumulation=2, workers=0, padding="right"):
        key = (size, accumulation, workers, padding)
        if key not in made:
            options = {}
            if padding == "left":
                options["data_collator"] = pad_left
            trainer = build(
                tmp_path_factory.mktemp("phases"),
                tokenizer,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                dataloader_num_workers=workers,
                max_steps=16,
                trainer_options=options,
            )
            controller = Phases(*PHASES)
            sampler = mixed(trainer, controller)
            made[key] = (*finish(trainer), trainer, controller, sampler)
        return made[key]

    return run


def pad_left(rows):
    longest = max(len(row["input_ids"]) for row in rows) + 1
    ids, labels, mask = [], [], []
    for row in rows:
        pads = longest - len(row["input_ids"])
        ids.append([0] * pads + row["input_ids"])
        labels.append([-100] * (pads + 1) + row["labels"][1:])  # the first follows on nothing
        mask.append([0] * pads + [1] * (longest - pads))
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.tensor(values) for name, values in batch.items()}


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


# Killed and resumed


def record_of(folder):
    """All but what the clock says."""
    header, entries = read_record(folder)
    return header, [entry for entry in entries if "spent" not in entry]


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


# Two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, tokenizer):
    """The folder of runs under torchrun: tests/mixing/two_processes.py."""
    folder = tmp_path_factory.mktemp("two")
    tokenizer.save_pretrained(folder / "tokenizer")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.mixing.two_processes", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read_by_two(folder, name):
    """Rows by step: of each micro-batch, what the first process reads and then the second."""
    first, second = (json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["read"]) == len(second["read"])
    steps = []
    for ours, theirs in zip(first["read"], second["read"], strict=True):
        steps.append(sum((ours[i : i + 2] + theirs[i : i + 2] for i in (0, 2)), []))
    return [[tuple(row) for row in step] for step in steps], first["log"]


def test_two_processes_read_and_train_as_one(two_processes, make, tmp_path):
    trainer = make(max_steps=8, gradient_accumulation_steps=4)
    mixed(trainer, Moving())
    log, _ = finish(trainer)
    read, other = read_by_two(two_processes, "moving")
    assert read == trainer.steps_read
    np.testing.assert_allclose(np.array(other), np.array(log), rtol=1e-5)
    header, entries = record_of(tmp_path / "run")
    header_of_two, entries_of_two = record_of(two_processes / "moving")
    assert header_of_two == header
    for mine, other in zip(entries, entries_of_two, strict=True):
        assert mine.keys() == other.keys() and mine["step"] == other["step"]
        assert mine.get("counts") == other.get("counts")
        np.testing.assert_allclose(other.get("weights", 0), mine.get("weights", 0), rtol=1e-4)
        for name, values in mine.get("measured", {}).items():
            theirs = np.array(other["measured"][name], dtype=float)  # null is not a number
            np.testing.assert_allclose(theirs, np.array(values, dtype=float), rtol=1e-4)


def test_a_checkpoint_of_two_processes_goes_on_in_one(two_processes, make):
    read, log = read_by_two(two_processes, "moving")
    again = make(max_steps=8, gradient_accumulation_steps=4)
    mixed(again, Moving())
    resumed, _ = finish(again, resume_from_checkpoint=str(two_processes / "moving/checkpoint-4"))
    assert again.steps_read == read[4:]
    np.testing.assert_allclose(np.array(resumed), np.array(log), rtol=1e-5)
    # and in steps half as large, where the order of the rows stays
    read, _ = read_by_two(two_processes, "still")
    again = make("half", max_steps=8)
    mixed(again)
    again.train(resume_from_checkpoint=str(two_processes / "still/checkpoint-4"))
    assert sum(again.steps_read, []) == sum(read[4:], [])[:16]


# Which rows are of which domain


def test_rows_that_the_trainer_dropped_are_told_apart_and_counted(make, caplog):
    rows = {
        name: Dataset.from_dict(
            {
                "prompt": [f"{name} " * (40 if row % 3 == 1 else 2) for row in range(6)],
                "completion": [f"{number}{row}" for row in range(6)],
            }
        )
        for number, name in enumerate("xyz")
    }
    rows["y"] = rows["y"].select([0, 2, 3, 5])  # of which none is dropped
    trainer = make(
        rows=label_domains(rows),
        dataset_kwargs=None,
        max_length=20,
        kind=SFTTrainer,
        trainer_options={"eval_dataset": None},
    )
    sampler = MixtureSampler(rows, seed=3)
    attach_mixture(trainer, sampler)
    assert sampler.sizes.tolist() == [4, 4, 4]
    for name in "xz":
        assert f"Domain '{name}': the trainer dropped 2 of 6 rows" in caplog.text
    assert "Domain 'y'" not in caplog.text
    names = trainer.train_dataset["domain"]
    loader = trainer.get_train_dataloader()
    sampler.set_plan([([0, 0, 1], 8)])
    drawn = [index for batch in loader.indices() for index in batch]
    assert len(drawn) == 8 and {names[index] for index in drawn} == {"z"}
    assert sorted(drawn[:4]) == sorted(drawn[4:]) and len(set(drawn)) == 4


def test_without_a_column_the_rows_are_the_domains_in_their_order(make):
    rows = labelled_rows().remove_columns("domain")
    trainer, labelled = make(rows=rows, max_steps=7), make("labelled", max_steps=7)
    for each in (trainer, labelled):
        mixed(each)
        each.train()
    assert trainer.steps_read == labelled.steps_read
    assert counts_of(trainer.args.output_dir) == domains_read(trainer)


def test_rows_in_any_order_are_found_by_their_column(make):
    shuffled = labelled_rows().shuffle(seed=1)
    trainer = make(rows=shuffled, max_steps=3)
    mixed(trainer, weights=[0, 0.5, 0.5])
    trainer.train()
    assert domains_read(trainer) == counts_of(trainer.args.output_dir)
    assert not np.array(domains_read(trainer))[:, 0].any()


def test_scored_tokens_are_counted_for_the_unit_tokens(make):
    trainer = make()
    sampler = sampler_of(unit="tokens")
    attach_mixture(trainer, sampler)
    for number, (name, size) in enumerate(SIZES.items()):
        lengths = [len(tokens_of(number, row)) - 1 for row in range(size)]
        assert sampler.tokens_per_row[name] == pytest.approx(np.mean(lengths))


def test_label_domains():
    rows = domain_rows()
    rows["b"] = rows["b"].add_column("domain", ["other"] * 12)
    labelled = label_domains(rows)
    assert labelled["domain"][:] == [name for name, size in SIZES.items() for _ in range(size)]
    assert labelled["input_ids"][7] == tokens_of(1, 0)
    with pytest.raises(ValueError, match="`domains` is empty"):
        label_domains({})
    with pytest.raises(ValueError, match="`domains`: 'b' has no rows"):
        label_domains({"a": rows["a"], "b": rows["b"].select([])})
    with pytest.raises(ValueError, match="`domains`: 'b' has the columns"):
        label_domains({"a": rows["a"], "b": rows["b"].remove_columns("labels")})


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


def test_many_passes_over_a_domain_are_said_once(make, caplog):
    trainer = make(max_steps=8)
    mixed(trainer, weights=[0, 0, 1])
    trainer.train()
    assert caplog.text.count("has been read more than 4 times over (5 rows)") == 1
    assert "Domain 'c'" in caplog.text


# Other trainers


def pairs(name: str, count: int = 6) -> dict:
    return {"prompt": [f"What is {i}{name}?" for i in range(count)]}


@pytest.mark.parametrize("kind", ["dpo", "rpo"])
def test_preference_rows(checkpoint, tmp_path, kind):
    rows = {
        name: Dataset.from_dict(
            {**pairs(name), "chosen": [f" {i}" for i in range(6)], "rejected": [" no"] * 6}
        )
        for name in "+*"
    }
    trainer_type, config = {"dpo": (DPOTrainer, DPOConfig), "rpo": (RPOTrainer, RPOConfig)}[kind]
    args = config(str(tmp_path), **{**SETTINGS, "max_steps": 4, "gradient_accumulation_steps": 1})
    trainer = trainer_type(
        checkpoint,
        args=args,
        train_dataset=label_domains(rows),
        eval_dataset={name: part.select(range(4)) for name, part in rows.items()},
    )
    sampler = MixtureSampler(rows, seed=3)
    controller = Phases(([1, 0], 1, "losses"), ([0, 1], 2, "losses"))
    callback = MixtureCallback(sampler, lambda *_: controller)
    attach_mixture(trainer, sampler, callback)
    trainer.train()
    assert counts_of(tmp_path) == [[2, 0], [0, 2], [0, 2], [2, 0]]
    assert callback.signals.measure == "loss"
    expected = trainer.evaluate()
    final = [e["final"] for e in read_record(tmp_path)[1] if "final" in e]
    assert final[0] == pytest.approx([expected["eval_+_loss"], expected["eval_*_loss"]], rel=1e-5)


def test_rows_to_forget_have_the_templates_of_their_pass(tokenizer, tmp_path):
    rows = {
        name: Dataset.from_dict(
            {
                "question": [f"What is {i}{name}{i}?" for i in range(size)],
                "answer": [f"It is {i}{name}" for i in range(size)],
            }
        )
        for name, size in (("+", 3), ("*", 5))
    }
    args = FLATConfig(str(tmp_path), **{**SETTINGS, "max_steps": 8})
    trainer = FLATTrainer(
        tiny_model(),
        args=args,
        train_dataset=label_domains(rows),
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    sampler = MixtureSampler(rows, [0.75, 0.25], seed=3)
    controller = Phases(([0.75, 0.25], 3, "losses"))
    attach_mixture(trainer, sampler, MixtureCallback(sampler, lambda *_: controller))
    forget, asked = trainer.train_dataset, []
    read = type(forget).__getitem__

    class Noted(type(forget)):
        def __getitem__(self, index):
            asked.append(index)
            return read(self, index)

    forget.__class__ = Noted
    trainer.train()
    assert len(asked) == 32
    expected = MixtureSampler(rows, [0.75, 0.25], seed=3)
    block = expected.take(32)
    row = np.array([0, 3])[block.domains] + block.rows
    assert asked == (block.passes * 8 + row).tolist() and block.passes.max() > 3
    # another pass, another template
    first = [index for index in asked if index % 8 == asked[0] % 8]
    assert len({read(forget, index)["template_number"] for index in first}) > 1
    assert np.sum(counts_of(tmp_path), 0).tolist() == np.bincount(block.domains).tolist()


def test_batches_of_sftmix_stay_half_and_half(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        name: Dataset.from_dict(
            {
                **pairs(name, size),
                "completion": [f" {i}" for i in range(size)],
                "confidence": (-rng.random(size)).tolist(),
            }
        )
        for name, size in (("+", 9), ("*", 12))
    }
    args = SFTMixConfig(
        str(tmp_path), **{**SETTINGS, "max_steps": 8, "per_device_train_batch_size": 4}
    )
    trainer = SFTMixTrainer(
        tiny_model(), args=args, train_dataset=label_domains(rows), processing_class=tokenizer
    )
    sampler = MixtureSampler(rows, [0.3, 0.7], seed=3)
    attach_mixture(trainer, sampler)
    indices = trainer.get_train_dataloader().indices()
    batches = [next(indices) for _ in range(20)]
    confident = trainer.mixture_strata == 0
    assert 0 < confident.sum() < 21
    for batch in batches:
        assert confident[batch].tolist() == [True, False, True, False]
    sampler.reset()
    log, _ = finish(trainer)
    assert np.isfinite([entry[2] for entry in log]).all()
    assert np.sum(counts_of(tmp_path), 0).tolist() == list(sampler.counts.values())


# What cannot be


class OwnLoader(SFTTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=2)


class OwnSampler(SFTTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("kind", [OwnLoader, OwnSampler])
def test_a_trainer_that_orders_its_rows_is_refused(make, kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} decides by itself which rows"):
        mixed(make(kind=kind))


def test_rows_that_are_filtered_are_refused(make):
    trainer = make(kind=SFTTrainer)
    attach_filter(trainer, lambda rows: torch.ones(len(rows), dtype=torch.bool))
    with pytest.raises(ValueError, match="filtered already"):
        mixed(trainer)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"restore_callback_states_from_checkpoint": True}, "`restore_callback_states"),
        ({"train_sampling_strategy": "sequential"}, "`train_sampling_strategy='sequential'`"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size`"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches`"),
    ],
)
def test_settings_that_a_mixture_does_not_hold_under_are_refused(make, given, match):
    with pytest.raises(ValueError, match=match):
        mixed(make(**given))


def test_a_second_mixture_or_a_callback_of_another_is_refused(make):
    trainer = make()
    mixed(trainer)
    with pytest.raises(ValueError, match="has a mixture already"):
        mixed(trainer)
    with pytest.raises(ValueError, match="`callback` was made for another sampler"):
        attach_mixture(make("other"), sampler_of(), MixtureCallback(sampler_of()))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"packing": True, "max_length": 16}, "`packing`"),
        ({"shuffle_dataset": True}, "`shuffle_data"),
    ],
)
def test_rows_that_the_trainer_joined_or_shuffled_are_refused(make, given, match):
    rows = labelled_rows().remove_columns("domain")
    trainer = make(
        rows=rows,
        kind=SFTTrainer,
        dataset_kwargs=None,
        trainer_options={"eval_dataset": None},
        **given,
    )
    with pytest.raises(ValueError, match=f"`train_dataset`.*{match}"):
        mixed(trainer)


def test_rows_whose_domain_cannot_be_told_are_refused(make):
    rows = labelled_rows()
    with pytest.raises(ValueError, match="there are 23 rows, and the sampler's domains have 24"):
        mixed(make(rows=rows.remove_columns("domain").select(range(23))))
    with pytest.raises(ValueError, match=r"`train_dataset` has rows of \['c'\]"):
        attach_mixture(make(rows=rows), MixtureSampler({"a": range(7), "b": range(12)}))
    with pytest.raises(ValueError, match="'c' has no rows"):
        mixed(make(rows=rows.select(range(19))))
    with pytest.raises(ValueError, match="`train_dataset`"):
        mixed(make(rows=rows.remove_columns("domain").to_iterable_dataset()))


def masked(rows: Dataset) -> Dataset:
    return rows.map(lambda row: {"labels": [row["labels"][0]] + [-100] * (len(row["labels"]) - 1)})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, "`eval_dataset` is missing"),
        ({"a": domain_rows()["a"], "b": domain_rows()["b"].select([])}, "target 'b' has no rows"),
        (
            {"a": domain_rows()["a"], "b": masked(domain_rows()["b"])},
            r"no row of \['b'\] has a scor",
        ),
        (domain_rows()["a"], "`eval_dataset` does not say which target"),
        ({}, "`eval_dataset`|target"),
    ],
)
def test_targets_that_cannot_be_measured_are_refused(make, given, match):
    trainer = make(trainer_options={"eval_dataset": given})
    with pytest.raises(ValueError, match=match):
        mixed(trainer, Phases((WEIGHTS, 2, "losses")))


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


def test_a_plan_past_the_end_or_of_no_step_is_refused(make):
    for steps in (0, 9):
        controller = Phases()
        controller.plan = lambda step, total, n=steps: [Segment(np.array(WEIGHTS), n, "losses")]
        trainer = make(f"{steps}")
        mixed(trainer, controller)
        with pytest.raises(ValueError, match=f"Phases.plan gave {steps} steps at step 0 of 8"):
            trainer.train()
