"""Runs whose rows do not fill the last batch of an epoch, for tests/two_ranks.py.

Five of 37 rows are left for a last batch of 8, of which the second of two ranks gets one, and for
one of 16, of which it gets none.
"""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer

from llmmix import DCOConfig, DCOTrainer, builtin
from llmmix.filtering import LikelihoodFilter, attach_filter
from tests import test_filtering
from tests.test_invariants import METHODS, SETTINGS
from tests.unlearning import runs as unlearning

ROWS = 37
TWO_EPOCHS = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "max_grad_norm": 1e9,  # the norm is only logged
    "eval_strategy": "epoch",
}
CLOCKS = ("runtime", "per_second", "flos")
FILTERED = {"n_samples": 4, "learning_rate": 1e-2, "num_train_epochs": 1, "eval_strategy": "no"}
UNLEARNING = ("flat", "flat-retain", "dpo", "npo-kl", "undial", "rmu", "pdu", "idk")
SIZES = {"1": (4, 1), "2": (8, 2)}  # rows of a micro-batch on a rank, and micro-batches of a step


def names() -> list[str]:
    """The runs, each as METHOD ACCUMULATION."""
    both = [f"{name} {size}" for name in METHODS for size in SIZES]
    return both + ["nco 1", "dco_cot 2"] + [f"{name} 2" for name in UNLEARNING]


def make(name: str, checkpoint: str, folder: Path, ranks: int) -> Trainer:
    """The trainer of a run, on so many ranks."""
    method, _, size = name.partition(" ")
    rows, accumulation = SIZES[size]
    given = {
        **TWO_EPOCHS,
        "per_device_train_batch_size": rows * 2 // ranks,
        "per_device_eval_batch_size": 8 // ranks,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": True,
    }
    folder = folder / name.replace(" ", "-")
    if method in UNLEARNING:
        return _unlearn(method, checkpoint, folder, given)
    if method in METHODS:
        kind, config, settings = METHODS[method]
    else:
        kind, config, settings = DCOTrainer, DCOConfig, FILTERED
    data = _rows("preferences" if method.startswith("rpo") else "math")
    trainer = kind(
        checkpoint,
        args=config(str(folder), **{**SETTINGS, **given, **settings}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    if method == "nco":
        attach_filter(trainer, LikelihoodFilter(trainer, threshold=0.5), warmup_steps=2)
    elif method == "dco_cot":
        test_filtering.chain_of_thought(trainer)
    return trainer


def _rows(name: str) -> Dataset:
    rows = builtin.dataset(f"builtin:{name}", "1,3")["train"]
    rows = rows.select([*range(ROWS // 2), *range(1000, 1000 + ROWS - ROWS // 2)])
    generator = torch.Generator().manual_seed(0)
    return rows.add_column("confidence", torch.rand(ROWS, generator=generator).tolist())


def _unlearn(method: str, checkpoint: str, folder: Path, given: dict) -> Trainer:
    rows = Dataset.from_dict(
        {
            "question": [f"What is {n}+{n + 2}?" for n in range(ROWS)],
            "answer": ["=".join(["6"] * (1 + n % 4)) + str(n) for n in range(ROWS)],
        }
    )
    return unlearning.prepare(method, folder, checkpoint, rows=rows, eval_dataset=rows, **given)


def finish(trainer: Trainer) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Train; every number of the log but times, and the weights."""
    trainer.train()
    log = [
        {key: value for key, value in entry.items() if not any(word in key for word in CLOCKS)}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return log, torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def run(checkpoint: str, folder: Path) -> None:
    """Train every one of them; the main rank writes what came out."""
    found = {}
    for name in names():
        torch.manual_seed(0)
        trainer = make(name, checkpoint, folder, 2)
        assert trainer.accelerator.num_processes == 2
        found[name] = finish(trainer)
    if trainer.accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        torch.save(found, folder / "found.pt")
