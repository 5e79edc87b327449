"""Study: which token loss pays where: on clean rows, among wrong answers, and with few rows.

    llmmix run token_losses_study

Teaches builtin:tiny one-step problems outside of builtin:math, then goes on with each loss and seed
on problems of builtin:math: as they are, with a share of wrong answers, and with few of them.
Measures held-out problems, prints a table of each set, and writes
OUTPUT_DIR/token_losses_study.json and token_losses_study.png. The taught model is kept there. No
network; under 15 minutes on two cores.
"""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging

from llmmix import TokenLossConfig, TokenLossTrainer
from llmmix.builtin.problems import Problem, facts
from llmmix.cli import parse_args
from llmmix.command_line.launching import end_with_caller
from llmmix.data import load_splits
from llmmix.figures import draw_ranges, never_fatal
from llmmix.files import claim, read_json, write_whole
from llmmix.grading import Verifier, judge, pass_at_n
from llmmix.models import resolve_checkpoint
from llmmix.sampling import sample
from llmmix.terminal import number, print_table
from llmmix.token_losses.loss_table import LOSSES

OWN: dict[str, dict] = {  # by name, where it is not that of a loss at its defaults
    f"gce {q}": {"loss_type": "gce", "gce_q": q} for q in (-0.3, 0.7)
}
CONTENDERS = ["nll", "dft", *OWN, *(name for name in LOSSES if name not in ("nll", "dft", "gce"))]
SETS = ("clean", "wrong", "few")
SHOWN = ("greedy", "pass@1", "pass@N", "NLL")  # of a held-out problem; the NLL, of its tokens
DRAWN = ("pass@1", "pass@N")


@dataclass
class StudyArguments:
    """The size of the study."""

    output_dir: str = field(default="runs/token_losses_study", metadata={"help": "Output folder."})
    losses: list[str] = field(
        default_factory=lambda: list(CONTENDERS),
        metadata={"help": f"Losses to compare, among {', '.join(CONTENDERS)}."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds."})
    teach_steps: int = field(default=1000, metadata={"help": "Steps of teaching."})
    rows: int = field(default=400, metadata={"help": "Problems to go on with."})
    few_rows: int = field(default=32, metadata={"help": "Problems of the set with few rows."})
    wrong_share: float = field(
        default=0.4, metadata={"help": "Share of wrong answers in the set that has some."}
    )
    steps: int = field(default=60, metadata={"help": "Steps that follow, with each loss."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of these steps."})
    batch_size: int = field(default=32, metadata={"help": "Problems of a step."})
    test_rows: int = field(default=125, metadata={"help": "Held-out problems to sample."})
    num_samples: int = field(default=8, metadata={"help": "Samples of each: the N of pass@N."})
    processes: int = field(
        default_factory=lambda: min(os.cpu_count() or 1, 8), metadata={"help": "Parallel runs."}
    )


def main(args: StudyArguments) -> None:
    """Teach a model, go on with each loss on each set, and show the results."""
    if unknown := [loss for loss in args.losses if loss not in CONTENDERS]:
        raise ValueError(f"`losses`: no {unknown[0]!r}; there are {', '.join(CONTENDERS)}.")
    folder, results = claim(args.output_dir), dict[str, list[dict]]()
    resolve_checkpoint("builtin:tiny")
    with ProcessPoolExecutor(args.processes, get_context("spawn"), end_with_caller) as pool:
        print("Teaching the model to begin with", flush=True)
        results["before"] = [pool.submit(teach, args).result()]
        print(f"  before: {brief(results['before'][0])}", flush=True)
        jobs = product(SETS, args.losses, args.seeds)
        running = {pool.submit(fine_tune, args, *job): job for job in jobs}
        for count, done in enumerate(as_completed(running), 1):
            rows, loss, seed = running[done]
            results.setdefault(f"{rows}, {loss}", []).append(done.result())
            shown = f"{rows}, {loss}, seed {seed}: {brief(done.result())}"
            print(f"  {count} of {len(running)}: {shown}", flush=True)
            write_whole(folder / "token_losses_study.json", json.dumps(results, indent=1))
    shutil.rmtree(folder / "training", ignore_errors=True)
    show(args, results)


def teach(args: StudyArguments) -> dict[str, float]:
    """Train on the first problems by cross-entropy, unless that is done, and measure."""
    problems, taught = prepare(args), Path(args.output_dir) / "taught"
    settings = {"max_steps": args.teach_steps, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}
    done = taught / "taught.json"  # the settings it was taught with
    if read_json(done) != settings:
        done.unlink(missing_ok=True)  # not to be believed if this is killed halfway
        start = resolve_checkpoint("builtin:tiny")
        trainer = made(start, problems["taught"], taught, args.batch_size, settings)
        trainer.train()
        trainer.save_model(str(taught))
        write_whole(done, json.dumps(settings))
    return measure(args, made(str(taught), problems["taught"], taught, 1, {}), problems["test"])


def fine_tune(args: StudyArguments, rows: str, loss: str, seed: int) -> dict[str, float]:
    """One run: go on from the taught model, and measure."""
    problems = prepare(args, seed)
    settings = {
        "loss_type": loss,
        **OWN.get(loss, {}),
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "seed": seed,
    }
    taught, folder = (Path(args.output_dir) / name for name in ("taught", "training"))
    trainer = made(str(taught), problems[rows], folder, args.batch_size, settings)
    trainer.train()
    return measure(args, trainer, problems["test"])


def prepare(args: StudyArguments, seed: int = 0) -> dict[str, Dataset]:
    """Set this process to one core and no progress bars, and return the rows of each set."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    splits = load_splits("builtin:math", "1")
    known = {row["prompt"][0]["content"] for rows in splits.values() for row in rows}
    taught = [conversation(problem) for problem in facts() if problem.question not in known]
    # The same problems in the same order, each with a plausible wrong solution
    slips = load_splits("builtin:preferences", "1")["train"]["rejected"][:]
    right = splits["train"].add_column("slip", slips).shuffle(seed=0).take(args.rows)
    wrong = np.random.default_rng(seed).random(len(right)) < args.wrong_share
    mixed = right.map(
        lambda row, n: {"completion": row["slip"]} if wrong[n] else {}, with_indices=True
    )
    return {
        "taught": Dataset.from_list(taught),
        "clean": right,
        "wrong": mixed,
        "few": right.shuffle(seed=seed).take(args.few_rows),
        "test": splits["test"].take(args.test_rows),
    }


def conversation(problem: Problem) -> dict[str, list[dict[str, str]]]:
    """A problem and its solution, as a row of builtin:math has them."""
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "completion": [{"role": "assistant", "content": problem.solution()[0]}],
    }


def made(
    checkpoint: str, rows: Dataset, folder: Path, batch_size: int, settings: dict[str, Any]
) -> TokenLossTrainer:
    """A trainer that says nothing."""
    config = TokenLossConfig(
        str(folder),
        warmup_steps=10,
        per_device_train_batch_size=batch_size,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    rows = rows.select_columns(["prompt", "completion"])
    trainer = TokenLossTrainer(checkpoint, config, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(args: StudyArguments, trainer: TokenLossTrainer, test: Dataset) -> dict[str, float]:
    """Held-out problems: solved by the most likely answer, by one sample, by any; and the NLL."""
    solved, tokenizer = {}, cast(Any, trainer.processing_class)
    for name, samples, temperature in (("greedy", 1, 0.0), ("pass@1", args.num_samples, 1.0)):
        draws = sample(
            trainer.model,
            tokenizer,
            test["prompt"],
            samples,
            max_new_tokens=16,
            temperature=temperature,
            token_budget=65536,
        )
        correct = np.zeros(len(test), dtype=int)
        with Verifier("exact") as verifier:
            for completion, verdict in judge(draws, dict(enumerate(test["answer"])), verifier):
                correct[completion.prompt] += verdict == "right"
        solved[name] = float(pass_at_n(samples, correct, 1).mean())
    solved["pass@N"] = float(pass_at_n(args.num_samples, correct, args.num_samples).mean())
    rows = test.select_columns(["prompt", "completion"])
    return {**solved, "NLL": trainer.evaluate(rows)["eval_nll_per_token"]}


def brief(measured: dict[str, float]) -> str:
    """The metrics in one line."""
    return ", ".join(f"{name} {measured[name]:.3f}" for name in SHOWN)


def show(args: StudyArguments, results: dict[str, list[dict]]) -> None:
    """Mean and range over the seeds, printed a set a table, and drawn."""
    (before,) = results["before"]
    names = {name: name.replace("@N", f"@{args.num_samples}") for name in SHOWN}
    panels: dict[str, dict[str, np.ndarray]] = {}
    for key, rows, loss in product(SHOWN, SETS, args.losses):
        runs = np.array([run[key] for run in results[f"{rows}, {loss}"]])
        panels.setdefault(f"{names[key]}, {rows}", {})[loss] = runs
    for rows in SETS:
        cells = [["before", *(number(before[key]) for key in SHOWN)]]
        for loss in args.losses:
            found = [panels[f"{name}, {rows}"][loss] for name in names.values()]
            ends = (f"{number(v.min(), 2)} to {number(v.max(), 2)}" for v in found)
            means = (number(v.mean()) for v in found)
            cells.append([loss, *("\n".join(pair) for pair in zip(means, ends, strict=True))])
        title = f"{rows}: mean and range over {len(args.seeds)} seeds"
        print_table(title, ["", *names.values()], cells)
    drawn = {f"{names[key]}, {rows}": before[key] for key in DRAWN for rows in SETS}
    path = Path(args.output_dir) / "token_losses_study.png"
    with never_fatal("figure"):
        chosen = {title: panels[title] for title in drawn}
        print(f"Figure: {draw_ranges(path, chosen, marks=drawn, across=len(SETS))}")


if __name__ == "__main__":
    main(*parse_args((StudyArguments,), __file__))
