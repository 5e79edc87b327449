"""What is logged is a mean over rows or tokens, however they are put into batches."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from llmmix import (
    DCOConfig,
    DCOTrainer,
    FLATConfig,
    FLATTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    TokenLossConfig,
    TokenLossTrainer,
    UnlearnConfig,
    UnlearnTrainer,
)
from llmmix.training.means import Mean, log_metric

# Answers of 2 to 13 tokens
ANSWERS = ["x " * (1 + 5 * (row % 3)) for row in range(5)]
PROMPTS = [f"What is {row}+2?" for row in range(5)]
ROWS = {
    "pairs": Dataset.from_dict({"prompt": PROMPTS, "completion": ANSWERS}),
    "preferences": Dataset.from_dict(
        {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ["y " * (1 + row) for row in range(5)]}
    ),
    "questions": Dataset.from_dict({"question": PROMPTS, "answer": ANSWERS}),
}
RETAINED = Dataset.from_dict(
    {"question": [f"What is {row}+9?" for row in range(5)], "answer": ["z " * 4] * 5}
)
METHODS = {
    "dco": (DCOTrainer, DCOConfig, "pairs", {}),
    "sftmix": (SFTMixTrainer, SFTMixConfig, "pairs", {"mixup_weight": 0.0}),
    "token_losses": (TokenLossTrainer, TokenLossConfig, "pairs", {"loss_type": "gce"}),
    "rpo": (RPOTrainer, RPOConfig, "preferences", {}),
    "flat": (FLATTrainer, FLATConfig, "questions", {"retain_weight": 0.7}),
    "grad_diff": (UnlearnTrainer, UnlearnConfig, "questions", {"loss": "grad_diff"}),
    "pdu": (UnlearnTrainer, UnlearnConfig, "questions", {"loss": "pdu", "epsilon": 1.0}),
}
QUIET = {"bf16": False, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
OF_TRL = ("entropy", "accuracy", "num_tokens")


@pytest.fixture(scope="module")
def weights(checkpoint):
    """A model whose log-probabilities vary, which each trainer gets a copy of."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def make(weights, tokenizer, checkpoint, tmp_path):
    def make(method, **given):
        trainer, config, rows, own = METHODS[method]
        options = {name: given.pop(name) for name in ("compute_metrics",) if name in given}
        if "retain_weight" in own or trainer is UnlearnTrainer:
            options["retain_dataset"] = RETAINED
        model = copy.deepcopy(weights)
        model.name_or_path = checkpoint
        if trainer is RPOTrainer:
            options["ref_model"] = LlamaForCausalLM.from_pretrained(checkpoint)
        return trainer(
            model,
            args=config(str(tmp_path), **{**QUIET, **own, **given}),
            train_dataset=ROWS[rows],
            eval_dataset=ROWS[rows],
            processing_class=tokenizer,
            **options,
        )

    return make


def numbers(logged):
    clocks = ("runtime", "per_second", "time", "epoch", "grad_norm", *OF_TRL)
    named = {name: x for name, x in logged.items() if not name.endswith(clocks)}
    return {name: x for name, x in named.items() if "logits/" not in name}  # of TRL too


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_says_the_same_in_batches_of_any_size(make, method):
    """Its loss too, and before any training; the NLL of a token is that by hand."""
    whole, parted = (make(method, per_device_eval_batch_size=size) for size in (5, 2))
    logged, expected = numbers(parted.evaluate()), numbers(whole.evaluate())
    assert {"eval_loss", "eval_nll_per_token"} <= logged.keys()
    assert logged["eval_nll_per_token"] == pytest.approx(nll_per_token(parted), rel=1e-5)
    if method == "sftmix":  # without mixup it is SFT, whose loss is a mean of the batches'
        logged.pop("eval_loss")
    assert logged == pytest.approx({name: expected[name] for name in logged}, rel=1e-5, abs=1e-7)


def nll_per_token(trainer):
    """By hand, a row at a time: of the rows to forget, or of the chosen ones."""
    total = count = 0.0
    for number in range(5):
        batch = trainer.data_collator([trainer.eval_dataset[number]])
        part = trainer.parts.index("forget") if hasattr(trainer, "parts") else 0
        ids, mask = batch["input_ids"][[part]], batch["attention_mask"][[part]]
        if "labels" in batch:
            labels = batch["labels"][[part]]
        else:
            labels = ids.masked_fill(batch["completion_mask"][[0]] == 0, -100)
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=mask).logits
        found = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        total, count = total + found.item(), count + (labels[0, 1:] != -100).sum().item()
    return total / count


@pytest.mark.parametrize("method", ["dco", "rpo", "flat", "grad_diff"])
def test_a_step_logs_the_same_in_one_micro_batch_or_in_several(make, method):
    settings = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no"}
    logged = []
    for rows, accumulation in ((5, 1), (2, 3)):
        trainer = make(
            method,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        trainer.train()
        logged.append(numbers(trainer.state.log_history[0]))
    assert logged[1] == pytest.approx(logged[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["dco", "rpo", "flat", "grad_diff"])
def test_predictions_are_logits_a_row_and_metrics_are_computed(make, method):
    seen = []

    def compute_metrics(found):
        seen.append(found)
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    trainer = make(method, per_device_eval_batch_size=5, compute_metrics=compute_metrics)
    assert "eval_accuracy" in trainer.evaluate()
    unlearns = hasattr(trainer.train_dataset, "collate")
    found = trainer.predict(ROWS["questions"] if unlearns else trainer.eval_dataset)
    assert np.array_equal(found.predictions, seen[0].predictions)
    assert found.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    rows = 10 if method == "rpo" else 5  # both of a pair, as in TRL
    assert len(found.predictions) == len(found.label_ids) == rows
    if unlearns:
        text = trainer.processing_class.decode(found.label_ids[1][found.label_ids[1] != -100])
        assert "x x x" in text  # of the rows to forget


def test_unlearning_gathers_no_inputs_of_several_parts(make):
    with pytest.raises(ValueError, match="`include_for_metrics=\\['inputs'\\]` would gather"):
        make("flat", include_for_metrics=["inputs"])


def test_a_mean_adds_sums_and_divides_once():
    mean = Mean()
    assert list(mean) == [0.0]
    mean.add(6.0, 2)
    mean.add(1.0, 5)
    assert list(mean) == [1.0] and sum(mean) / len(mean) == 1.0
    gap = Mean()
    gap.add(6.0, 2, 1.0, 1)
    gap.add(0.0, 1, 3.0, 1)
    assert list(gap) == [6 / 3 - 4 / 2]


def test_a_trainer_without_trls_log_shows_no_metric(model, tmp_path):
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **QUIET))
    log_metric(trainer, "anything", 1.0, 2)
    assert not hasattr(trainer, "_metrics")
