"""A run without padding is the padded run, whatever the trainer, the model and the adapter."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
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
    attach_heads,
)

SETTINGS = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
DCO = (DCOTrainer, DCOConfig, {"n_samples": 16})
SFTMIX = (SFTMixTrainer, SFTMixConfig, {"mixup_weight": 0.5})
RPO = (RPOTrainer, RPOConfig, {"rpo_eta": 0.5})
TOKENS = (TokenLossTrainer, TokenLossConfig, {"loss_type": "eaft"})
TRL_SFT = (SFTTrainer, SFTConfig, {})
TRL_DPO = (DPOTrainer, DPOConfig, {})
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
            "experts_implementation": "eager",  # the grouped product knows no fp64
        },
    ),
}


@pytest.fixture
def both(checkpoint, math_rows, preference_rows, tokenizer, tmp_path):
    """What a run with padding logs and reads, and the same without padding."""
    uneven = math_rows.map(
        lambda row, i: {"completion": row["completion"] * (1 + i % 4)}, with_indices=True
    )

    def run(method, padding_free, lora, family, given):
        trainer_type, config, own = method
        given = {**SETTINGS, **own, **given}
        rows = preference_rows if issubclass(trainer_type, DPOTrainer) else uneven
        ours = trainer_type not in (SFTTrainer, DPOTrainer)
        if ours:
            given["padding_free"] = padding_free
        trainer = trainer_type(
            checkpoint if family is None else model_of(family, tokenizer),
            args=config(str(tmp_path), **given),
            train_dataset=rows.select(range(12)),
            eval_dataset=rows.select(range(12, 16)),
            processing_class=tokenizer,
            peft_config=LORA if lora else None,
        )
        if padding_free and not ours:
            attach_heads(trainer, padding_free=True)
        return finish(trainer)

    return lambda method, lora=False, family=None, **given: [
        run(method, padding_free, lora, family, given) for padding_free in (False, True)
    ]


def model_of(family, tokenizer):
    """A small random model in fp64."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](
        **{**SMALL, **settings},
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def finish(trainer):
    """Train; all numbers of the log but the clock's, and how many tokens the model read."""
    read = []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].numel())
    )
    trainer.train()
    clocks = ("runtime", "per_second", "flos")
    log = [
        {key: value for key, value in entry.items() if not key.endswith(clocks)}
        for entry in trainer.state.log_history
    ]
    return log, sum(read)


def assert_same(padded, free, loss=1e-5, norm=1e-4):
    """The same numbers, of fewer tokens."""
    (log, read), (other, read_free) = padded, free
    assert read_free < 0.9 * read
    assert any("eval_loss" in entry for entry in log)
    for entry, found in zip(log, other, strict=True):
        assert entry.keys() == found.keys()
        for key, value in entry.items():
            tolerance = loss if key in ("loss", "eval_loss") else norm
            if key.endswith("aux_loss"):  # transformers has the router's probabilities in fp32
                tolerance = 1e-6
            assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), key


@pytest.mark.parametrize(
    ("method", "lora", "given"),
    [
        pytest.param(DCO, False, {}, id="dco"),
        pytest.param(DCO, True, {"reduction": "token_mean"}, id="dco-mean-lora"),
        pytest.param(SFTMIX, False, {"dco_n_samples": 16}, id="sftmix-dco"),
        pytest.param(SFTMIX, True, {}, id="sftmix-lora"),
        pytest.param(RPO, False, {"precompute_ref_log_probs": True}, id="rpo-precomputed"),
        pytest.param(RPO, False, {}, id="rpo-copy"),
        pytest.param(RPO, True, {"sft_reduction": "mean"}, id="rpo-mean-lora"),
        pytest.param(TOKENS, False, {}, id="eaft"),
        pytest.param(TRL_SFT, False, {}, id="trl-sft"),
        pytest.param(TRL_DPO, True, {}, id="trl-dpo-lora"),
        pytest.param(TRL_DPO, False, {}, id="trl-dpo"),
    ],
)
def test_a_run_without_padding_is_the_padded_run(both, method, lora, given):
    assert_same(*both(method, lora, **given))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "lora"), [(DCO, False), (RPO, True)], ids=["dco", "rpo-lora"])
def test_of_other_models_to_the_last_digits_of_fp64(both, method, lora, family):
    """Windows of eight tokens, and the loss of a router."""
    assert_same(*both(method, lora, family), loss=1e-9, norm=1e-8)
