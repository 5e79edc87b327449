"""Many fixed mixtures, a training each: a grid or a random sample, into ratios.csv and metrics.csv.

    llmmix run mixture_sweep --model_name_or_path builtin:tiny --max_steps 200 \
        --domains code=builtin:domains@code docs=builtin:domains@docs --mixtures 16

The tables are those that mixture laws are fitted to: a line a run, the shares of each domain in one
and its validation losses in the other, joined by `run_id`. A sweep that was stopped goes on where
it was: runs that are in both tables are not trained again.
"""

import copy
import csv
import itertools
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config

from llmmix.cli import parse_args
from llmmix.data import load_tokenizer, prepare_model_args
from llmmix.mixing import attach_mixture, label_domains
from llmmix.mixing.domains import MixtureConfig, load_domains
from llmmix.mixing.record import read_record


@dataclass
class SweepArguments:
    """Which mixtures."""

    mixtures: int = field(default=16, metadata={"help": "How many, of a sample."})
    sample: str = field(default="dirichlet", metadata={"help": "dirichlet, or grid."})
    concentration: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={"help": "Of the Dirichlet draws, in turn, times the --weights scaled to mean 1."},
    )
    grid_steps: int = field(default=4, metadata={"help": "Of a grid: shares in steps of 1 / this."})
    keep_models: bool = field(default=False, metadata={"help": "Keep every trained model."})


def choose(args: SweepArguments, prior: np.ndarray, seed: int) -> np.ndarray:
    """(runs, m) mixtures.

    Raises:
        ValueError: A sample of another name, or no mixture.
    """
    if args.sample == "grid":
        steps = range(args.grid_steps + 1)
        every = itertools.product(steps, repeat=len(prior))
        found = [point for point in every if sum(point) == args.grid_steps]
        return np.array(found) / args.grid_steps
    if args.sample != "dirichlet" or args.mixtures < 1:
        raise ValueError(
            f"`sample` must be dirichlet, of at least one of `mixtures`, or grid; got "
            f"{args.sample!r}, {args.mixtures}."
        )
    rng = np.random.default_rng(seed)
    strengths = itertools.cycle(args.concentration)
    scaled = prior * len(prior)
    drawn = [rng.dirichlet(next(strengths) * scaled) for _ in range(args.mixtures)]
    return np.round(drawn, 4) / np.round(drawn, 4).sum(1, keepdims=True)


def finished(table: Path, run: str) -> dict | None:
    """A run's line in a table."""
    if not table.exists():
        return None
    with table.open() as file:
        return next((row for row in csv.DictReader(file) if row["run_id"] == run), None)


def check_same(row: dict, weights: dict[str, float], table: Path) -> None:
    """Refuse to go on with a sweep of other mixtures.

    Raises:
        ValueError: A line has other domains or shares.
    """
    there = {name: float(value) for name, value in row.items() if name not in ("run_id", "name")}
    if there.keys() != weights.keys() or any(abs(there[n] - weights[n]) > 1e-9 for n in weights):
        raise ValueError(
            f"`output_dir`: {table} holds a sweep of other mixtures ({row['run_id']}: {there}, now "
            f"{weights}). Name another folder, or the same domains, seed and sample."
        )


def add(table: Path, run: str, values: dict[str, float]) -> None:
    """Append a run's line, below a header where there is none."""
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["run_id", "name", *values])
        if new:
            writer.writeheader()
        writer.writerow({"run_id": run, "name": run, **values})


def main(training_args: MixtureConfig, model_args: ModelConfig, sweep_args: SweepArguments) -> None:
    """Train each mixture that is not in the tables yet."""
    checkpoint = prepare_model_args(model_args, training_args)
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    train, validation = load_domains(training_args, tokenizer)
    prior = training_args.sampler(train).weights
    out = Path(training_args.output_dir)
    tables = {name: out / f"{name}.csv" for name in ("ratios", "metrics")}
    mixtures = choose(sweep_args, prior, training_args.seed)
    for number, weights in enumerate(mixtures):
        run = f"run-{number:04d}"
        shares = dict(zip(train, weights.tolist(), strict=True))
        if row := finished(tables["ratios"], run):
            check_same(row, shares, tables["ratios"])
        if row and finished(tables["metrics"], run):
            continue
        args = copy.copy(training_args)
        args.output_dir = str(out / run)
        trainer = SFTTrainer(
            checkpoint,
            args=args,
            train_dataset=label_domains(train),
            eval_dataset=validation,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        attach_mixture(trainer, args.sampler(train, weights))
        trainer.train()
        if sweep_args.keep_models:
            trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            header, entries = read_record(out / run)
            losses = next(entry["final"] for entry in entries if "final" in entry)
            if not row:
                add(tables["ratios"], run, shares)
            names = [f"{target}_val_loss" for target in header["targets"]]
            add(tables["metrics"], run, dict(zip(names, losses, strict=True)))
            if not sweep_args.keep_models:
                shutil.rmtree(out / run)
        trainer.accelerator.wait_for_everyone()
    print(f"{len(mixtures)} runs in {tables['ratios']} and {tables['metrics']}")


if __name__ == "__main__":
    main(*parse_args((MixtureConfig, ModelConfig, SweepArguments), __file__))
