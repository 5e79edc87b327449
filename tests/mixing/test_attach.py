"""Which trainers take a mixture, and which do not."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer, SFTTrainer

from llmmix import (
    FLATConfig,
    FLATTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    attach_filter,
)
from llmmix.files import read_record
from llmmix.mixing import MixtureCallback, MixtureSampler, attach_mixture, label_domains
from tests.mixing.runs import SETTINGS, Phases, counts_of, finish, mixed, sampler_of, tiny_model

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
