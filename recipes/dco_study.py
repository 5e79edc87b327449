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

import datasets
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from llmmix import DCOConfig, DCOTrainer
from llmmix.cli import parse_args
from llmmix.data import load_splits
from llmmix.figures import draw_panels
from llmmix.grading.estimators import pass_at_n
from llmmix.grading.verify import Verifier, judge
from llmmix.models import resolve_checkpoint
from llmmix.sampling import sample


@dataclass
class StudyArguments:
    """The size of the study."""

    output_dir: str = field(default="runs/dco_study", metadata={"help": "Where it all goes."})
    n_samples: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64], metadata={"help": "N of each training."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of each N."})
    train_rows: int = field(default=256, metadata={"help": "Problems to train on."})
    test_rows: int = field(default=128, metadata={"help": "Held-out problems to sample."})
    num_samples: int = field(default=64, metadata={"help": "Samples a held-out problem."})
    n: list[int] = field(default_factory=lambda: [1, 16, 64], metadata={"help": "N to report."})
    steps: list[int] = field(
        default_factory=lambda: [80, 160, 240, 320], metadata={"help": "When to sample."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Constant after 20 steps."})
    batch_size: int = field(default=32, metadata={"help": "Problems a step."})


class Coverage(TrainerCallback):
    """Samples held-out problems at the given steps."""

    def __init__(self, args: StudyArguments, tokenizer, rows):
        self.args, self.tokenizer, self.rows = args, tokenizer, rows
        self.points: dict[int, dict[int, float]] = {}

    def on_step_end(self, _, state, control, model, **kwargs):
        """Estimate pass@N."""
        if state.global_step not in self.args.steps:
            return
        options = {"max_new_tokens": 16, "token_budget": 65536, "seed": state.global_step}
        answers = dict(enumerate(self.rows["answer"]))
        draws = sample(model, self.tokenizer, self.rows["prompt"], self.args.num_samples, **options)
        correct = np.zeros(len(self.rows), dtype=int)
        with Verifier("exact") as verifier:
            for completion, verdict in judge(draws, answers, verifier):
                correct[completion.prompt] += verdict == "right"
        estimates = {n: pass_at_n(self.args.num_samples, correct, n).mean() for n in self.args.n}
        self.points[state.global_step] = estimates
        found = "  ".join(f"pass@{n} {value:.3f}" for n, value in estimates.items())
        print(f"  step {state.global_step}: {found}", flush=True)


def main(args: StudyArguments) -> None:
    """Train and sample each N and seed; one table, one figure."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    checkpoint = resolve_checkpoint("builtin:tiny")
    splits = load_splits("builtin:math", "1")
    train, test = splits["train"].take(args.train_rows), splits["test"].take(args.test_rows)
    folder, results = Path(args.output_dir), {}
    for n in args.n_samples:
        for seed in args.seeds:
            print(f"N = {n}, seed {seed}", flush=True)
            config = DCOConfig(
                folder / "training",
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
            trainer = DCOTrainer(checkpoint, config, train_dataset=train)
            coverage = Coverage(args, trainer.processing_class, test)
            trainer.add_callback(coverage)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            results[f"N={n} seed={seed}"] = coverage.points
            (folder / "dco_study.json").write_text(json.dumps(results, indent=1))
    shutil.rmtree(folder / "training", ignore_errors=True)
    show(args, results)


def show(args: StudyArguments, results: dict) -> None:
    """Mean and range over the seeds, printed and drawn."""
    epochs = [step * args.batch_size / args.train_rows for step in args.steps]
    panels: dict[str, dict[str, np.ndarray]] = {f"pass@{n}": {} for n in args.n}
    table = Table(title=f"Mean over {len(args.seeds)} seeds, by epoch (range at the last)")
    table.add_column("")
    for epoch in epochs:
        table.add_column(f"{epoch:g}", justify="right", no_wrap=True)
    for n in args.n:
        table.add_section()
        table.add_row(f"[bold]pass@{n}")
        for trained in args.n_samples:
            name = "cross-entropy" if trained == 1 else f"DCO, N = {trained}"
            runs = [results[f"N={trained} seed={seed}"] for seed in args.seeds]
            values = np.array([[run[step][n] for step in args.steps] for run in runs])
            panels[f"pass@{n}"][name] = values
            cells = [f"{value:.3f}" for value in values.mean(0)]
            last = values[:, -1]
            table.add_row(name, *cells[:-1], f"{cells[-1]} ({last.min():.2f} to {last.max():.2f})")
    Console().print(table)
    print(
        f"Figure: {draw_panels(Path(args.output_dir) / 'dco_study.png', epochs, panels, 'epoch')}"
    )


if __name__ == "__main__":
    main(*parse_args((StudyArguments,), __file__))
