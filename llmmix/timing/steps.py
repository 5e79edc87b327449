"""Training steps: ours against TRL's trainers on the same rows, FLAT against its authors' form."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from llmmix.timing.clock import Case
from llmmix.timing.head import OUTPUTS
from llmmix.unlearning.flat import FLATConfig, FLATTrainer, flat_loss


class Step(NamedTuple):
    """A trainer of ours and its peer, by the names of `made_trainer` and those of the table."""

    method: str
    name: str
    peer: str
    peer_name: str
    checkpointing: bool = False


STEPS = (
    Step("sft_our_head", "SFT on our head", "sft", "SFTTrainer"),
    Step("dco", "DCO", "sft_completion", "SFTTrainer"),
    Step("sftmix", "SFTMix", "sft_completion", "SFTTrainer"),
    Step("rpo", "RPO", "dpo", "DPOTrainer"),
    Step("flat", "FLAT", "flat_published", "two forwards, softmax"),
    Step("dft", "dft", "sft_dft", "SFTTrainer, dft"),
    Step("eaft", "eaft", "sft_dft", "SFTTrainer, dft"),
    Step("asft", "asft", "nll", "nll", checkpointing=True),
)
TUNING = ("full", "LoRA")
# Rows without a prompt: every position is scored
WHOLE_TEXTS = ("sft", "sft_our_head", "sft_dft", "nll", "dft", "eaft", "asft")


def step_cases(
    *,
    models: Sequence[str],
    methods: Collection[str],
    device: str,
    batch_size: int,
    max_length: int,
    tuning: Collection[str] = TUNING,
) -> list[list[Case]]:
    """Rows of whole training steps: ours first, then its peer, most often TRL's, on the same rows.

    Args:
        models: Hub ids, folders, `.gguf` files or built-ins.
        methods: Names of `STEPS`.
        device: "cpu" or "cuda".
        batch_size: Rows of a step, even.
        max_length: Tokens of a row.
        tuning: What each model is trained with, of `TUNING`.
    """
    sizes = {"device": device, "batch_size": batch_size, "max_length": max_length}
    groups = []
    for model in models:
        for how in (how for how in TUNING if how in tuning):
            for step in (step for step in STEPS if step.name in methods):
                row = f"{step.name}, {Path(model).name}, {how}"
                shared = {
                    "model": model,
                    "lora": how == "LoRA",
                    "checkpointing": step.checkpointing,
                    **sizes,
                }
                groups.append(
                    [
                        Case(row, "llmmix", step_call, {**shared, "method": step.method}),
                        Case(row, step.peer_name, step_call, {**shared, "method": step.peer}),
                    ]
                )
    return groups


def step_call(
    *,
    model: str,
    device: str,
    batch_size: int,
    max_length: int,
    method: str,
    lora: bool,
    checkpointing: bool = False,
) -> Callable[[], None]:
    """One optimizer step of a trainer, AdamW included, its other settings left as they are.

    Gradient checkpointing is off unless asked for; `train` would switch it on.
    """
    trainer = made_trainer(
        method,
        model,
        lambda tokenizer: _rows(tokenizer, method, batch_size, max_length),
        {"per_device_train_batch_size": batch_size, "max_length": max_length},
        device=device,
        lora=lora,
    )
    loader = trainer.get_train_dataloader()
    step = stepping(trainer, checkpointing)
    return lambda: step(iter(loader))


def stepping(trainer: Trainer, checkpointing: bool) -> Callable[[Iterator[dict]], None]:
    """A function that makes one optimizer step on the next batch.

    Args:
        trainer: The trainer, before `train`.
        checkpointing: Whether activations are computed again in the backward pass.
    """
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    model: Any = trainer.model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = trainer.accelerator.prepare(model)
    optimizer = trainer.accelerator.prepare(trainer.create_optimizer())

    def step(batches: Iterator[dict]) -> None:
        drawn, count = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(wrapped, drawn[0], count)
        optimizer.step()
        optimizer.zero_grad()

    return step


def made_trainer(
    method: str,
    model: str,
    rows: Callable[[PreTrainedTokenizerBase], Dataset],
    settings: dict[str, Any],
    *,
    device: str,
    lora: bool = False,
) -> Trainer:
    """A trainer of a model in fp32, ready to make steps.

    Args:
        method: Names a trainer, a config and settings of its own.
        model: Hub id, folder, `.gguf` file or built-in.
        rows: The training rows, from the tokenizer.
        settings: Settings of the config.
        device: "cpu" or "cuda".
        lora: Whether to train an adapter in place of the model.
    """
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    import llmmix
    from llmmix.models import resolve_checkpoint

    token_loss = (llmmix.TokenLossTrainer, llmmix.TokenLossConfig)
    trainers: dict[str, tuple[Any, ...]] = {
        "sft": (SFTTrainer, SFTConfig),
        "sft_our_head": (SFTTrainer, SFTConfig),
        "sft_dft": (SFTTrainer, SFTConfig, {"loss_type": "dft"}),
        "sft_completion": (SFTTrainer, SFTConfig),
        **{name: (*token_loss, {"loss_type": name}) for name in ("nll", "dft", "eaft", "asft")},
        "dco": (llmmix.DCOTrainer, llmmix.DCOConfig),
        "sftmix": (llmmix.SFTMixTrainer, llmmix.SFTMixConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "rpo": (llmmix.RPOTrainer, llmmix.RPOConfig),
        "flat": (FLATTrainer, FLATConfig),
        "flat_published": (PublishedFLAT, FLATConfig),
    }
    trainer, config, *own = trainers[method]
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
        **(own[0] if own else {}),
    }
    checkpoint = resolve_checkpoint(model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    built = trainer(
        model=AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="float32", use_safetensors=True
        ),
        args=config(**settings),
        train_dataset=rows(tokenizer),
        processing_class=tokenizer,
        # What `trl sft --use_peft` makes
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05) if lora else None,
    )
    if method == "sft_our_head":
        llmmix.attach_head(built.model, outputs=OUTPUTS)
    return built


class PublishedFLAT(FLATTrainer):
    """FLAT as its authors released it: a forward for each part, and softmax over all logits."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss from two forwards."""
        template, forget = (
            self._mean_probability(model, inputs, rows)
            for rows in torch.arange(len(inputs["labels"])).chunk(2)
        )
        return flat_loss(template, forget).mean()

    def _mean_probability(self, model: nn.Module, inputs: dict[str, Any], rows: Tensor) -> Tensor:
        names = ("input_ids", "attention_mask")
        logits = model(**{name: inputs[name][rows] for name in names}, use_cache=False).logits
        probs = torch.softmax(logits[:, :-1], -1).transpose(1, 2)
        labels = inputs["labels"][rows, 1:]
        taken = nn.functional.nll_loss(probs, labels, reduction="none")
        return -taken.sum(1) / (labels != -100).sum(1)


def _rows(
    tokenizer: PreTrainedTokenizerBase, method: str, batch_size: int, max_length: int
) -> Dataset:
    """Rows of random numbers, as long as `max_length` or longer; a quarter of it is the prompt.

    The rows of plain SFT have no prompt: every position is scored.
    """
    import numpy as np

    rng = np.random.default_rng(0)

    def text(tokens: int) -> str:
        numbers = " ".join(map(str, rng.integers(100, 1000, size=tokens)))
        ids = tokenizer(numbers, add_special_tokens=False)["input_ids"][:tokens]
        return tokenizer.batch_decode([ids])[0]

    def column(tokens: int) -> list[str]:
        return [text(tokens) for _ in range(batch_size)]

    if method in WHOLE_TEXTS:
        return Dataset.from_dict({"text": column(2 * max_length)})
    columns: dict[str, list] = {"prompt": column(max_length // 4)}
    if method in ("flat", "flat_published"):
        fitting = max_length - max_length // 4 - 8  # too long a row would be left out
        columns |= {"completion": column(fitting), "template": column(fitting)}
    elif method in ("dpo", "rpo"):
        columns |= {"chosen": column(2 * max_length), "rejected": column(2 * max_length)}
    else:
        columns["completion"] = column(2 * max_length)
        columns["confidence"] = [float(row) for row in range(batch_size)]
    return Dataset.from_dict(columns)
