"""Runs whose rows do not fill the last batch of an epoch, for tests/two_ranks.py.

Five of 37 rows are left for the last batch: of 8, where the second of two ranks gets one of them,
and of 16, where it gets none.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer

from llmmix import DCOConfig, DCOTrainer, TokenLossConfig, TokenLossTrainer, attach_weights
from llmmix.filtering import LikelihoodFilter, attach_filter
from llmmix.grading.verify import Verifier
from llmmix.solve_rates import SolveRates
from tests.test_filtering import SAMPLING, chain_of_thought, has_even_length
from tests.test_invariants import LORA, METHODS, SETTINGS

SIZES = {  # by the micro-batches of a step: rows of one on both ranks, and steps of a log
    1: {"rows": 8, "logging_steps": 3},  # of ten steps the last is not logged
    2: {"rows": 16, "logging_steps": 1},
}
BESIDE = {  # losses that compare with another model
    "asft": (TokenLossTrainer, TokenLossConfig, {"loss_type": "asft", "asft_alpha": 1.0}),
    "psft": (TokenLossTrainer, TokenLossConfig, {"loss_type": "psft", "psft_snapshot_steps": 2}),
    "select": (TokenLossTrainer, TokenLossConfig, {"loss_type": "select"}),
}
RUNS = [(name, 2) for name in [*METHODS, *BESIDE]] + [("dco", 1), ("sftmix", 1), ("rpo", 1)]
SAMPLED = [("nco", 1), ("dco_cot", 2), ("weighted", 2)]
SAMPLED_SETTINGS = {"n_samples": 4, "num_train_epochs": 1, "eval_strategy": "no"}


def make(
    name: str, accumulation: int, checkpoint: str, folder: Path, rows: Dataset, ranks: int, **given
) -> Trainer:
    """The trainer of a run of two epochs, or of one with solve rates, on so many ranks."""
    size = SIZES[accumulation]
    if name in ("weighted", "sftmix"):
        rows = rows.add_column("weight", [0.5 + row % 4 for row in range(len(rows))])
    settings = {
        **SETTINGS,
        "max_steps": -1,
        "num_train_epochs": 2,
        "max_grad_norm": 1e9,  # the norm is only logged
        "eval_strategy": "epoch",
        "logging_steps": size["logging_steps"],
        "per_device_train_batch_size": size["rows"] // ranks,
        "per_device_eval_batch_size": 8 // ranks,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": True,
        # Without padding on two ranks, and with it on one process
        "padding_free": ranks > 1 and accumulation == 1,
    }
    if name == "rpo" and accumulation == 1:
        rows = rows.add_column("weight", [(n % 5 + 1) / 2 for n in range(len(rows))])
    others = (DCOTrainer, DCOConfig, SAMPLED_SETTINGS)
    trainer_type, config, own = {**METHODS, **BESIDE}.get(name, others)
    torch.manual_seed(0)
    trainer = trainer_type(
        checkpoint,
        args=config(str(folder / f"{name}-{accumulation}"), **{**settings, **own, **given}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=LORA if name == "asft" else None,  # switched off through the wrapper of DDP
    )
    if name == "nco":
        attach_filter(trainer, LikelihoodFilter(trainer, threshold=0.5), warmup_steps=2)
    elif name == "dco_cot":
        chain_of_thought(trainer)
    elif name == "weighted":
        rates = SolveRates(trainer, Verifier(has_even_length), **{**SAMPLING, "warmup_steps": 0})
        attach_weights(trainer, rates.weights)
    return trainer


def finish(trainer: Trainer) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Train; all numbers of the log but those of the clock, and the weights.

    `train_loss` is left out: of the steps since the last log transformers counts those of the main
    process alone.
    """
    trainer.train()
    clocks = ("runtime", "per_second", "flos", "train_loss")
    log = [
        {key: value for key, value in entry.items() if not key.endswith(clocks)}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return log, torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def on_two_ranks(checkpoint: str, folder: Path, rows: dict[str, Dataset]) -> None:
    """Train every one of them; the main rank writes what came out."""
    found = {}
    for name, accumulation in RUNS + SAMPLED:
        data = rows["preferences" if name.startswith("rpo") else "math"]
        trainer = make(name, accumulation, checkpoint, folder, data, 2)
        assert trainer.accelerator.num_processes == 2
        found[name, accumulation] = finish(trainer)
    if trainer.accelerator.is_main_process:
        torch.save(found, folder / "found.pt")
    cut = {"dispatch_batches": True, "split_batches": True}
    trainer = make("dco", 1, checkpoint, folder, rows["math"], 2, accelerator_config=cut)
    with pytest.raises(ValueError, match="dispatch_batches"):
        trainer.train()


def differences(
    one: list[dict[str, float]], two: list[dict[str, float]]
) -> Iterator[tuple[str, float, float]]:
    """What two logs differ in: each name and both values.

    They agree to five digits at least. A small difference of large numbers, such as a reward, has
    the rounding of those.
    """
    for entry, other in zip(one, two, strict=True):
        assert entry.keys() == other.keys()
        for key, value in entry.items():
            rough = "rewards/" in key or "gap" in key
            if value != pytest.approx(other[key], rel=2e-5, abs=2e-5 if rough else 1e-6):
                yield key, value, other[key]
