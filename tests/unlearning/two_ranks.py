"""Unlearning on two ranks, for tests/two_ranks.py: the main rank writes weights and metrics."""

import json
from pathlib import Path

import torch

from tests.unlearning.runs import FORGET, finish, lora, prepare

TWO = ["flat", "npo", "kl", "pdu"]
EVEN = {"rows": FORGET.select(range(8))}  # four rows a step, two steps an epoch


def runs_of_two():
    return [(name, None) for name in TWO] + [(name, lora()) for name in ("npo-kl", "rmu")]


def run(checkpoint: str, folder: Path) -> None:
    """Train every one of them."""
    results, metrics = {}, {}
    for name, peft in runs_of_two():
        torch.manual_seed(0)
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        trainer = prepare(name, folder / "run", checkpoint, peft=peft, **EVEN, **split)
        assert trainer.accelerator.num_processes == 2
        results[f"{name} {peft is not None}"] = finish(trainer)
        metrics[f"{name} {peft is not None}"] = trainer.state.log_history
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / "two.pt")
        (folder / "two.json").write_text(json.dumps(metrics))
