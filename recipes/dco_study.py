"""Study: pass@N on held-out problems as training goes on, under cross-entropy and under DCO.

    llmmix run dco_study

Trains builtin:tiny on one-step problems of builtin:math with N = 1 (cross-entropy), 4, 16 and 64
over several seeds, samples held-out problems every few epochs, prints a table and writes
OUTPUT_DIR/dco_study.json and dco_study.png. No network; under 20 minutes on two cores.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from llmmix import DCOConfig, DCOTrainer
from llmmix.cli import parse_args
from llmmix.data import load_splits
from llmmix.figures import draw_panels, never_fatal
from llmmix.files import claim, write_whole
from llmmix.grading import Verifier, judge, pass_at_n
from llmmix.models import resolve_checkpoint
from llmmix.sampling import sample
from llmmix.terminal import number, print_table


@dataclass
class StudyArguments:
    """The size of the study."""

    output_dir: str = field(
        default="runs/dco_study", metadata={"help": "Folder for the results and the figure."}
    )
    n_samples: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64],
        metadata={"help": "Values of N to train with; 1 is cross-entropy."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to train each N with."}
    )
    train_rows: int = field(default=256, metadata={"help": "Number of problems to train on."})
    test_rows: int = field(default=128, metadata={"help": "Number of held-out problems to sample."})
    num_samples: int = field(
        default=64, metadata={"help": "Number of samples drawn for each held-out problem."}
    )
    n: list[int] = field(
        default_factory=lambda: [1, 16, 64],
        metadata={"help": "Values of N for which pass@N is reported."},
    )
    steps: list[int] = field(
        default_factory=lambda: [80, 160, 240, 320],
        metadata={"help": "Training steps after which held-out problems are sampled."},
    )
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate, constant after 20 steps of warm-up."}
    )
    batch_size: int = field(default=32, metadata={"help": "Number of problems of a training step."})


class Coverage(TrainerCallback):
    """Samples held-out problems at the given steps."""

    def __init__(self, study: StudyArguments, rows: Dataset):
        self.study, self.rows = study, rows
        self.points: dict[int, dict[int, float]] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Estimate pass@N on the held-out problems, at the given steps."""
        step, study = state.global_step, self.study
        if step not in study.steps:
            return
        draws = sample(
            kwargs["model"],
            kwargs["processing_class"],
            self.rows["prompt"],
            study.num_samples,
            max_new_tokens=16,
            token_budget=65536,
            seed=step,
        )
        correct = np.zeros(len(self.rows), dtype=int)
        with Verifier("exact") as verifier:
            for completion, verdict in judge(draws, dict(enumerate(self.rows["answer"])), verifier):
                correct[completion.prompt] += verdict == "right"
        estimates = {n: pass_at_n(study.num_samples, correct, n).mean() for n in study.n}
        self.points[step] = estimates
        found = "  ".join(f"pass@{n} {value:.3f}" for n, value in estimates.items())
        print(f"  step {step}: {found}", flush=True)


def main(args: StudyArguments) -> None:
    """Train and sample each N and seed; one table, one figure."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    pass_at_n(args.num_samples, 0, args.n)  # refuse N before training
    folder = claim(args.output_dir)
    checkpoint = resolve_checkpoint("builtin:tiny")
    splits = load_splits("builtin:math", "1")
    train, test = splits["train"].take(args.train_rows), splits["test"].take(args.test_rows)
    results: dict[str, dict[int, dict[int, float]]] = {}
    for n in args.n_samples:
        for seed in args.seeds:
            done, all_ = len(results) + 1, len(args.n_samples) * len(args.seeds)
            print(f"Run {done} of {all_}: N = {n}, seed {seed}", flush=True)
            coverage = Coverage(args, test)
            config = training(args, n, seed)
            trainer = DCOTrainer(checkpoint, config, train_dataset=train, callbacks=[coverage])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            results[f"N={n} seed={seed}"] = coverage.points
            write_whole(folder / "dco_study.json", json.dumps(results, indent=1))
    shutil.rmtree(folder / "training", ignore_errors=True)
    show(args, results)


def training(args: StudyArguments, n: int, seed: int) -> DCOConfig:
    """The settings that each model is trained with."""
    return DCOConfig(
        str(Path(args.output_dir) / "training"),
        n_samples=n,
        max_steps=max(args.steps),
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        per_device_train_batch_size=args.batch_size,
        activation_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )


def show(args: StudyArguments, results: dict[str, dict[int, dict[int, float]]]) -> None:
    """Mean and range over the seeds, printed and drawn."""
    epochs = [step * args.batch_size / args.train_rows for step in args.steps]
    panels: dict[str, dict[str, np.ndarray]] = {f"pass@{n}": {} for n in args.n}
    rows = []
    for n in args.n:
        rows.append([f"pass@{n}"])
        for trained in args.n_samples:
            name = "cross-entropy" if trained == 1 else f"DCO, N = {trained}"
            runs = [results[f"N={trained} seed={seed}"] for seed in args.seeds]
            values = np.array([[run[step][n] for step in args.steps] for run in runs])
            panels[f"pass@{n}"][name] = values
            cells = [number(value) for value in values.mean(0)]
            last = values[:, -1]
            cells[-1] += f"\n{number(last.min(), 2)} to {number(last.max(), 2)}"
            rows.append([name, *cells])
    title = f"Mean over {len(args.seeds)} seeds, by epoch (range at the last)"
    print_table(title, ["epoch", *(f"{epoch:g}" for epoch in epochs)], rows)
    with never_fatal("figure"):
        figure = draw_panels(Path(args.output_dir) / "dco_study.png", epochs, panels, "epoch")
        print(f"Figure: {figure}")


if __name__ == "__main__":
    main(*parse_args((StudyArguments,), __file__))
