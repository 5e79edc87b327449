import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from llmmix import RPOConfig, RPOTrainer
from llmmix.rpo import rpo_loss

CHOSEN = torch.tensor([-60, -35.5], dtype=torch.float64)
REJECTED = torch.tensor([-70, -30.25], dtype=torch.float64)
REF_CHOSEN = torch.tensor([-62, -36.0], dtype=torch.float64)
REF_REJECTED = torch.tensor([-66, -31.0], dtype=torch.float64)
LENGTHS = torch.tensor([40, 25])
ALL = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


@pytest.mark.parametrize(
    ("beta", "eta", "expected"),
    [
        (0.01, 0, [0.6635971130761409, 0.6943979618097418]),
        (0.01, 0.005, [0.6665971130761409, 0.6961729618097418]),
        (0.05, 0.005, [0.5693552444685271, 0.70829171168279]),
        (0.1, 1, [6.4374879504858855, 4.255725303525525]),
    ],
)
def test_sum_vectors(beta, eta, expected):
    loss = rpo_loss(*ALL, beta=beta, eta=eta)
    torch.testing.assert_close(loss, loss.new_tensor(expected), rtol=1e-10, atol=0)


def test_mean_vectors():
    loss = rpo_loss(*ALL, beta=0.5, eta=0.2, sft_reduction="mean", chosen_lengths=LENGTHS)
    expected = [0.04858735157374206 + 0.2 * 1.5, 0.7575990353171691 + 0.2 * 1.42]
    torch.testing.assert_close(loss, loss.new_tensor(expected), rtol=1e-10, atol=0)
    assert loss.mean().item() == pytest.approx(0.6950931934454556, rel=1e-10)


def test_gradient_vectors():
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    rpo_loss(chosen, rejected, REF_CHOSEN, REF_REJECTED, beta=0.01, eta=0.005).sum().backward()
    expected_chosen = [-0.004900044983805899, -0.005056249996744794]
    expected_rejected = [0.004850044983805899, 0.005006249996744794]
    torch.testing.assert_close(chosen.grad, CHOSEN.new_tensor(expected_chosen))
    torch.testing.assert_close(rejected.grad, CHOSEN.new_tensor(expected_rejected))


def test_large_margins_do_not_overflow():
    big = torch.tensor([-1e5], dtype=torch.float32)
    zero = torch.zeros(1)
    assert rpo_loss(big, zero, zero, zero, beta=1.0, eta=0.0).item() == 1e5
    assert rpo_loss(zero, big, zero, zero, beta=1.0, eta=0.0).item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": -0.1}, "`rpo_eta` must not be negative"),
        ({"sft_reduction": "token"}, "`sft_reduction` must be"),
        ({"sft_reduction": "mean"}, "needs `chosen_lengths`"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rpo_loss(*ALL, **{"beta": 0.1, "eta": 0.1, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rpo_eta": -1.0}, "`rpo_eta` must not be negative"),
        ({"sft_reduction": "x"}, "`sft_reduction` must be"),
        ({"loss_type": ["ipo"]}, "`loss_type` must be"),
        ({"loss_type": ["sigmoid", "sft"]}, "`loss_type` must be"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RPOConfig("out", **change)


ONE_STEP = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "per_device_train_batch_size": 16,  # all rows, so that what is precomputed is padded alike
    "logging_steps": 1,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.5}


def first_step(trainer) -> dict:
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_margin_begins_at_zero_under_bf16(
    checkpoint, preference_rows, tmp_path, lora, precompute, given
):
    """Policy and reference are scored by the same head."""
    args = {"bf16": True, "rpo_eta": 0.0, "precompute_ref_log_probs": precompute}
    logged = first_step(
        RPOTrainer(
            checkpoint,
            AutoModelForCausalLM.from_pretrained(checkpoint) if given else None,
            RPOConfig(str(tmp_path), **ONE_STEP, **args),
            train_dataset=preference_rows,
            peft_config=LoraConfig(**LORA) if lora else None,
        )
    )
    assert logged["rewards/margins"] == logged["rewards/chosen"] == 0.0
    assert logged["loss"] == pytest.approx(math.log(2), rel=1e-7)


def test_what_another_head_has_precomputed_is_not_taken(checkpoint, preference_rows, tmp_path):
    """TRL caches it by the model and the rows, which here do not depend on the settings."""
    args = {"truncation_mode": "keep_end", "precompute_ref_log_probs": True, **ONE_STEP}
    for trainer, config in ((DPOTrainer, DPOConfig), (RPOTrainer, RPOConfig)):
        for bf16 in (True, False):
            args["bf16"] = bf16
            built = trainer(
                checkpoint, args=config(str(tmp_path), **args), train_dataset=preference_rows
            )
            if trainer is RPOTrainer:
                assert abs(first_step(built)["rewards/margins"]) < 1e-6


@pytest.mark.parametrize("kind", ["loaded", "given", "precomputed", "lora", "lora-trained"])
def test_the_reference_has_no_dropout(checkpoint, preference_rows, tmp_path, kind):
    args = {"disable_dropout": False, "precompute_ref_log_probs": kind == "precomputed"}
    plain, model = (
        AutoModelForCausalLM.from_pretrained(checkpoint, attention_dropout=share)
        for share in (0.0, 0.5)
    )
    given = copy.deepcopy(model).train()
    if kind == "lora-trained":
        torch.manual_seed(3)
        adapter = LoraConfig(**LORA, init_lora_weights=False)
        model = get_peft_model(model, adapter)
        plain = model
    trainer = RPOTrainer(
        model.train(),
        given if kind == "given" else None,
        RPOConfig(str(tmp_path), bf16=False, beta=0.5, **ONE_STEP, **args),
        train_dataset=preference_rows,
        peft_config=LoraConfig(**LORA) if kind == "lora" else None,
    )
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(16)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        logits = plain.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = logps.masked_fill(labels[:, 1:] == -100, 0).sum(1)[:16].mean().item()
    logged = first_step(trainer)
    found = logged["logps/chosen"] - logged["rewards/chosen"] / 0.5
    assert found == pytest.approx(expected, rel=1e-5)
    # while the policy has it
    assert abs(logged["rewards/chosen"]) > 0.01


def test_a_model_without_a_name_is_its_own_reference(checkpoint, preference_rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config._name_or_path = ""
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)  # so that no checkpoint holds it
    trainer = RPOTrainer(
        model,
        args=RPOConfig(str(tmp_path), **ONE_STEP),
        train_dataset=preference_rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    assert trainer.ref_model is not trainer.model
    assert first_step(trainer)["rewards/margins"] == pytest.approx(0, abs=1e-5)


def weighed(rows, weights):
    return rows.add_column("weight", [float(w) for w in weights])


WEIGHTS = [1, 2.5, 0.5, 4, 1, 0.25, 3, 1] * 2


@pytest.mark.parametrize(("reduction", "precompute"), [("sum", False), ("mean", True)])
def test_both_terms_of_a_pair_are_multiplied_by_its_weight(
    checkpoint, preference_rows, tmp_path, reduction, precompute
):
    """Over the number of pairs; the margin and TRL's metrics stay as they are."""
    reference = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    args = {"rpo_eta": 0.5, "beta": 0.5, "sft_reduction": reduction, "bf16": False}
    args |= {"precompute_ref_log_probs": precompute, "eval_strategy": "epoch"}
    logged = []
    for rows in (preference_rows, weighed(preference_rows, WEIGHTS)):
        trainer = RPOTrainer(
            checkpoint,
            copy.deepcopy(reference),
            RPOConfig(str(tmp_path), **ONE_STEP, per_device_eval_batch_size=5, **args),
            train_dataset=rows,
            eval_dataset=rows,
        )
        logged.append(first_step(trainer) | trainer.state.log_history[1])
    plain, found = logged
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(16)])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels, mask = batch["input_ids"][:, 1:, None], batch["completion_mask"][:, 1:]
    logps = []
    for model in (trainer.model.eval(), reference):
        with torch.no_grad():
            found_logps = model(**given).logits[:, :-1].log_softmax(-1).gather(-1, labels)[..., 0]
        logps += (found_logps * mask).sum(1).chunk(2)
    settings = {"beta": 0.5, "sft_reduction": reduction, "chosen_lengths": mask.sum(1)[:16]}
    losses, dpo = (rpo_loss(*logps, eta=eta, **settings) for eta in (0.5, 0.0))
    weights = torch.tensor(WEIGHTS)
    assert plain["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx((weights * losses).mean().item(), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert found["rpo/dpo_loss"] == pytest.approx((weights * dpo).mean().item(), rel=1e-5)
    assert found["weight/mean"] == found["eval_weight/mean"] == pytest.approx(sum(WEIGHTS) / 16)
    for name in ("rewards/margins", "logps/chosen", "nll_per_token", "eval_rewards/margins"):
        assert found[name] == pytest.approx(plain[name], rel=1e-6), name
    assert "weight/mean" not in plain


@pytest.fixture
def steps(checkpoint, preference_rows, tmp_path):
    """Losses and weights of two steps of plain gradient descent on rows with weights."""

    def steps(rows, rate=0.1, size=4, accumulation=1):
        torch.manual_seed(0)
        settings = {**ONE_STEP, "max_steps": 2, "learning_rate": rate, "optim": "sgd"}
        settings |= {"max_grad_norm": 0.0, "bf16": False, "beta": 0.5, "rpo_eta": 0.5}
        settings |= {"per_device_train_batch_size": size}
        args = RPOConfig(str(tmp_path), gradient_accumulation_steps=accumulation, **settings)
        trainer = RPOTrainer(checkpoint, args=args, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return torch.tensor(losses), weights.cpu()

    return steps


def test_weights_scale_the_gradient_and_one_changes_nothing(steps, preference_rows):
    plain = steps(preference_rows)
    ones = steps(weighed(preference_rows, [1] * 16))
    threes = steps(weighed(preference_rows, [3] * 16), rate=0.1 / 3)
    for (losses, weights), factor in ((ones, 1), (threes, 3)):
        torch.testing.assert_close(losses, factor * plain[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(weights, plain[1], rtol=1e-5, atol=1e-6)
    assert (steps(weighed(preference_rows, WEIGHTS))[1] - plain[1]).abs().max() > 1e-3


def test_a_pair_of_weight_zero_is_absent_and_micro_batches_are_one(steps, preference_rows, caplog):
    """Though null is 1."""
    rows = preference_rows.add_column("weight", [None, 0.0, 2.0, 1.0] * 4)
    whole = steps(rows, size=4)
    assert "Dropped 4 of 16 rows of `train_dataset`" in caplog.text
    kept = rows.select([n for n in range(16) if n % 4 != 1])
    absent = steps(kept, size=4)
    assert torch.equal(whole[0], absent[0]) and torch.equal(whole[1], absent[1])
    parts = steps(kept, size=1, accumulation=4)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-5, atol=1e-6)


def test_rows_that_are_evaluated_alone_have_weights(checkpoint, preference_rows, tmp_path):
    """Given to the trainer, streamed, or to `evaluate`; and a zero in a batch counts as absent."""
    args = RPOConfig(str(tmp_path), **ONE_STEP, bf16=False)
    rows = weighed(preference_rows, WEIGHTS)
    given = RPOTrainer(
        checkpoint, args=args, train_dataset=preference_rows, eval_dataset=rows
    ).evaluate()
    trainer = RPOTrainer(checkpoint, args=args, train_dataset=preference_rows)
    plain = trainer.evaluate(preference_rows)
    assert "eval_weight/mean" not in plain
    for found in (given, trainer.evaluate(rows), trainer.evaluate(rows.to_iterable_dataset())):
        assert found["eval_weight/mean"] == pytest.approx(sum(WEIGHTS) / 16)
        assert found["eval_loss"] == pytest.approx(given["eval_loss"], rel=1e-5)
    assert abs(given["eval_loss"] - plain["eval_loss"]) > 1e-3
    batch = trainer.data_collator(
        [trainer.train_dataset[row] | {"weight": row % 2} for row in (0, 1)]
    )
    assert trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1] == 1
    with torch.no_grad():
        alone = trainer.data_collator([trainer.train_dataset[1]])
        losses = [trainer.compute_loss(trainer.model, b).item() for b in (batch, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ld_alpha", 0.5),
        ("use_weighting", True),
        ("f_divergence_type", "js_divergence"),
        ("loss_weights", [2.0]),
    ],
)
def test_what_changes_dpos_loss_goes_with_no_weights(
    checkpoint, preference_rows, tmp_path, name, value
):
    args = RPOConfig(str(tmp_path), **ONE_STEP, **{name: value})
    with pytest.raises(ValueError, match=f"`train_dataset` has a column `weight`, and `{name}"):
        RPOTrainer(checkpoint, args=args, train_dataset=weighed(preference_rows, WEIGHTS))
