"""What every trainer of ours refuses, checks, counts and logs."""

import logging

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from llmmix import (
    DCOConfig,
    DCOTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    attach_head,
    attach_heads,
)
from llmmix.dco import dco_loss

QUIET = {"bf16": False, "max_steps": 1, "disable_tqdm": True, "use_cpu": True}


def chat(text, role="assistant"):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize("trainer", [DCOTrainer, SFTMixTrainer])
@pytest.mark.parametrize("option", ["packing", "eval_packing"])
def test_packing_is_refused(checkpoint, math_rows, trainer, option):
    config = DCOConfig if trainer is DCOTrainer else SFTMixConfig
    args = config("out", **QUIET, **{option: True})
    with pytest.raises(ValueError, match=f"`{option}=True` merges.*and `padding_free=True`"):
        trainer(checkpoint, args=args, train_dataset=math_rows)


@pytest.mark.parametrize(
    ("option", "value"), [("label_smoothing_factor", 0.1), ("loss_type", "dft")]
)
def test_another_loss_beside_ours_is_refused(checkpoint, math_rows, option, value):
    args = DCOConfig("out", **QUIET, **{option: value})
    with pytest.raises(ValueError, match=f"is a loss of its own: leave `{option}`"):
        DCOTrainer(checkpoint, args=args, train_dataset=math_rows)


@pytest.mark.parametrize(
    ("trainer", "config"), [(DCOTrainer, DCOConfig), (SFTMixTrainer, SFTMixConfig)]
)
def test_a_loss_function_beside_ours_is_refused(checkpoint, math_rows, trainer, config):
    with pytest.raises(ValueError, match="leave `compute_loss_func`"):
        trainer(
            checkpoint,
            args=config("out", **QUIET),
            train_dataset=math_rows,
            compute_loss_func=lambda *_, **__: None,
        )


def test_formatting_func_takes_columns_of_any_name(checkpoint, tmp_path):
    rows = Dataset.from_dict({"question": ["2+2="] * 4, "answer": ["4"] * 4})
    trainer = DCOTrainer(
        checkpoint,
        args=DCOConfig(str(tmp_path), **QUIET),
        train_dataset=rows,
        formatting_func=lambda row: row["question"] + row["answer"],
    )
    assert trainer.train().training_loss > 0


def test_a_template_given_by_path_is_enough(checkpoint, math_rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    (tmp_path / "chat.jinja").write_text(tokenizer.chat_template)
    tokenizer.chat_template = None
    args = DCOConfig(str(tmp_path), chat_template_path=str(tmp_path / "chat.jinja"), **QUIET)
    DCOTrainer(checkpoint, args=args, train_dataset=math_rows, processing_class=tokenizer)


def test_chat_rows_scored_whole_are_pointed_out(checkpoint, caplog):
    rows = Dataset.from_list([{"messages": [*chat("2+2", "user"), *chat("4")]}] * 4)
    with caplog.at_level(logging.WARNING):
        DCOTrainer(checkpoint, args=DCOConfig("out", **QUIET), train_dataset=rows)
        assert "Scored: 100% of 56 tokens, whole chats, the user's turns included" in caplog.text
        caplog.clear()
        args = DCOConfig("out", assistant_only_loss=True, **QUIET)
        trainer = DCOTrainer(checkpoint, args=args, train_dataset=rows)
        assert "Scored: 14% of 56 tokens, the assistant's turns." in caplog.text
    scored = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    assert trainer.processing_class.decode(scored) == "4<|im_end|>"


def test_evaluation_rows_are_checked_too(checkpoint, math_rows):
    with pytest.raises(ValueError, match="`eval_dataset` has the columns"):
        DCOTrainer(
            checkpoint,
            args=DCOConfig("out", **QUIET),
            train_dataset=math_rows,
            eval_dataset=math_rows.select_columns(["answer"]),
        )


def test_rows_that_max_length_empties_are_counted(checkpoint, math_rows, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = DCOTrainer(
            checkpoint, args=DCOConfig("out", max_length=29, **QUIET), train_dataset=math_rows
        )
    dropped = len(math_rows) - len(trainer.train_dataset)
    assert dropped > 0 and f"Dropped {dropped} of 24 rows: with max_length=29" in caplog.text
    with pytest.raises(ValueError, match="`max_length=5` leaves no row of 24"):
        DCOTrainer(
            checkpoint, args=DCOConfig("out", max_length=5, **QUIET), train_dataset=math_rows
        )


def test_rows_that_max_length_cuts_are_counted(checkpoint, caplog):
    rows = Dataset.from_dict({"prompt": ["2+2="] * 2, "completion": ["4", "1234567890" * 3]})
    with caplog.at_level(logging.WARNING):
        DCOTrainer(checkpoint, args=DCOConfig("out", max_length=20, **QUIET), train_dataset=rows)
    assert "1 of 2 rows fill max_length=20 and may be cut short" in caplog.text


@pytest.mark.parametrize("kind", ["text", "messages", "prompt-completion", "conversations"])
def test_every_sft_format_trains(checkpoint, kind, tmp_path):
    rows = {
        "text": {"text": "2+2=4"},
        "messages": {"messages": [*chat("2+2", "user"), *chat("4")]},
        "prompt-completion": {"prompt": "2+2=", "completion": "4"},
        "conversations": {
            "conversations": [{"from": "human", "value": "2"}, {"from": "gpt", "value": "4"}]
        },
    }[kind]
    dataset = Dataset.from_list([rows] * 4)
    trainer = DCOTrainer(checkpoint, args=DCOConfig(str(tmp_path), **QUIET), train_dataset=dataset)
    assert trainer.train().training_loss > 0


def test_streaming_dco(checkpoint, math_rows, tmp_path):
    trainer = DCOTrainer(
        checkpoint,
        args=DCOConfig(str(tmp_path), **QUIET),
        train_dataset=math_rows.to_iterable_dataset(),
    )
    assert trainer.train().training_loss > 0


def test_evaluation_reports_the_methods_loss(checkpoint, math_rows, preference_rows, tmp_path):
    for trainer, config, rows in (
        (DCOTrainer, DCOConfig, math_rows),
        (SFTMixTrainer, SFTMixConfig, math_rows),
        (RPOTrainer, RPOConfig, preference_rows),
    ):
        built = trainer(
            checkpoint,
            args=config(
                str(tmp_path),
                eval_strategy="steps",
                eval_steps=1,
                per_device_eval_batch_size=24,
                **QUIET,
            ),
            train_dataset=rows,
            eval_dataset=rows,
        )
        built.train()
        evaluated = [e for e in built.state.log_history if "eval_loss" in e]
        logged = evaluated[-1]
        if trainer is RPOTrainer:
            terms = logged["eval_rpo/dpo_loss"] + logged["eval_rpo/sft_loss"]
            assert logged["eval_loss"] == pytest.approx(terms, rel=1e-4)
            continue
        # by hand, a row at a time
        expected, tokens = [], 0
        attach_head(built.model)
        for row in built.eval_dataset:
            batch = built.data_collator([{k: row[k] for k in ("input_ids", "labels")}])
            batch = {key: value.to(built.args.device) for key, value in batch.items()}
            with torch.no_grad():
                output = built.model(**batch, fused_lm_head=True)
            tokens += int(output.label_mask.sum())
            logps = output.log_probs.sum(1)
            expected.append(dco_loss(logps, 64) if trainer is DCOTrainer else -logps)
        mean = torch.cat(expected).sum() / (24 if trainer is DCOTrainer else tokens)
        assert logged["eval_loss"] == pytest.approx(mean.item(), rel=1e-4)


def test_metrics_of_the_methods_are_logged(checkpoint, math_rows, tmp_path):
    wanted = {
        DCOTrainer: {"dco/weight", "dco/braked", "entropy", "mean_token_accuracy"},
        SFTMixTrainer: {
            *("sftmix/ntp_loss", "sftmix/mixup_loss", "sftmix/lam", "sftmix/mixed_tokens"),
            *("sftmix/confidence_gap", "entropy"),
        },
    }
    for trainer, config in ((DCOTrainer, DCOConfig), (SFTMixTrainer, SFTMixConfig)):
        built = trainer(
            checkpoint,
            args=config(str(tmp_path), logging_steps=1, **QUIET),
            train_dataset=math_rows,
        )
        built.train()
        logged = built.state.log_history[0]
        assert wanted[trainer] <= set(logged)
        if trainer is SFTMixTrainer:
            expected = logged["sftmix/ntp_loss"] + 0.2 * logged["sftmix/mixup_loss"]
            assert logged["loss"] == pytest.approx(expected, rel=1e-4)
            assert 0 < logged["sftmix/mixed_tokens"] <= 1 and 0 < logged["sftmix/lam"] < 1


def test_dco_warns_once_when_it_is_cross_entropy(checkpoint, math_rows, tmp_path, caplog):
    args = DCOConfig(str(tmp_path), **{**QUIET, "max_steps": 3}, logging_steps=1, n_samples=2)
    with caplog.at_level(logging.WARNING):
        DCOTrainer(checkpoint, args=args, train_dataset=math_rows).train()
    assert caplog.text.count("so this is cross-entropy so far") == 1
    assert "99% of the examples" in caplog.text


def test_trained_model_saves_and_loads_as_an_ordinary_one(checkpoint, math_rows, tmp_path):
    trainer = SFTMixTrainer(
        checkpoint, args=SFTMixConfig(str(tmp_path), **QUIET), train_dataset=math_rows
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists()
    trainer.create_model_card("mine")
    card = (tmp_path / "README.md").read_text()
    assert "SFTMix" in card and "2410.05248" in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(trainer.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.cpu(), b)


ONE_BF16_STEP = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "logging_steps": 1,
    "bf16": True,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.mark.parametrize("reference", ["loaded", "given", "adapter"])
def test_a_dpo_trainer_on_our_head_begins_at_a_margin_of_zero(
    checkpoint, preference_rows, tmp_path, reference
):
    """Under bf16 TRL's head would score the reference otherwise than ours the policy."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.5)
    trainer = DPOTrainer(
        checkpoint,
        AutoModelForCausalLM.from_pretrained(checkpoint) if reference == "given" else None,
        DPOConfig(str(tmp_path), use_weighting=True, **ONE_BF16_STEP),
        train_dataset=preference_rows,
        peft_config=lora if reference == "adapter" else None,
    )
    attach_heads(trainer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/margins"] == logged["rewards/chosen"] == 0.0


def test_attach_heads_takes_trls_trainers_of_sft_and_dpo(model):
    trainer = Trainer(model, TrainingArguments("out", **QUIET))
    with pytest.raises(TypeError, match="must be an SFTTrainer or a DPOTrainer, got Trainer"):
        attach_heads(trainer)


def test_a_head_attached_for_less_says_what_the_trainer_reads(
    checkpoint, preference_rows, tmp_path
):
    trainer = DPOTrainer(
        checkpoint,
        args=DPOConfig(str(tmp_path), use_weighting=True, **ONE_BF16_STEP),
        train_dataset=preference_rows,
    )
    attach_head(trainer.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    with pytest.raises(AttributeError, match="did not compute `log_sum_sq_probs`.*attach_heads"):
        trainer.train()


def test_rows_of_a_json_file_train(checkpoint, math_rows, tmp_path):
    math_rows.to_json(tmp_path / "rows.jsonl")
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    trainer = SFTMixTrainer(
        checkpoint, args=SFTMixConfig(str(tmp_path), **QUIET), train_dataset=rows
    )
    assert trainer.train().training_loss > 0
