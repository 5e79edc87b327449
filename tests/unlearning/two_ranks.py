"""Unlearning on two ranks, for tests/two_ranks.py: the main rank writes logs and weights."""

from pathlib import Path

import torch
from transformers import Trainer

from tests.uneven import finish
from tests.unlearning.runs import FORGET, RETAIN, WEIGHED, lora, prepare

# Ten rows are two micro-batches of 4 and one of 2, of which the second rank has none
UNEVEN = {"gradient_accumulation_steps": 2, "max_grad_norm": 1e9}
EVALUATED = {"eval_dataset": FORGET, "eval_strategy": "steps", "eval_steps": 2}
# Without padding on two ranks, and with it on one process
PADDING_FREE = ("flat-retain", "dpo", "npo-kl", "rmu")
RUNS = {  # by method: settings, and whether an adapter is trained
    "npo": ({}, False),  # with log-probabilities of the reference that are known beforehand
    "flat-retain": (EVALUATED, False),
    "dpo": (EVALUATED, False),
    "kl": (EVALUATED, False),
    "pdu": (EVALUATED, False),
    "npo-kl": ({}, True),
    "rmu": (EVALUATED, True),
}
OF_WEIGHED_ROWS = ("npo", "flat-retain", "rmu")


def make(name: str, checkpoint: str, folder: Path, ranks: int) -> Trainer:
    """The trainer of a run, on so many ranks."""
    settings, adapter = RUNS[name]
    rows, retain = WEIGHED if name in OF_WEIGHED_ROWS else (FORGET, RETAIN)
    torch.manual_seed(0)
    return prepare(
        name,
        folder / name,
        checkpoint,
        rows,
        retain,
        peft=lora() if adapter else None,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        use_cpu=True,
        padding_free=ranks > 1 and name in PADDING_FREE,
        **UNEVEN,
        **settings,
    )


def run(checkpoint: str, folder: Path) -> None:
    """Train every one of them."""
    found = {}
    for name in RUNS:
        trainer = make(name, checkpoint, folder, 2)
        assert trainer.accelerator.num_processes == 2
        found[name] = finish(trainer)
    if trainer.accelerator.is_main_process:
        torch.save(found, folder / "found.pt")
