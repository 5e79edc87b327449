"""Run under torchrun by the fixture `two_ranks`: what must come out as on one process.

    two_ranks.py CHECKPOINT FOLDER

FOLDER holds the rows as `math.jsonl` and `preferences.jsonl`. For every method, and for DCO with a
filter and weights from sampling, the main rank writes NAME.json, the losses, and NAME.pt, the
weights. Mixtures and unlearning write into folders of their own. Last comes the fused head with its
weight spread over the ranks (tests/sharded.py).
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoTokenizer, Trainer

from llmmix import DCOConfig, DCOTrainer
from llmmix.resuming import checkpoint_to_resume
from tests import sharded, test_filtering, test_invariants
from tests.mixing import two_ranks as mixing
from tests.unlearning import two_ranks as unlearning


def main(checkpoint: str, folder: Path) -> None:
    """Train everything."""
    torch.set_num_threads(1)
    rows = {
        name: load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train")
        for name in ("math", "preferences")
    }
    halved = {"per_device_train_batch_size": 2}
    for name, (trainer_type, config_type, given) in test_invariants.METHODS.items():
        settings = {**test_invariants.SETTINGS, **halved, "gradient_accumulation_steps": 2, **given}
        config = config_type(str(folder / name), **settings)
        dataset = rows["preferences" if name.startswith("rpo") else "math"]
        trainer = trainer_type(checkpoint, args=config, train_dataset=dataset)
        assert trainer.accelerator.num_processes == 2
        train(trainer, name, folder)
    config = DCOConfig(
        str(folder / "filtered"), **{**test_filtering.SETTINGS, **halved, "n_samples": 4}
    )
    filtered = DCOTrainer(
        checkpoint,
        config,
        train_dataset=rows["math"],
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    train(test_filtering.chain_of_thought(filtered), "filtered", folder)
    mixing.run(checkpoint, folder / "mixing")
    resume_as_the_main_rank_does(folder)
    unlearning.run(checkpoint, folder / "unlearning")
    sharded.compare("fsdp2")


def resume_as_the_main_rank_does(folder: Path) -> None:
    """Each rank prints where it resumes, as if the main one alone saw the run's files."""
    here = folder / "mixing/moving" if PartialState().is_main_process else folder / "nowhere"
    for given in ("auto", "true"):
        config = DCOConfig(str(here), resume_from_checkpoint=given)
        print(f"resumed from {checkpoint_to_resume(config)}\n", end="")


def train(trainer: Trainer, name: str, folder: Path) -> None:
    """Train, and let the main rank write losses and weights."""
    trainer.train()
    if trainer.accelerator.is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{name}.json").write_text(json.dumps(losses))
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.save(weights, folder / f"{name}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()  # its threads must not outlive it
