"""Token losses in their trainer: the same run as TRL's where the loss is the same."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llmmix import SFTMixConfig, SFTMixTrainer, TokenLossConfig, TokenLossTrainer, attach_heads

SETTINGS = {
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
}
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
# The losses that need no other model
ALONE = ("nll", "dft", "gce", "threshold", "deft", "eaft", "focal", "label_smoothing", "gem")
OFF = {  # a setting with which a loss is nll
    "gce": {"gce_q": 0.0},
    "threshold": {"threshold_p": 0.0},
    "eaft": {"eaft_alpha": 0.0},
    "focal": {"focal_gamma": 0.0},
    "label_smoothing": {"label_smoothing_factor": 0.0},
    "gem": {"gem_beta": 1.0},
}


@pytest.fixture
def rows(math_rows):
    """Of uneven lengths."""
    return math_rows.select(range(16)).map(
        lambda row, i: {"completion": row["completion"] * (1 + i % 3)}, with_indices=True
    )


@pytest.fixture
def make(checkpoint, rows, tmp_path):
    def make(trainer_type=TokenLossTrainer, lora=False, model=None, data=None, **given):
        ours = {TokenLossTrainer: TokenLossConfig, SFTMixTrainer: SFTMixConfig}
        config = ours.get(trainer_type, SFTConfig)
        trainer = trainer_type(
            model or checkpoint,
            args=config(str(tmp_path), **{**SETTINGS, **given}),
            train_dataset=data or rows,
            eval_dataset=data or rows,
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            peft_config=LORA if lora else None,
        )
        if trainer_type is SFTTrainer:
            attach_heads(trainer)  # one head in both, so that they are equal to the last digit
        return trainer

    return make


CLOCKS = ("runtime", "per_second", "flos")


def finish(trainer):
    """Train; all that was logged, and the weights."""
    trainer.train()
    log = [
        {name: x for name, x in entry.items() if not name.endswith(CLOCKS)}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return log, torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_nll_and_dft_are_trls_to_the_last_digit(make, loss_type, lora):
    settings = {"loss_type": loss_type, "eval_strategy": "steps", "eval_steps": 3, "seed": 3}
    settings |= {"per_device_eval_batch_size": 16}  # TRL's loss is a mean over batches
    log, weights = finish(make(lora=lora, **settings))
    expected_log, expected = finish(make(SFTTrainer, lora=lora, **settings))
    assert weights.equal(expected)
    for entry, other in zip(log, expected_log, strict=True):
        assert other.items() <= entry.items() or {
            name: x for name, x in entry.items() if name in other
        } == pytest.approx(other, rel=1e-6)
    assert losses(log) == losses(expected_log)
    if loss_type == "nll":
        assert log[0]["nll_per_token"] == pytest.approx(log[0]["loss"], rel=1e-6)
        assert log[0]["token_losses/weight"] == 1


@pytest.mark.parametrize("loss_type", OFF)
def test_a_loss_whose_setting_is_off_is_nll(make, loss_type):
    log, weights = finish(make(loss_type=loss_type, **OFF[loss_type]))
    nll, expected = finish(make(loss_type="nll"))
    assert losses(log) == pytest.approx(losses(nll), rel=1e-6)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", [name for name in ALONE if name != "nll"])
def test_a_loss_is_another_than_nll_and_the_same_in_micro_batches_of_any_size(make, loss_type):
    log, weights = finish(make(loss_type=loss_type))
    other, whole = finish(
        make(
            loss_type=loss_type,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            lora=False,
        )
    )
    torch.testing.assert_close(weights, whole, rtol=1e-5, atol=1e-6)
    own = ("loss", "nll_per_token", "token_losses/weight", "token_losses/prob")
    for entry, expected in zip(log[:-1], other[:-1], strict=True):
        for name in own:
            assert entry[name] == pytest.approx(expected[name], rel=1e-5), name
    nll, _ = finish(make(loss_type="nll"))
    assert log[0]["nll_per_token"] == pytest.approx(nll[0]["nll_per_token"], rel=1e-6)
    assert abs(log[0]["loss"] - nll[0]["loss"]) > 1e-6 or loss_type == "label_smoothing"
    assert (whole - finish(make(loss_type="nll"))[1]).abs().max() > 1e-6


def test_packed_rows_are_the_padded_ones_in_a_full_batch(make):
    """TRL packs; a step holds all rows, in whatever order."""
    settings = {"loss_type": "gce", "per_device_train_batch_size": 16, "max_length": 64}
    settings |= {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 16}
    padded, expected = finish(make(**settings))
    packed = make(packing=True, **settings)
    assert len(packed.train_dataset) < 16
    log, weights = finish(packed)
    assert losses(log) == pytest.approx(losses(padded), rel=1e-5)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    free, same = finish(make(padding_free=True, **settings))
    assert losses(free) == pytest.approx(losses(padded), rel=1e-5)
    torch.testing.assert_close(same, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ALONE)
def test_a_batch_without_a_scored_token_is_an_exact_zero_with_a_gradient(make, loss_type):
    trainer = make(loss_type=loss_type)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7))
    assert loss.item() == 0
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients and all(gradient.eq(0).all() for gradient in gradients)


def test_what_was_asked_for_is_in_the_settings_that_are_saved(make, tmp_path):
    trainer = make(loss_type="label_smoothing", label_smoothing_factor=0.2, save_strategy="steps")
    assert trainer.label_smoother is None  # transformers would run a second forward
    trainer.train()
    for folder in sorted(tmp_path.glob("checkpoint-*"))[-1:]:
        saved = torch.load(folder / "training_args.bin", weights_only=False)
        assert (saved.loss_type, saved.label_smoothing_factor) == ("label_smoothing", 0.2)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "the token loss label_smoothing" in card


def test_label_smoothing_is_that_of_transformers(make):
    settings = {"label_smoothing_factor": 0.3}
    log, weights = finish(make(loss_type="label_smoothing", **settings))
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        trl = make(SFTTrainer, **settings)
    expected_log, expected = finish(trl)
    assert losses(log) == pytest.approx(losses(expected_log), rel=1e-5)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_cold_start_and_the_scale_are_told_once(make, caplog):
    """A random model finds every token unlikely."""
    finish(make(loss_type="dft", max_grad_norm=1.0))
    told = [record.getMessage() for record in caplog.records]
    assert len([text for text in told if "next to nothing is learned" in text]) == 1
    assert len([text for text in told if "scales the gradient of each token" in text]) == 1
    caplog.clear()
    finish(make(loss_type="nll", max_grad_norm=1.0))
    assert not [r for r in caplog.records if "token" in r.getMessage() and "loss_type" in r.message]


@pytest.mark.parametrize("loss_type", ["gce", "eaft", "label_smoothing", "gem"])
def test_sftmix_takes_a_token_loss_for_its_next_tokens(make, loss_type):
    """Without mixup it is that loss; with it the mixup term stays cross-entropy."""
    settings = {"loss_type": loss_type}
    ours, weights = finish(make(SFTMixTrainer, mixup_weight=0.0, **settings))
    alone, expected = finish(make(**settings))
    assert losses(ours) == losses(alone)
    assert weights.equal(expected)


def test_the_mixup_term_stays_cross_entropy(make):
    first = {}
    for loss_type in ("nll", "gce"):
        log, _ = finish(make(SFTMixTrainer, mixup_weight=0.5, loss_type=loss_type, max_steps=1))
        first[loss_type] = log[0]
    for name in ("sftmix/mixup_loss", "sftmix/ntp_loss", "nll_per_token"):
        assert first["gce"][name] == pytest.approx(first["nll"][name], rel=1e-6), name
    mixup = 0.5 * first["nll"]["sftmix/mixup_loss"]
    gce = first["gce"]["loss"] - mixup
    nll = first["nll"]["loss"] - mixup
    assert nll == pytest.approx(first["nll"]["nll_per_token"], rel=1e-5)
    assert 0 < gce < 1 / 0.7 and not math.isclose(gce, nll, rel_tol=1e-3)
