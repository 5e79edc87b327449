"""A run that diverges says so, names its step and rows, and leaves no broken weights behind."""

import functools
import math

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from llmmix import (
    DCOConfig,
    DCOTrainer,
    MixtureSampler,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    attach_mixture,
)
from llmmix.mixing.domains import MixtureConfig
from llmmix.training.finite import FiniteCallback
from llmmix.unlearning import FLATConfig, UnlearnConfig
from tests.unlearning.runs import prepare

SETTINGS = {
    "max_steps": 3,
    "optim": "sgd",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def of_mixture(checkpoint, args, train_dataset):
    trainer = SFTTrainer(checkpoint, args=args, train_dataset=train_dataset)
    attach_mixture(trainer, MixtureSampler({"all": train_dataset}))
    return trainer


@pytest.fixture(params=["dco", "sftmix", "rpo", "mixture", "flat", "npo", "pdu", "rmu"])
def make(request, checkpoint, math_rows, preference_rows, tmp_path):
    name, rows = request.param, math_rows
    if name in ("flat", "npo", "pdu", "rmu"):
        settings = {**SETTINGS, "save_strategy": "steps"}
        return functools.partial(prepare, name, tmp_path, checkpoint, **settings)
    trainer, config = {
        "dco": (DCOTrainer, DCOConfig),
        "sftmix": (SFTMixTrainer, SFTMixConfig),
        "rpo": (RPOTrainer, RPOConfig),
        "mixture": (of_mixture, SFTConfig),
    }[name]
    rows = preference_rows if name == "rpo" else math_rows

    def make(**given):
        args = config(str(tmp_path), **{**SETTINGS, **given})
        return trainer(checkpoint, args=args, train_dataset=rows)

    return make


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_weights_that_are_no_numbers_are_named(make, tmp_path):
    trainer = make()
    with torch.no_grad():
        trainer.model.model.layers[0].input_layernorm.weight[3] = math.nan
    with pytest.raises(
        FloatingPointError, match=r"is nan at step 1.*\(model.layers.0.input_layernorm.weight\)"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(make):
    trainer = make()
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    before = weights_of(trainer)
    with pytest.raises(FloatingPointError, match="The norm of the gradient is (inf|nan) at step 1"):
        trainer.train()
    assert all(map(torch.equal, before, weights_of(trainer)))


def test_a_step_too_long_saves_nothing(make, tmp_path):
    trainer = make(max_steps=1, learning_rate=1e38, weight_decay=1e10, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1 .*not saved"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_finite_run_is_trained_and_saved(make, tmp_path):
    trainer = make(learning_rate=1e-3)
    trainer.train()
    assert list(tmp_path.glob("checkpoint-3/model.safetensors"))
    assert all(math.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)


def test_the_micro_batch_and_its_rows_are_named(checkpoint, math_rows, tmp_path):
    trainer = DCOTrainer(
        checkpoint, args=DCOConfig(str(tmp_path), **SETTINGS), train_dataset=math_rows
    )
    own, seen = trainer.compute_loss, []

    def compute_loss(model, inputs, **kwargs):
        seen.append(trainer.processing_class.batch_decode(inputs["input_ids"]))
        loss = own(model, inputs, **kwargs)
        return loss * math.inf if len(seen) == 4 else loss

    trainer.compute_loss = compute_loss
    with pytest.raises(FloatingPointError) as raised:
        trainer.train()
    said = str(raised.value)
    assert said.startswith("The loss is inf at step 2 in micro-batch 2 of 2. Its rows: '")
    assert "The weights are as they were before the step. Lower `learning_rate`" in said
    for row in seen[3]:
        text = row.replace("<|im_start|>", "").replace("<|im_end|>", "").replace("<|pad|>", "")
        assert repr(text.strip())[1:6] in said
    assert trainer.state.global_step == 1


def test_evaluation_rows_are_not_taken_for_a_step(checkpoint, math_rows, tmp_path):
    args = DCOConfig(str(tmp_path), eval_strategy="steps", eval_steps=1, **SETTINGS)
    trainer = DCOTrainer(checkpoint, args=args, train_dataset=math_rows, eval_dataset=math_rows)
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_search_for_a_loss_scale_in_fp16_is_let_be(checkpoint, math_rows, tmp_path):
    trainer = DCOTrainer(
        checkpoint, args=DCOConfig(str(tmp_path), **SETTINGS), train_dataset=math_rows
    )
    trainer.accelerator.state._mixed_precision = "fp16"
    try:
        callbacks = trainer.callback_handler.callbacks
        (callback,) = [other for other in callbacks if isinstance(other, FiniteCallback)]
        callback.window = [(torch.tensor(1.0), {})]
        callback.check_step(torch.tensor(math.inf))
        callback.window = [(torch.tensor(math.nan), {})]
        with pytest.raises(
            FloatingPointError, match="The loss is nan at step 1. Its rows: unknown"
        ):
            callback.check_step(torch.tensor(1.0))
    finally:
        trainer.accelerator.state._mixed_precision = "no"


CONFIGS = [DCOConfig, SFTMixConfig, RPOConfig, MixtureConfig, FLATConfig, UnlearnConfig]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_settings_that_are_not_finite_are_refused(config, value):
    named = {"learning_rate", "weight_decay", "warmup_steps"}
    own = {
        DCOConfig: set(),
        SFTMixConfig: {"mixup_alpha", "mixup_weight"},
        RPOConfig: {"rpo_eta", "beta"},
        MixtureConfig: set(),
        FLATConfig: {"retain_weight"},
        UnlearnConfig: {"epsilon", "delta", "steering", "dual_step", "beta2", "forget_weight"},
    }[config]
    for name in named | own:
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number, got {value}"):
            config("out", **{name: value})
    with pytest.raises(ValueError, match="`lr_scheduler_kwargs` must be a finite number, got {"):
        config("out", lr_scheduler_kwargs={"num_cycles": value})


def test_no_limit_is_a_limit():
    DCOConfig("out", max_grad_norm=math.inf)
    UnlearnConfig("out", loss="grad_ascent", ascent_cap=math.inf)
    with pytest.raises(ValueError, match="`ascent_cap` must be a finite number, got -inf"):
        UnlearnConfig("out", loss="grad_ascent", ascent_cap=-math.inf)
    with pytest.raises(ValueError, match="`max_grad_norm` must be a finite number, got nan"):
        DCOConfig("out", max_grad_norm=math.nan)
