"""Quickstart: plain SFT, SFTMix and DCO on a tiny model, compared by pass@N.

    llmmix run quickstart

Trains builtin:tiny on one-step problems of builtin:math with each method, samples held-out
problems, prints one table and writes OUTPUT_DIR/report.html. No network, a few minutes on a CPU.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import ProgressCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from llmmix import DCOConfig, DCOTrainer, SFTMixConfig, SFTMixTrainer
from llmmix.cli import parse_args
from llmmix.command_line.launching import command_line
from llmmix.data import load_splits
from llmmix.facts import note_run
from llmmix.files import claim, release
from llmmix.models import resolve_checkpoint
from llmmix.sftmix.scoring import add_confidence

METHODS = ("SFT", "SFTMix", "DCO")


@dataclass
class QuickstartArguments:
    """The size of the comparison."""

    output_dir: str = field(
        default="runs/quickstart", metadata={"help": "Folder of all that is written."}
    )
    train_rows: int = field(default=256, metadata={"help": "Problems to train on."})
    test_rows: int = field(default=128, metadata={"help": "Held-out problems to sample."})
    num_samples: int = field(default=64, metadata={"help": "Samples of each held-out problem."})
    max_steps: int = field(default=300, metadata={"help": "Training steps of each method."})
    n_samples: int = field(default=64, metadata={"help": "N of DCO: it trains for pass@N."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    batch_size: int = field(default=32, metadata={"help": "Problems in a training step."})
    seed: int = field(default=0, metadata={"help": "Seed of the training and the sampling."})


class Progress(ProgressCallback):
    """The Trainer's progress bar, without a line of numbers every few steps."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing: the report draws the numbers."""


def main(args: QuickstartArguments) -> None:
    """Train three times from the same checkpoint, then evaluate the three side by side."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    checkpoint = resolve_checkpoint("builtin:tiny")
    train = load_splits("builtin:math", "1")["train"].select(range(args.train_rows))
    folder = claim(args.output_dir)
    for method in METHODS:
        shutil.rmtree(folder / method, ignore_errors=True)  # no checkpoints of an earlier run
    shared: dict[str, Any] = {
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "bf16": False,
        "logging_steps": 10,
        "save_steps": 1 / 3,  # three checkpoints, which serve SFTMix as its reference
        "save_only_model": True,
        "seed": args.seed,
    }

    def fit(trainer: SFTTrainer) -> None:
        print(f"\nTraining {Path(str(trainer.args.output_dir)).name}", flush=True)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        note_run(trainer)

    fit(SFTTrainer(checkpoint, SFTConfig(str(folder / "SFT"), **shared), train_dataset=train))

    sftmix = SFTMixConfig(str(folder / "SFTMix"), **shared)
    reference = [str(path) for path in sorted((folder / "SFT").glob("checkpoint-*"))]
    scored = add_confidence(train, sftmix, checkpoints=reference)
    fit(SFTMixTrainer(checkpoint, sftmix, train_dataset=scored))

    dco = DCOConfig(str(folder / "DCO"), n_samples=args.n_samples, **shared)
    fit(DCOTrainer(checkpoint, dco, train_dataset=train))

    n = [str(n) for n in (1, 4, 16, 64) if n <= args.num_samples]
    flags = ["--n", *n, "--model_name_or_path", *(str(folder / method) for method in METHODS)]
    flags += ["--dataset_name", "builtin:math", "--dataset_config", "1"]
    flags += ["--max_problems", str(args.test_rows), "--num_samples", str(args.num_samples)]
    flags += ["--max_new_tokens", "16", "--token_budget", "65536", "--verifier", "exact"]
    flags += ["--seed", str(args.seed), "--output_dir", str(folder)]
    release(folder)  # the evaluation claims it
    if status := subprocess.run(command_line("eval", "pass_at_n", flags)).returncode:
        sys.exit(status)  # it has told why


if __name__ == "__main__":
    main(*parse_args((QuickstartArguments,), __file__))
