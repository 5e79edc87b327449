"""Runs that must be the same run: equal losses step by step, and equal weights at the end."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmmix import (
    DCOConfig,
    DCOTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    TokenLossConfig,
    TokenLossTrainer,
    attach_head,
    attach_heads,
)

SETTINGS = {
    "max_steps": 4,
    # Plain gradient descent without clipping: a loss off by a factor cannot hide, as under Adam,
    # and rounding is not blown up where a gradient is nearly zero
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
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
METHODS = {
    "dco": (DCOTrainer, DCOConfig, {"n_samples": 16}),
    "sftmix": (SFTMixTrainer, SFTMixConfig, {"mixup_weight": 0.5}),
    "sftmix-dco": (SFTMixTrainer, SFTMixConfig, {"mixup_weight": 0.5, "dco_n_samples": 16}),
    "token_losses": (TokenLossTrainer, TokenLossConfig, {"loss_type": "gce"}),
    "rpo": (RPOTrainer, RPOConfig, {"rpo_eta": 0.5, "beta": 0.1}),
    "rpo-mean": (RPOTrainer, RPOConfig, {"rpo_eta": 0.5, "sft_reduction": "mean"}),
}
# Every trainer; the variants, which go the same way through it, where there is time
TRAINERS = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("sftmix-dco", "rpo-mean") else name
    for name in METHODS
]


class SequenceCrossEntropyTrainer(SFTTrainer):
    """Minus the summed log-probability of each completion, from the logits; mean over examples."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        return nll.sum(1).mean()


class SequentialTrainer(SFTTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def sequence_nll(model, row, collate) -> float:
    batch = collate([{key: row[key] for key in ("input_ids", "labels")}])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum").item()


@pytest.fixture
def run(checkpoint, math_rows, preference_rows, tmp_path):
    """Train, and return the losses of each step and the weights at the end."""

    def run(trainer_type, config_type, rows=None, lora=False, prepare=None, resume=None, **given):
        config = config_type(**{"output_dir": str(tmp_path), **SETTINGS, **given})
        if rows is None:
            rows = preference_rows if issubclass(trainer_type, DPOTrainer) else math_rows
        trainer = trainer_type(
            checkpoint, args=config, train_dataset=rows, peft_config=LORA if lora else None
        )
        if prepare is not None:
            prepare(trainer)
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return torch.tensor(losses), weights.cpu()

    return run


def assert_same(a, b, tolerance=1e-5):
    """Equal trajectories; also no one-sided drift, which a maximum alone would let through."""
    (losses_a, weights_a), (losses_b, weights_b) = a, b
    assert len(losses_a) == len(losses_b) > 0
    torch.testing.assert_close(losses_a, losses_b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights_a, weights_b, rtol=tolerance, atol=tolerance)
    assert (weights_a - weights_b).mean().abs() < tolerance / 10


def assert_different(a, b):
    assert (a[1] - b[1]).abs().max() > 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_sftmix_with_weight_zero_is_sft(run, lora):
    ours = run(SFTMixTrainer, SFTMixConfig, lora=lora, mixup_weight=0.0)
    assert_same(ours, run(SFTTrainer, SFTConfig, lora=lora))
    assert_different(ours, run(SFTMixTrainer, SFTMixConfig, lora=lora, mixup_weight=1.0))


def assert_same_run(a, b):
    """Equal to the last digit; a GPU adds up in any order, where the default tolerance holds."""
    if torch.cuda.is_available():
        assert_same(a, b)
    else:
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_sft_on_our_head_is_sftmix_with_weight_zero_to_the_last_digit(run):
    def attach(trainer):
        attach_head(trainer.model, outputs=("log_probs", "entropy", "is_top1"))

    ours = run(SFTMixTrainer, SFTMixConfig, mixup_weight=0.0)
    theirs = run(SFTTrainer, SFTConfig, prepare=attach)
    assert_same_run(ours, theirs)


def test_sftmix_with_a_vanishing_weight_is_sft_on_the_same_pairs(run, math_rows, checkpoint):
    """The mixup term adds nothing but itself: not a scale, not a count of tokens."""
    args = SFTMixConfig("out", **SETTINGS)
    sampler = SFTMixTrainer(checkpoint, args=args, train_dataset=math_rows)._get_train_sampler()
    ordered = math_rows.select(list(sampler))
    ours = run(SFTMixTrainer, SFTMixConfig, mixup_weight=1e-9)
    assert_same(ours, run(SequentialTrainer, SFTConfig, rows=ordered))


def test_sftmix_with_dco_of_one_sample_is_sftmix(run):
    plain = run(SFTMixTrainer, SFTMixConfig)
    assert_same(plain, run(SFTMixTrainer, SFTMixConfig, dco_n_samples=1))


@pytest.mark.parametrize("lora", [False, True])
def test_dco_with_one_sample_is_sequence_cross_entropy(run, lora):
    ours = run(DCOTrainer, DCOConfig, lora=lora, n_samples=1)
    assert_same(ours, run(SequenceCrossEntropyTrainer, SFTConfig, lora=lora))


def test_dco_lets_go_of_what_it_can_already_answer(run, math_rows):
    """On one row repeated, cross-entropy drives p towards 1, and DCO stops at a few times 1/N."""
    rows, n = math_rows.select([0] * 8), 64
    settings = {"rows": rows, "max_steps": 60, "optim": "adamw_torch"}
    cross_entropy = run(DCOTrainer, DCOConfig, n_samples=1, **settings)[0][-1].item()
    dco = run(DCOTrainer, DCOConfig, n_samples=n, **settings)[0][-1].item()
    p_cross_entropy = math.exp(-cross_entropy)
    p_dco = 1 - (1 - math.exp(-dco)) ** (1 / n)  # the loss is -log(1 - (1-p)^n)
    assert 1 / n < p_dco < p_cross_entropy / 2 and p_cross_entropy > 0.8
    assert dco < 0.05  # and yet 64 draws all but always answer


@pytest.mark.parametrize("lora", [False, True])
def test_rpo_with_eta_zero_is_dpo(run, lora):
    ours = run(RPOTrainer, RPOConfig, lora=lora, rpo_eta=0.0)
    assert_same(ours, run(DPOTrainer, DPOConfig, lora=lora))
    assert_different(ours, run(RPOTrainer, RPOConfig, lora=lora, rpo_eta=1.0))


def test_rpo_mean_is_trls_sigmoid_plus_sft_where_a_batch_is_one_row(run):
    theirs = run(
        DPOTrainer,
        DPOConfig,
        per_device_train_batch_size=1,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.3],
    )
    ours = run(
        RPOTrainer,
        RPOConfig,
        per_device_train_batch_size=1,
        rpo_eta=0.3,
        sft_reduction="mean",
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_changes_nothing(run, name):
    trainer, config, given = METHODS[name]
    large = run(trainer, config, per_device_train_batch_size=8, **given)
    small = run(
        trainer, config, per_device_train_batch_size=2, gradient_accumulation_steps=4, **given
    )
    assert_same(large, small, 2e-5)


def test_dco_weights_examples_alike_in_a_partial_window(run, math_rows):
    """5 rows in micro-batches of 2, 2 and 1 are one step of 5: the last does not count double."""
    rows = math_rows.select(range(5))
    settings = {"rows": rows, "max_steps": 1, "n_samples": 16}
    whole = run(DCOTrainer, DCOConfig, per_device_train_batch_size=5, **settings)
    parts = run(
        DCOTrainer,
        DCOConfig,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **settings,
    )
    assert_same(whole, parts)


@pytest.mark.parametrize("name", TRAINERS)
def test_resumed_is_never_stopped_to_the_last_digit(run, name, tmp_path):
    """Stopped in the middle of the second epoch, in windows of two micro-batches."""
    trainer, config, given = METHODS[name]
    given = {
        **given,
        "max_steps": 7,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = run(trainer, config, output_dir=str(tmp_path / "a"), **given)
    resumed = run(
        trainer,
        config,
        output_dir=str(tmp_path / "b"),
        resume=str(tmp_path / "a" / "checkpoint-4"),
        **given,
    )
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("name", ["dco", "sftmix", "sftmix-dco", "token_losses"])
def test_padding_side_does_not_matter(checkpoint, math_rows, tmp_path, name):
    trainer_type, config_type, given = METHODS[name]
    config = config_type(str(tmp_path), **SETTINGS, **given)
    trainer = trainer_type(checkpoint, args=config, train_dataset=math_rows)
    rows = [trainer.train_dataset[i] for i in (0, 13, 1, 15)]
    right = trainer.data_collator([{k: r[k] for k in ("input_ids", "labels")} for r in rows])
    left = {}
    width = right["input_ids"].size(1)
    for key, value in right.items():
        moved = [row.roll(width - len(r["input_ids"])) for row, r in zip(value, rows, strict=True)]
        left[key] = torch.stack(moved)
    assert not torch.equal(left["input_ids"], right["input_ids"])
    losses = []
    for batch in (right, left):
        batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
        trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        for padding_free in (False, True):
            attach_heads(trainer, padding_free=padding_free)
            losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-5)


@pytest.mark.parametrize("name", TRAINERS)
def test_bf16_stays_near_fp32(run, name):
    trainer, config, given = METHODS[name]
    given = {**given, "max_steps": 2}
    exact, rough = run(trainer, config, **given), run(trainer, config, **{**given, "bf16": True})
    assert rough[0].isfinite().all()
    torch.testing.assert_close(exact[0], rough[0], rtol=0.05, atol=0.02)


def test_policy_and_reference_start_alike_under_bf16(run, checkpoint, preference_rows, tmp_path):
    """Both run under autocast: before the first step their log-ratios are zero, not nearly so."""
    args = RPOConfig(str(tmp_path), **{**SETTINGS, "bf16": True, "max_steps": 1}, beta=1.0)
    trainer = RPOTrainer(checkpoint, args=args, train_dataset=preference_rows)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["rpo/dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_router_loss_of_an_moe_enters_once(tokenizer, math_rows, tmp_path):
    """Whatever the accumulation, the loss holds the router's loss once."""
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=4,
                router_aux_loss_coef=1.0,
            )
        )
        model_before = copy.deepcopy(model)
        settings = {**SETTINGS, "max_steps": 1, "per_device_train_batch_size": batch}
        args = DCOConfig(
            str(tmp_path),
            **settings,
            gradient_accumulation_steps=accumulation,
            router_aux_loss_coef=1.0,
            n_samples=1,
        )
        trainer = DCOTrainer(
            model, args=args, train_dataset=math_rows.select([0] * 8), processing_class=tokenizer
        )
        trainer.train()
        logged = trainer.state.log_history[0]
        # one row, eight times: its cross-entropy is what is left of the loss
        losses.append(logged["loss"])
        assert logged["aux_loss"] > 0.5
    nll = sequence_nll(model_before, trainer.train_dataset[0], trainer.data_collator)
    assert losses == pytest.approx([nll + logged["aux_loss"]] * 2, rel=1e-4)


@pytest.mark.parametrize("name", ["dco", "sftmix", "rpo"])
def test_gradient_checkpointing_changes_nothing(run, name):
    trainer, config, given = METHODS[name]
    plain = run(trainer, config, **given)
    assert_same(plain, run(trainer, config, **{**given, "gradient_checkpointing": True}))
