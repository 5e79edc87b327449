"""Run under torchrun by test_invariants: every method on two ranks; rank 0 writes what came out."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset

from tests.test_invariants import METHODS, SETTINGS


def main(checkpoint: str, folder: Path) -> None:
    """Train each method and save its losses and weights."""
    for name, (trainer_type, config_type, given) in METHODS.items():
        rows = "preferences" if name.startswith("rpo") else "math"
        dataset = load_dataset("json", data_files=str(folder / f"{rows}.jsonl"), split="train")
        settings = {**SETTINGS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        config = config_type(str(folder / name), **settings, **given)
        trainer = trainer_type(checkpoint, args=config, train_dataset=dataset)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        if trainer.accelerator.is_main_process:
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            (folder / f"{name}.json").write_text(json.dumps(losses))
            weights = [
                p.detach().flatten()
                for p in trainer.accelerator.unwrap_model(trainer.model).parameters()
            ]
            torch.save(torch.cat(weights), folder / f"{name}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()  # its threads must not outlive it
