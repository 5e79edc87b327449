"""What the trainers are given: configs that become theirs, TRL's order, and what is refused."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
)
from trl import DPOConfig, SFTConfig

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

# Trainer, config, TRL's, and a trait of the first step that a default of ours sets
TRAINERS = {
    "dco": (DCOTrainer, DCOConfig, SFTConfig),
    "sftmix": (SFTMixTrainer, SFTMixConfig, SFTConfig),
    "token_losses": (TokenLossTrainer, TokenLossConfig, SFTConfig),
    "rpo": (RPOTrainer, RPOConfig, DPOConfig),
    "flat": (FLATTrainer, FLATConfig, SFTConfig),
    "unlearn": (UnlearnTrainer, UnlearnConfig, SFTConfig),
}
ONE_STEP = {"max_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True}
SMALL = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}


@pytest.fixture
def rows(math_rows, preference_rows):
    """The training rows of a trainer, by its name."""
    forget = Dataset.from_dict({"question": ["2+2?"] * 4, "answer": ["4"] * 4})
    return lambda name: {"rpo": preference_rows, "flat": forget, "unlearn": forget}.get(
        name, math_rows
    )


def others(name):
    retain = Dataset.from_dict({"question": ["3+3?"] * 4, "answer": ["6"] * 4})
    return {"retain_dataset": retain} if name == "unlearn" else {}


@pytest.mark.parametrize("kind", ["parent", "transformers"])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_config_that_ours_extends_becomes_ours(checkpoint, rows, tmp_path, name, kind):
    trainer, config, parent = TRAINERS[name]
    given = {"learning_rate": 3e-3, "hub_token": "secret", "lr_scheduler_type": "cosine"}
    if kind == "parent":
        given |= {"max_length": 77, "pad_token": "<|im_end|>"}
    own = {field.name for field in fields(config)} - {field.name for field in fields(parent)}
    expected = given | {name: value for name, value in vars(config("out")).items() if name in own}
    args = (parent if kind == "parent" else TrainingArguments)(str(tmp_path), **given, **ONE_STEP)
    before = args.to_json_string()
    built = trainer(checkpoint, args=args, train_dataset=rows(name), **others(name))
    assert type(built.args) is config and args.to_json_string() == before
    assert {name: getattr(built.args, name) for name in expected} == expected
    assert math.isfinite(built.train().training_loss)


@pytest.mark.parametrize("name", TRAINERS)
def test_another_config_is_refused_at_once(checkpoint, rows, name):
    trainer, config, _ = TRAINERS[name]
    foreign = UnlearnConfig if config is not UnlearnConfig else DCOConfig
    for args, message in (
        (foreign("out", **ONE_STEP), f"must be {config.__name__}.*{foreign.__name__}, whose `"),
        ({"output_dir": "out"}, "got dict"),
        (rows(name), "got Dataset"),
        ("out", "got str"),
        (DPOConfig if config is not RPOConfig else SFTConfig, "got type"),
    ):
        with pytest.raises(TypeError, match=message):
            trainer(checkpoint, args=args, train_dataset=rows(name))


def test_a_config_of_the_users_own_is_taken_or_refused(checkpoint, rows, tmp_path):
    class Mine(DCOConfig):
        pass

    args = Mine(str(tmp_path), **ONE_STEP)
    assert DCOTrainer(checkpoint, args=args, train_dataset=rows("dco")).args is args


@pytest.mark.parametrize("name", ["dco", "sftmix"])
def test_arguments_stand_in_trls_order(checkpoint, rows, tmp_path, name):
    trainer, config, _ = TRAINERS[name]

    def collate(rows):
        return {
            "input_ids": torch.tensor([row["input_ids"][:8] for row in rows]),
            "labels": torch.tensor([row["labels"][:8] for row in rows]),
        }

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    args = config(str(tmp_path), **ONE_STEP)
    few = rows(name).select(range(2))
    built = trainer(checkpoint, args, collate, rows(name), few, tokenizer)
    assert built.data_collator is collate and built.processing_class is tokenizer
    assert len(built.eval_dataset) == 2 < len(built.train_dataset)


def test_arguments_stand_in_trls_order_in_rpo_and_unlearning(checkpoint, rows, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    few = rows("rpo").select(range(2))
    args = RPOConfig(str(tmp_path), **ONE_STEP)
    built = RPOTrainer(checkpoint, reference, args, None, rows("rpo"), few, tokenizer)
    assert built.ref_model is reference and len(built.eval_dataset) == 2
    assert built.processing_class is tokenizer
    for name in ("flat", "unlearn"):
        trainer, config, _ = TRAINERS[name]
        args = config(str(tmp_path), **ONE_STEP)
        few = rows(name).select(range(2))
        built = trainer(checkpoint, args, None, rows(name), few, tokenizer, **others(name))
        assert len(built.eval_dataset) == 2 and built.processing_class is tokenizer


@pytest.mark.parametrize("name", TRAINERS)
def test_a_model_in_python_may_be_named_as_on_the_command_line(
    name, checkpoint, rows, tmp_path, monkeypatch
):
    trainer, config, _ = TRAINERS[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path))
    for folder in ("m", "tiny-1"):
        (tmp_path / folder).symlink_to(checkpoint)
    for given in ("~/m", Path("~/m"), Path(checkpoint), "builtin:tiny"):
        args = config(str(tmp_path / "out"), **ONE_STEP)
        built = trainer(given, args=args, train_dataset=rows(name), **others(name))
        assert built.model.config.hidden_size == 32
    with pytest.raises(FileNotFoundError, match="`model`: no file or folder"):
        trainer("~/no", args=args, train_dataset=rows(name), **others(name))


@pytest.mark.parametrize("name", TRAINERS)
def test_what_stands_in_anothers_place_is_refused_at_once(checkpoint, rows, name):
    trainer, given = TRAINERS[name][0], rows(name)
    classifier = LlamaForSequenceClassification(LlamaConfig(**SMALL))
    causal_lm = "`model` must be a Hugging Face causal language model"
    for arguments, message in (
        ({"data_collator": given}, "`data_collator` must be a function.*got Dataset. As in TRL"),
        ({"train_dataset": [{"text": "a"}]}, "`train_dataset` must be a `Dataset`.*got list"),
        ({"train_dataset": DatasetDict(train=given)}, "`train_dataset` .*got DatasetDict"),
        ({"train_dataset": "rows.jsonl"}, "`train_dataset` .*got str"),
        ({"eval_dataset": [1]}, "`eval_dataset` must be a `Dataset`.*got list"),
        ({"eval_dataset": {"a": given, "b": 3}}, r"`eval_dataset\['b'\]` .*got int"),
        ({"model": None}, f"{causal_lm}.*got NoneType"),
        ({"model": nn.Linear(2, 2)}, f"{causal_lm}.*got Linear"),
        ({"model": classifier}, f"{causal_lm}.*got LlamaForSequenceClassification"),
    ):
        with pytest.raises(TypeError, match=message):
            trainer(**{"model": checkpoint, "train_dataset": given, **arguments})


def test_a_config_in_the_place_of_the_reference_is_refused_at_once(checkpoint, rows):
    args = RPOConfig("out", **ONE_STEP)
    with pytest.raises(TypeError, match="`ref_model` must be a Hugging Face.*got RPOConfig"):
        RPOTrainer(checkpoint, args, train_dataset=rows("rpo"))


def test_every_one_of_several_evaluation_sets_is_checked(checkpoint, rows):
    for name in ("dco", "sftmix", "rpo"):
        given = rows(name)
        with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` has the columns \['other'\]"):
            TRAINERS[name][0](
                checkpoint,
                args=TRAINERS[name][1]("out", **ONE_STEP),
                train_dataset=given,
                eval_dataset={"a": given, "b": Dataset.from_dict({"other": [1]})},
            )


@pytest.mark.parametrize("name", ["flat", "unlearn"])
def test_what_rows_to_forget_would_not_call_is_refused(checkpoint, rows, name):
    for argument in ("data_collator", "formatting_func"):
        with pytest.raises(ValueError, match=f"`{argument}` would not be called"):
            TRAINERS[name][0](
                checkpoint, train_dataset=rows(name), **{argument: str}, **others(name)
            )


@pytest.mark.parametrize("name", TRAINERS)
def test_models_are_tagged_as_trls_and_ours(checkpoint, rows, tmp_path, name):
    args = TRAINERS[name][1](str(tmp_path), **ONE_STEP)
    built = TRAINERS[name][0](checkpoint, args=args, train_dataset=rows(name), **others(name))
    kin = {"rpo": {"dpo"}, "dco": {"sft"}, "sftmix": {"sft"}, "token_losses": {"sft"}}.get(
        name, set()
    )
    assert set(built.model.model_tags) == {"trl", "llmmix", name} | kin


def test_lora_on_the_head_is_refused_by_trl(checkpoint, rows):
    """As docs/guides/fused_head.md says: once TRL allows it, our head computes it."""
    for name in ("dco", "sftmix", "rpo"):
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            TRAINERS[name][0](
                checkpoint,
                args=TRAINERS[name][1]("out", **ONE_STEP),
                train_dataset=rows(name),
                peft_config=lora,
            )
