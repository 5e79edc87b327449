"""Each trainer of ours, switched off, is TRL's: the same losses, weights and log, whatever it gets.

SFTMix without mixup is SFT, DCO at N = 1 is SFT where a step has one row, RPO with eta = 0 is DPO,
and so are TRL's trainers on our head. Names are those of TRL's arguments and of its datasets.
"""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmmix import (
    DCOConfig,
    DCOTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    attach_heads,
)

SETTINGS = {
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
ONE_ROW_A_STEP = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
# Trainer, config, its settings, settings that TRL's has too, and whether the head is attached
OURS = {
    "sft-attached": (SFTTrainer, SFTConfig, {}, {}, True),
    "sftmix": (SFTMixTrainer, SFTMixConfig, {"mixup_weight": 0.0}, {}, False),
    "dco": (
        *(DCOTrainer, DCOConfig, {"n_samples": 1, "reduction": "token_mean"}),
        *(ONE_ROW_A_STEP, False),
    ),
    "dpo-attached": (DPOTrainer, DPOConfig, {}, {}, True),
    "rpo": (RPOTrainer, RPOConfig, {"rpo_eta": 0.0}, {}, False),
}
OF_SFT, OF_DPO = ("sft-attached", "sftmix", "dco"), ("dpo-attached", "rpo")

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
OF_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
FAMILIES = {
    "llama": ("llama", SMALL | {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SMALL),
    "gemma2": ("gemma2", SMALL | {"final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", SMALL),
    "granite": ("granite", SMALL | {"logits_scaling": 3.0}),
    "cohere": ("cohere", SMALL | {"logit_scale": 0.5}),
    "mixtral": ("mixtral", SMALL | EXPERTS),
    "qwen3-moe": ("qwen3_moe", SMALL | EXPERTS | {"moe_intermediate_size": 8}),
    "gpt2": ("gpt2", OF_GPT2),
    "opt": ("opt", SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "phi": ("phi", SMALL),  # a bias on the head
}
QUICK_FAMILIES = ("llama", "gemma2", "cohere", "mixtral", "phi")


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **options})


ADAPTERS = {
    "lora": {"peft_config": lora()},
    "all-linear": {"peft_config": lora(target_modules="all-linear")},
    "modules-to-save": {"peft_config": lora(modules_to_save=["lm_head"])},
    "tokens": {"peft_config": lora(trainable_token_indices=[5, 60])},
    "dora": {"peft_config": lora(use_dora=True)},
    "ia3": {"peft_config": IA3Config(task_type="CAUSAL_LM")},
    "prompt-tuning": {
        "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    },
    "already-on": {"model": lambda folder: with_adapter(folder)},
}


def with_adapter(folder: str) -> PeftModel:
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # trained a little, no longer zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model


QUESTIONS = ["What is 2+2?", "And 17+25?", "10-3?", "What is 6*7?", "1+1?", "Is 9 odd?"]
ANSWERS = ["4", "It is 42.", "7", "42", "two, 2", "yes"]
WRONG = ["5", "It is 41, or not.", "8", "24", "3", "no"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def said(role, text):
    return [{"role": role, "content": text}]


def table(**columns):
    return Dataset.from_dict(columns)


ASKED = [said("user", q) for q in QUESTIONS]
ANSWERED = [said("assistant", a) for a in ANSWERS]
CHATS = table(messages=[q + a for q, a in zip(ASKED, ANSWERED, strict=True)])
PAIRS = table(prompt=QUESTIONS, completion=ANSWERS)
TEXTS = table(text=[q + a for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
TOKENS = table(input_ids=[[7, 8, 9, 10 + i, 11, 12][: 4 + i % 3] for i in range(6)])
LABELLED = TOKENS.map(lambda row: {"labels": [-100, *row["input_ids"][1:]]})
PREFERENCES = table(prompt=QUESTIONS, chosen=ANSWERS, rejected=WRONG)
TALKS = table(prompt=ASKED, chosen=ANSWERED, rejected=[said("assistant", w) for w in WRONG])


def own_collator(rows):
    """Batches of rows that have `tokens` alone, padded on the left."""
    longest = max(len(row["tokens"]) for row in rows)
    padded = [[0] * (longest - len(row["tokens"])) + row["tokens"] for row in rows]
    ids = torch.tensor(padded)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
    }


def share_of_right_tokens(prediction):
    return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class LearningRate(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + state.global_step)


SFT_CASES = {
    "text": {"rows": TEXTS},
    "chat": {"rows": CHATS},
    "chat-pairs": {"rows": table(prompt=ASKED, completion=ANSWERED)},
    "tools": {"rows": CHATS.add_column("tools", [TOOLS] * 6)},
    "conversations": {
        "rows": table(
            conversations=[[{"from": "user", "value": "2"}, {"from": "assistant", "value": "4"}]]
        )
    },
    "tokens": {"rows": TOKENS},
    "labelled": {"rows": LABELLED},
    "stream": {"rows": PAIRS.to_iterable_dataset()},
    "formatting": {
        "rows": table(q=QUESTIONS, a=ANSWERS),
        "formatting_func": lambda row: f"{row['q']} {row['a']}",
    },
    "collator": {
        "rows": TOKENS.rename_column("input_ids", "tokens"),
        "data_collator": own_collator,
        "options": {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "remove_unused_columns": False,
        },
    },
    "whole-pairs": {"options": {"completion_only_loss": False}},
    "assistant-only": {"rows": CHATS, "options": {"assistant_only_loss": True}},
    "cut": {"options": {"max_length": 20}},
    "cut-at-the-start": {"options": {"max_length": 12, "truncation_mode": "keep_end"}},
    "multiple": {"options": {"pad_to_multiple_of": 16}},
    "end-token": {"rows": TEXTS, "options": {"eos_token": "?"}},
    "template": {"rows": CHATS, "options": {"chat_template_path": "{folder}/chat_template.jinja"}},
    "evaluated": {
        "eval_dataset": {"a": PAIRS.select([0, 1]), "b": PAIRS.select([2])},
        "options": {"eval_strategy": "steps", "eval_steps": 1},
    },
    "metrics": {
        "eval_dataset": TOKENS.select([0, 3]),
        "rows": TOKENS,
        "compute_metrics": share_of_right_tokens,
        "options": {"eval_strategy": "steps", "eval_steps": 1},
    },
    "callback": {"callbacks": [LearningRate()]},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "by-length": {"options": {"train_sampling_strategy": "group_by_length"}},
    "noise": {"options": {"neftune_noise_alpha": 5.0}},
    "router": {"family": "mixtral", "options": {"router_aux_loss_coef": 0.5}},
    "instance": {"model": AutoModelForCausalLM.from_pretrained},
}
DPO_CASES = {
    "implicit": {
        "rows": table(
            chosen=[q + a for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
            rejected=[q + a for q, a in zip(QUESTIONS, WRONG, strict=True)],
        )
    },
    "chat": {"rows": TALKS},
    "tools": {"rows": TALKS.add_column("tools", [TOOLS] * 6)},
    "stream": {"rows": PREFERENCES.to_iterable_dataset()},
    "evaluated": {
        "eval_dataset": {"a": PREFERENCES.select([0, 1]), "b": PREFERENCES.select([2])},
        "options": {"eval_strategy": "steps", "eval_steps": 1},
    },
    "metrics": {
        "eval_dataset": PREFERENCES.select([0]),
        "compute_metrics": lambda prediction: {"size": float(prediction.predictions.std())},
        "options": {"eval_strategy": "steps", "eval_steps": 1},
    },
    "cut": {"options": {"max_length": 18}},
    "cut-at-the-start": {"options": {"max_length": 12, "truncation_mode": "keep_end"}},
    "reference": {"ref_model": lambda made: AutoModelForCausalLM.from_pretrained(made("qwen2"))},
    "precomputed": {"options": {"precompute_ref_log_probs": True}},
    "precomputed-lora": {"peft_config": lora(), "options": {"precompute_ref_log_probs": True}},
    "synced": {"options": {"sync_ref_model": True, "ref_model_sync_steps": 1}},
    "weighting": {"options": {"use_weighting": True}},
    "tail": {"options": {"ld_alpha": 0.5}},
    "divergence": {"options": {"f_divergence_type": "js_divergence"}},
    "router": {"family": "mixtral", "options": {"router_aux_loss_coef": 0.5}},
    "callback": {"callbacks": [LearningRate()]},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "instance": {"model": AutoModelForCausalLM.from_pretrained},
}
LOSSES = ["hinge", "ipo", "robust", "apo_zero", "discopop", "sigmoid_norm", "nca_pair"]
REFUSED = {"precomputed": "TRL's head", "precomputed-lora": "TRL's head"}  # by attach_heads

FOR_ALL = {f"family-{name}": {"family": name} for name in FAMILIES} | {
    f"adapter-{name}": given for name, given in ADAPTERS.items()
}
SFT_CASES = FOR_ALL | SFT_CASES
DPO_CASES = FOR_ALL | DPO_CASES
QUICK = {
    *(f"family-{name}" for name in QUICK_FAMILIES),
    *("adapter-modules-to-save", "adapter-prompt-tuning", "adapter-already-on", "metrics"),
    *("collator", "assistant-only", "precomputed-lora", "weighting", "reference", "evaluated"),
}


def marked(cases, names):
    return [
        pytest.param(name, case, marks=() if case in QUICK else pytest.mark.slow)
        for case in cases
        for name in names
    ]


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """A function of a family's name: the folder of a random checkpoint of it."""
    root = tmp_path_factory.mktemp("families")

    def made(name: str) -> str:
        folder = root / name
        if not folder.exists():
            kind, options = FAMILIES[name]
            torch.manual_seed(0)
            config = CONFIG_MAPPING[kind](
                vocab_size=len(tokenizer),
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                initializer_range=0.1,  # far from uniform, so that losses differ between rows
                **options,
            )
            model = AutoModelForCausalLM.from_config(config)
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return made


def train(trainer, config, case, made, output_dir, attached=False, **options):
    """Two steps: (what was logged, the weights after them)."""
    given = dict(case)
    folder = made(given.pop("family", "llama"))
    default = PREFERENCES if issubclass(trainer, DPOTrainer) else PAIRS
    options = {
        name: value.format(folder=folder) if isinstance(value, str) else value
        for name, value in (SETTINGS | given.pop("options", {}) | options).items()
    }
    if "ref_model" in given:
        given["ref_model"] = given["ref_model"](made)
    built = trainer(
        given.pop("model", str)(folder),
        args=config(str(output_dir), **options),
        train_dataset=given.pop("rows", default),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=copy.deepcopy(given.pop("peft_config", None)),
        **given,
    )
    if attached:
        attach_heads(built)
    built.train()
    weights = {n: p.detach() for n, p in built.model.named_parameters() if p.requires_grad}
    return built.state.log_history, weights


OWN = ("sftmix/", "dco/", "rpo/", "eval_dco/", "eval_rpo/", "eval_a_dco/", "eval_b_dco/")
OWN += tuple(f"{part}nll_per_token" for part in ("", "eval_", "eval_a_", "eval_b_"))
CLOCK = ("runtime", "per_second")


def values(entry: dict) -> dict:
    # Before the first step all margins are zero, and rounding alone says which is the larger
    tied = CLOCK + ("rewards/accuracies",) * (abs(entry.get("rewards/margins", 1)) < 1e-6)
    return {
        name: torch.tensor(float(value))
        for name, value in entry.items()
        if not name.endswith(tied) and not name.startswith(OWN)
    }


def assert_same(ours, theirs):
    (log, weights), (their_log, their_weights) = ours, theirs
    tolerance = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(
        list(map(values, log)), list(map(values, their_log)), **tolerance, equal_nan=False
    )
    torch.testing.assert_close(weights, their_weights, **tolerance)


@pytest.fixture(scope="module")
def theirs(made, tmp_path_factory):
    """A function of a case: TRL's run, made once for all trainers of ours."""
    runs = {}

    def theirs(name, case, trainer, config, **options):
        key = (name, trainer, str(options))
        if key not in runs:
            runs[key] = train(
                trainer, config, case, made, tmp_path_factory.mktemp("run"), **options
            )
        return runs[key]

    return theirs


@pytest.mark.parametrize(("name", "case"), marked(SFT_CASES, OF_SFT))
def test_switched_off_it_is_sft(name, case, made, theirs, tmp_path):
    trainer, config, own, shared, attached = OURS[name]
    given = SFT_CASES[case]
    ours = train(trainer, config, given, made, tmp_path, attached, **own, **shared)
    assert_same(ours, theirs(case, given, SFTTrainer, SFTConfig, **shared))


@pytest.mark.parametrize(("name", "case"), marked(DPO_CASES, OF_DPO))
def test_switched_off_it_is_dpo(name, case, made, theirs, tmp_path):
    trainer, config, own, shared, attached = OURS[name]
    given = DPO_CASES[case]
    if attached and case in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[case]):
            train(trainer, config, given, made, tmp_path, attached)
        return
    ours = train(trainer, config, given, made, tmp_path, attached, **own, **shared)
    assert_same(ours, theirs(case, given, DPOTrainer, DPOConfig, **shared))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_dpo_is_the_same_on_our_head(loss, made, theirs, tmp_path):
    options = {"loss_type": [loss], "label_smoothing": 0.1}
    ours = train(DPOTrainer, DPOConfig, {}, made, tmp_path, True, **options)
    assert_same(ours, theirs(loss, {}, DPOTrainer, DPOConfig, **options))
    with pytest.raises(ValueError, match="`loss_type` must be"):
        RPOConfig(str(Path(tmp_path)), loss_type=[loss])
