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
from llmmix.filtering import LikelihoodFilter
from llmmix.padding_free_setting import sft_trainer

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
def both(checkpoint, math_rows, preference_rows, tokenizer, tmp_path, batches_read):
    """What a run with padding logs and reads, and the same without padding."""
    uneven = [
        given.map(lambda row, i, key=key: {key: row[key] * (2 + i % 4)}, with_indices=True)
        for given, key in ((math_rows, "completion"), (preference_rows, "rejected"))
    ]

    def run(method, padding_free, lora, family, given):
        trainer_type, config, own = method
        given = {**SETTINGS, **own, **given}
        rows = uneven[issubclass(trainer_type, DPOTrainer)]
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
        return finish(trainer, batches_read)

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


def finish(trainer, batches_read):
    """Train; all numbers of the log but the clock's, and how many rows the models read at once."""
    trainer.train()
    clocks = ("runtime", "per_second", "flos")
    log = [
        {key: value for key, value in entry.items() if not key.endswith(clocks)}
        for entry in trainer.state.log_history
    ]
    rows = {batch[0] for batch in batches_read}
    batches_read.clear()
    return log, rows


def assert_same(padded, free, loss=1e-5, norm=1e-4):
    """The same numbers, and every batch in one row, also of the reference and in evaluation."""
    (log, rows), (other, rows_free) = padded, free
    assert max(rows) > 1 and rows_free == {1}
    assert any("eval_loss" in entry for entry in log)
    for entry, found in zip(log, other, strict=True):
        assert entry.keys() == found.keys()
        for key in entry.keys() - {"rewards/accuracies"}:  # rounding decides it at a margin of 0
            value = entry[key]
            tolerance = loss if key in ("loss", "eval_loss") else norm
            if key.endswith("aux_loss"):  # transformers has the router's probabilities in fp32
                tolerance = 1e-6
            assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), key


@pytest.mark.parametrize(
    ("method", "lora", "given"),
    [
        pytest.param(DCO, False, {}, id="dco"),
        pytest.param(DCO, True, {"reduction": "token_mean", "max_length": 90}, id="dco-mean-lora"),
        pytest.param(SFTMIX, False, {"dco_n_samples": 16}, id="sftmix-dco"),
        pytest.param(SFTMIX, True, {}, id="sftmix-lora"),
        pytest.param(RPO, False, {"sft_reduction": "mean"}, id="rpo-mean-copy"),
        pytest.param(RPO, True, {"precompute_ref_log_probs": True}, id="rpo-lora-precomputed"),
        pytest.param(TOKENS, False, {}, id="eaft"),
        pytest.param(TRL_SFT, False, {}, id="trl-sft"),
        pytest.param(TRL_DPO, False, {}, id="trl-dpo"),
    ],
)
def test_a_run_without_padding_is_the_padded_run(both, method, lora, given):
    assert_same(*both(method, lora, **given))


@pytest.mark.parametrize(
    ("method", "lora", "family"),
    [
        pytest.param(DCO, False, "mistral", id="dco-mistral"),
        pytest.param(DCO, False, "qwen3-moe", id="dco-qwen3-moe"),
        pytest.param(DCO, True, "gemma3", id="dco-gemma3-lora"),
        pytest.param(RPO, False, "gemma3", id="rpo-gemma3"),
        pytest.param(RPO, True, "qwen3", id="rpo-qwen3-lora"),
        pytest.param(RPO, True, "qwen3-moe", id="rpo-qwen3-moe-lora"),
    ],
)
def test_of_other_models_to_the_last_digits_of_fp64(both, method, lora, family):
    """Windows of eight tokens, and the loss of a router."""
    assert_same(*both(method, lora, family), loss=1e-9, norm=1e-9)


@pytest.mark.parametrize("method", [DCO, SFTMIX, RPO], ids=["dco", "sftmix", "rpo"])
def test_trl_pads_and_does_not_hear_of_it(checkpoint, math_rows, preference_rows, caplog, method):
    trainer_type, config, _ = method
    rows = preference_rows if trainer_type is RPOTrainer else math_rows
    args = config("out", **SETTINGS | {"eval_strategy": "no"}, padding_free=True)
    trainer = trainer_type(checkpoint, args=args, train_dataset=rows)
    assert trainer.args.padding_free is True and trainer.padding_free is False
    assert "padding" not in caplog.text
    assert "Rows stay rows" in config.__dataclass_fields__["padding_free"].metadata["help"]


def test_the_flag_is_there_again_when_trl_refuses(checkpoint, math_rows):
    args = DCOConfig("out", **SETTINGS, padding_free=True)  # evaluates, and has no rows to
    with pytest.raises(ValueError, match="eval"):
        DCOTrainer(checkpoint, args=args, train_dataset=math_rows)
    assert args.padding_free is True


@pytest.mark.parametrize("option", ["packing", "eval_packing"])
def test_packing_beside_it_is_one_error(checkpoint, math_rows, option):
    args = SFTConfig("out", use_cpu=True, bf16=False, padding_free=True, **{option: True})
    with pytest.raises(ValueError, match=f"`padding_free=True` computes.*and `{option}=True`"):
        sft_trainer(checkpoint, args=args, train_dataset=math_rows)


def test_a_filter_needs_rows_that_trl_has_not_joined(checkpoint, math_rows):
    args = SFTConfig("out", use_cpu=True, bf16=False, padding_free=True, max_length=None)
    trainer = SFTTrainer(checkpoint, args=args, train_dataset=math_rows)
    with pytest.raises(ValueError, match=r"attach_heads\(trainer, padding_free=True\)"):
        LikelihoodFilter(trainer, n_samples=4)
