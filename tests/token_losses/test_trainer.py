"""Token losses in their trainer: the same run as TRL's where the loss is the same."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from llmmix import SFTMixConfig, SFTMixTrainer, TokenLossConfig, TokenLossTrainer, attach_heads
from llmmix.facts import note_run, read_facts
from llmmix.token_losses.objective import TokenObjective

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


@pytest.fixture(scope="module")
def nll(checkpoint, tmp_path_factory):
    """What a run on nll logs, and its weights, made once."""
    kept = []

    def nll(make):
        if not kept:
            kept.append(finish(make(loss_type="nll")))
        return kept[0]

    return nll


@pytest.mark.parametrize("loss_type", OFF)
def test_a_loss_whose_setting_is_off_is_nll(make, nll, loss_type):
    log, weights = finish(make(loss_type=loss_type, **OFF[loss_type]))
    expected_log, expected = nll(make)
    assert losses(log) == pytest.approx(losses(expected_log), rel=1e-6)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_is_the_same_in_micro_batches_of_any_size(make, nll):
    log, weights = finish(make(loss_type="gem"))
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    expected_log, expected = finish(make(loss_type="gem", **whole))
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert (weights - nll(make)[1]).abs().max() > 1e-4
    own = ("loss", "nll_per_token", "token_losses/weight", "token_losses/prob")
    for entry, other in zip(log[:-1], expected_log[:-1], strict=True):
        for name in own:
            assert entry[name] == pytest.approx(other[name], rel=1e-5), name


@pytest.fixture(scope="module")
def trained_on(checkpoint, math_rows, tmp_path_factory):
    """A trainer on a model whose probabilities vary, given one loss after the other."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = str(tmp_path_factory.mktemp("run"))
    own = {name: {"loss_type": name} for name in ALONE}
    own["eaft over all"] = {"loss_type": "eaft", "eaft_top_k": 0}
    # A config ends the accelerator of a trainer, so they come first
    configs = {name: TokenLossConfig(folder, **SETTINGS, **given) for name, given in own.items()}
    trainer = TokenLossTrainer(
        model,
        args=configs["nll"],
        train_dataset=math_rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )

    def on(name):
        trainer.args = configs[name]
        vocabulary = model.config.vocab_size
        trainer.objective = TokenObjective(trainer.args, vocabulary)
        attach_heads(trainer, **trainer.objective.head)
        model.zero_grad()
        return trainer

    return on


def from_logits(loss_type, logits, labels):
    """The loss of each token by its definition, in fp64."""
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp()
    lp = log_probs.gather(-1, labels[:, None]).squeeze(-1)
    p = lp.exp()
    top = log_probs.topk(20).values.log_softmax(-1)
    return {
        "nll": -lp,
        "dft": -p.detach() * lp,
        "gce": (1 - p**0.7) / 0.7,
        "threshold": torch.where(p >= 0.1, -lp, 0.0),
        "deft": (1 - p ** (probs**2).sum(-1).detach()) / (probs**2).sum(-1).detach(),
        "eaft": (-(top.exp() * top).sum(-1) / math.log(20)).detach() * -lp,
        "focal": (1 - p) ** 2 * -lp,
        "label_smoothing": 0.9 * -lp + 0.1 * -log_probs.mean(-1),
        "gem": -0.7
        * (logits.double() / 0.7).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1),
        "eaft over all": (-(probs * log_probs).sum(-1) / math.log(logits.size(-1))).detach() * -lp,
    }[loss_type]


@pytest.mark.parametrize("loss_type", [*ALONE, "eaft over all"])
def test_a_loss_is_its_formula_on_the_models_own_logits(trained_on, loss_type):
    """Value and gradient; and an exact zero with a gradient where no token is scored."""
    trainer = trained_on(loss_type)
    model = trainer.model
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**plain).logits[:, :-1][scored]
    expected = from_logits(loss_type, logits, labels[scored]).sum() / 7
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad.float(), rtol=1e-3, atol=1e-6)
    model.zero_grad()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    nothing = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(7))
    assert nothing.item() == 0
    nothing.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.eq(0).all() for gradient in gradients)


def test_packed_rows_are_the_padded_ones_in_a_full_batch(make):
    """TRL packs; a step holds all rows, in whatever order."""
    settings = {"loss_type": "gce", "per_device_train_batch_size": 16, "max_length": 64}
    settings |= {"gradient_accumulation_steps": 1, "max_steps": 2}
    padded, expected = finish(make(**settings))
    packed = make(packing=True, **settings)
    assert len(packed.train_dataset) < 16
    log, weights = finish(packed)
    assert losses(log) == pytest.approx(losses(padded), rel=1e-5)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_what_was_asked_for_is_in_the_settings_that_are_saved(make, tmp_path):
    trainer = make(loss_type="label_smoothing", label_smoothing_factor=0.2, save_strategy="steps")
    assert trainer.label_smoother is None  # transformers would run a second forward
    trainer.train()
    for folder in sorted(tmp_path.glob("checkpoint-*"))[-1:]:
        saved = torch.load(folder / "training_args.bin", weights_only=False)
        assert (saved.loss_type, saved.label_smoothing_factor) == ("label_smoothing", 0.2)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "the token loss label_smoothing" in card
    note_run(trainer)  # for the report, where losses of other kinds have other units
    assert read_facts(tmp_path)["method"] == "TokenLoss (label_smoothing)"


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
    make(loss_type="dft", max_grad_norm=0.97)
    finish(make(loss_type="dft", max_grad_norm=0.97))
    told = [record.getMessage() for record in caplog.records]
    assert len([text for text in told if "next to nothing is learned" in text]) == 1
    assert len([text for text in told if "scales the gradient of each token" in text]) == 1
    caplog.clear()
    finish(make(loss_type="nll", max_grad_norm=0.97))
    assert "loss_type" not in caplog.text
    finish(make(loss_type="gem", gem_beta=0.01, max_grad_norm=0.97))
    assert "next to nothing is learned" not in caplog.text  # beta is no scale of the gradient


@pytest.mark.parametrize(("strategy", "cut"), [("bfd", 4), ("wrapped", 0)])
def test_packed_rows_are_not_called_dropped(make, rows, strategy, cut, caplog):
    lengths = sorted(len(row["input_ids"]) for row in make().train_dataset)
    limit = lengths[-cut] if cut else lengths[-1] + 1
    cut = sum(length >= limit for length in lengths)
    caplog.clear()
    packed = make(packing=True, packing_strategy=strategy, max_length=limit).train_dataset
    assert len(packed) < len(rows)
    assert f"Packed {len(rows)} rows into {len(packed)}, each of at most" in caplog.text
    assert "Dropped" not in caplog.text
    assert (f"{cut} of {len(rows)} rows fill max_length={limit}" in caplog.text) == bool(cut)


@pytest.mark.parametrize("loss_type", ["gce", "label_smoothing"])
def test_sftmix_takes_a_token_loss_for_its_next_tokens(make, loss_type):
    """Without mixup it is that loss."""
    ours, weights = finish(make(SFTMixTrainer, mixup_weight=0.0, loss_type=loss_type))
    alone, expected = finish(make(loss_type=loss_type))
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
