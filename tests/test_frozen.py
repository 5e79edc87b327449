"""A model that stands still beside the one that trains."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from llmmix.frozen import FrozenModel, frozen_copy, switches_off

IDS = torch.arange(3, 13).unsqueeze(0)


def trainer_of(model, folder):
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none"))


def answer(frozen, model):
    with frozen.running(model) as running:
        return running(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("config", "off"),
    [
        (None, False),
        (LoraConfig(), True),
        (LoraConfig(init_lora_weights="gaussian"), True),
        (LoraConfig(init_lora_weights="pissa"), False),
        (LoraConfig(bias="all"), False),  # switched off, it leaves the biases trained
        (IA3Config(), True),
    ],
    ids=["none", "lora", "gaussian", "pissa", "bias", "ia3"],
)
def test_which_adapters_leave_the_model_as_it_was(config, off):
    assert switches_off(config) is off


@pytest.mark.parametrize("adapter", [False, True])
def test_a_copy_stands_still_and_shares_what_is_frozen(model, tmp_path, adapter):
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
        model.base_model.model.model.embed_tokens.weight.requires_grad_(False)
    else:
        model.model.embed_tokens.weight.requires_grad_(False)
    before = model.eval()(input_ids=IDS).logits.detach()
    frozen = FrozenModel(trainer_of(model.train(), tmp_path), frozen_copy(model))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kept = dict(frozen.own.named_parameters())
    shared = {n for n, p in model.named_parameters() if kept[n] is p}
    assert shared and shared.isdisjoint(trained) and shared | set(trained) == set(kept)
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.01)
    found = answer(frozen, model)
    assert torch.equal(found, before) and not found.requires_grad and model.training
    frozen.renew(model)
    assert torch.equal(answer(frozen, model), model.eval()(input_ids=IDS).logits)


def test_what_is_trained_after_the_copy_was_made_is_refused(model, tmp_path):
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = FrozenModel(trainer_of(model, tmp_path), frozen_copy(model))
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen when the trainer was made is trained now"):
        answer(frozen, model)


def test_an_adapter_switched_off_trains_on_as_before(model, tmp_path):
    before = model.eval()(input_ids=IDS).logits.detach()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * weight.requires_grad)
    frozen = FrozenModel(trainer_of(model.train(), tmp_path))
    assert torch.equal(answer(frozen, model), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert not torch.equal(model(input_ids=IDS).logits, before)
