"""Training steps: ours against TRL's trainers on the same rows, FLAT against its authors' form."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from llmmix.timing.clock import Case
from llmmix.timing.head import OUTPUTS
from llmmix.unlearning.flat import FLATConfig, FLATTrainer, flat_loss


class Step(NamedTuple):
    """A trainer of ours and its peer, by the names of `_trainer` and those of the table."""

    method: str
    name: str
    peer: str
    peer_name: str


STEPS = (
    Step("sft_our_head", "SFT on our head", "sft", "SFTTrainer"),
    Step("dco", "DCO", "sft_completion", "SFTTrainer"),
    Step("sftmix", "SFTMix", "sft_completion", "SFTTrainer"),
    Step("rpo", "RPO", "dpo", "DPOTrainer"),
    Step("flat", "FLAT", "flat_published", "two forwards, softmax"),
)


def step_cases(
    *,
    models: Sequence[str],
    methods: Collection[str],
    device: str,
    batch_size: int,
    max_length: int,
) -> list[list[Case]]:
    """Rows of whole training steps: ours first, then TRL's trainer on the same rows.

    Args:
        models: Hub ids, folders, `.gguf` files or built-ins, each trained in full and with LoRA.
        methods: Names of `STEPS`.
        device: "cpu" or "cuda".
        batch_size: Rows of a step, even.
        max_length: Tokens of a row.
    """
    sizes = {"device": device, "batch_size": batch_size, "max_length": max_length}
    groups = []
    for model in models:
        for lora in (False, True):
            shared = {"model": model, "lora": lora, **sizes}
            for step in STEPS:
                if step.name not in methods:
                    continue
                row = f"{step.name}, {Path(model).name}, {'LoRA' if lora else 'full'}"
                groups.append(
                    [
                        Case(row, "llmmix", step_call, {**shared, "method": step.method}),
                        Case(row, step.peer_name, step_call, {**shared, "method": step.peer}),
                    ]
                )
    return groups


def step_call(
    *, model: str, device: str, batch_size: int, max_length: int, method: str, lora: bool
) -> Callable[[], None]:
    """One optimizer step of a trainer at its default settings, AdamW included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmmix.models import resolve_checkpoint

    checkpoint = resolve_checkpoint(model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = _trainer(
        method,
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", use_safetensors=True),
        _rows(tokenizer, method, batch_size, max_length),
        tokenizer,
        lora,
        {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": batch_size,
            "max_length": max_length,
            "use_cpu": device == "cpu",
            "bf16": device != "cpu",
            "report_to": "none",
            "disable_tqdm": True,
        },
    )
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    loader = trainer.get_train_dataloader()
    wrapped = trainer.accelerator.prepare(trainer.model)
    optimizer = trainer.accelerator.prepare(trainer.create_optimizer())

    def call() -> None:
        batches, count = trainer.get_batch_samples(iter(loader), 1, trainer.args.device)
        trainer.training_step(wrapped, batches[0], count)
        optimizer.step()
        optimizer.zero_grad()

    return call


def _trainer(
    method: str,
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    lora: bool,
    options: dict[str, Any],
) -> Trainer:
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    import llmmix

    trainers: dict[str, tuple[Any, Any]] = {
        "sft": (SFTTrainer, SFTConfig),
        "sft_our_head": (SFTTrainer, SFTConfig),
        "sft_completion": (SFTTrainer, SFTConfig),
        "dco": (llmmix.DCOTrainer, llmmix.DCOConfig),
        "sftmix": (llmmix.SFTMixTrainer, llmmix.SFTMixConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "rpo": (llmmix.RPOTrainer, llmmix.RPOConfig),
        "flat": (FLATTrainer, FLATConfig),
        "flat_published": (PublishedFLAT, FLATConfig),
    }
    trainer, config = trainers[method]
    built = trainer(
        model=model,
        args=config(**options),
        train_dataset=rows,
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

    if method in ("sft", "sft_our_head"):
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
