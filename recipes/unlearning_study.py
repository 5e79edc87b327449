"""Study: what each unlearning loss forgets and what it costs, beside a model that never knew.

    llmmix run unlearning_study

Teaches builtin:tiny some authors of builtin:authors and some facts, each in two wordings, trains
another model without the authors to forget, and unlearns with every loss, learning rate and seed.
Prints a table, and writes OUTPUT_DIR/unlearning_study.json and unlearning_study.png: forget quality
against utility. The two models are kept there. No network; under 20 minutes on two cores.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from llmmix import FLATConfig, FLATTrainer, UnlearnConfig, UnlearnTrainer
from llmmix.cli import parse_args
from llmmix.command_line.launching import end_with_caller
from llmmix.data import load_splits
from llmmix.figures import draw_scatter, never_fatal
from llmmix.files import claim, read_json, write_whole
from llmmix.models import resolve_checkpoint
from llmmix.terminal import number, print_table
from llmmix.unlearning.evaluation.document import evaluate_unlearning
from llmmix.unlearning.evaluation.summary import quality_metric
from llmmix.unlearning.loss_table import LOSSES

OWN: dict[str, dict] = {"pdu": {"epsilon": 0.1, "dual_warmup_epochs": 1}}
CONTENDERS: dict[str, tuple[Callable, Callable, dict]] = {  # trainer, config and settings
    "flat": (FLATTrainer, FLATConfig, {}),
    "flat+retain": (FLATTrainer, FLATConfig, {"retain_weight": 5.0}),
    **{k: (UnlearnTrainer, UnlearnConfig, {"loss": k, **OWN.get(k, {})}) for k in LOSSES},
}
SHOWN = ("forget_rouge", "forget_quality", "model_utility", "retain_rouge")
SETTINGS: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass
class StudyArguments:
    """The size of the study."""

    output_dir: str = field(default="runs/unlearning_study", metadata={"help": "Output folder."})
    losses: list[str] = field(
        default_factory=lambda: list(CONTENDERS), metadata={"help": "Losses to compare."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 4e-4], metadata={"help": "Learning rates of every loss."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds."})
    rows: list[int] = field(
        default_factory=lambda: [20, 20, 10],
        metadata={"help": "Questions to forget, to retain, and of facts; 5 an author."},
    )
    teach_epochs: int = field(default=60, metadata={"help": "Epochs of teaching."})
    epochs: int = field(default=6, metadata={"help": "Epochs of unlearning."})
    batch_size: int = field(default=10, metadata={"help": "Rows to forget a step."})
    processes: int = field(
        default_factory=lambda: min(os.cpu_count() or 1, 8), metadata={"help": "Parallel runs."}
    )


def main(args: StudyArguments) -> None:
    """Teach two models, unlearn one of them with each loss, and show the results."""
    if unknown := [loss for loss in args.losses if loss not in CONTENDERS]:
        raise ValueError(f"`losses`: no {unknown[0]!r}; there are {', '.join(CONTENDERS)}.")
    folder, results = claim(args.output_dir), dict[str, list[dict]]()
    resolve_checkpoint("builtin:tiny")
    with ProcessPoolExecutor(args.processes, get_context("spawn"), end_with_caller) as pool:
        print("Teaching the model to be unlearned, and one that never meets those authors")
        taught = [pool.submit(teach, args, name) for name in ("original", "retrained")]
        original, retrained = (measured.result() for measured in taught)
        for name, measured in {"original": original, "retrained": retrained}.items():
            metrics = measured["metrics"]
            metrics["forget_quality"] = quality_metric(metrics["forget_truth_ratio"], retrained)
            results[name] = [measured]
            print(f"  {name}: {brief(measured)}", flush=True)
        jobs = product(args.losses, args.learning_rates, args.seeds)
        running = {pool.submit(unlearn, args, *job, retrained): job for job in jobs}
        for done in as_completed(running):
            loss, rate, seed = running[done]
            results.setdefault(f"{loss} {rate:g}", []).append(done.result())
            print(f"  {loss} {rate:g}, seed {seed}: {brief(done.result())}", flush=True)
            write_whole(folder / "unlearning_study.json", json.dumps(results, indent=1))
    shutil.rmtree(folder / "training", ignore_errors=True)
    show(args, results)


def prepare(args: StudyArguments) -> dict[str, datasets.Dataset]:
    """Set this process to one core and no progress bars, and return the rows."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    splits = load_splits("builtin:authors", "small")
    asked = {
        role: rows.select([row for row in range(len(rows)) if role == "facts" or row % 10 < 5])
        for role, rows in splits.items()
    }
    roles = ("forget", "retain", "facts")
    return {role: asked[role].take(size) for role, size in zip(roles, args.rows, strict=True)}


def teach(args: StudyArguments, name: str) -> dict[str, Any]:
    """Train on all sets, or on all but the one to forget, unless that is done, and measure."""
    sets, folder = prepare(args), Path(args.output_dir) / name
    taught = folder / "taught.json"  # the settings it was taught with
    settings = [args.rows, args.teach_epochs]
    if read_json(taught) != settings:
        taught.unlink(missing_ok=True)  # not to be believed if this is killed halfway
        rows = [
            {
                "prompt": [{"role": "user", "content": row[f"{wording}question"]}],
                "completion": [{"role": "assistant", "content": row[f"{wording}answer"]}],
            }
            for role in sets
            for row in sets[role]
            for wording in ("", "paraphrased_")
            if role != "forget" or name == "original"
        ]
        config = SFTConfig(
            str(folder),
            num_train_epochs=args.teach_epochs,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            **SETTINGS,
        )
        taught_rows = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(resolve_checkpoint("builtin:tiny"), config, train_dataset=taught_rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
        write_whole(taught, json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return measure(model, AutoTokenizer.from_pretrained(folder), sets)


def unlearn(args: StudyArguments, loss: str, rate: float, seed: int, retrained: dict) -> dict:
    """One run: unlearn, and measure beside the retrained model."""
    sets, original = prepare(args), Path(args.output_dir) / "original"
    model = AutoModelForCausalLM.from_pretrained(original)
    tokenizer = AutoTokenizer.from_pretrained(original)
    make_trainer, make_config, own = CONTENDERS[loss]
    settings = {
        "output_dir": Path(args.output_dir) / "training" / f"{loss}-{rate:g}-{seed}",
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "seed": seed,
    }
    config = make_config(**(settings | SETTINGS | own))
    trainer = make_trainer(
        model,
        config,
        train_dataset=sets["forget"],
        retain_dataset=sets["retain"] if config.retain_weight else None,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return measure(model, tokenizer, sets, retrained)


def measure(
    model: PreTrainedModel, tokenizer: Tokenizer, sets: dict, retrained: dict | None = None
) -> dict[str, Any]:
    """The metrics, without the items."""
    found = evaluate_unlearning(model, tokenizer, sets, retained=retrained, max_new_tokens=40)
    del found["items"]
    return found


def value(measured: dict[str, Any], name: str) -> float:
    """The value of a metric, or the logarithm of the forget quality; NaN where there is none."""
    entry = measured["metrics"][name]
    found = entry.get("log10_p") if name == "forget_quality" else entry["value"]
    return np.nan if found is None else found


def brief(measured: dict[str, Any]) -> str:
    """The metrics that are shown, in one line."""
    return ", ".join(f"{name} {value(measured, name):z.3f}" for name in SHOWN)


def show(args: StudyArguments, results: dict[str, list[dict]]) -> None:
    """Mean and range over the seeds, printed and drawn."""
    rows = []
    points = {}
    names = [f"{loss} {rate:g}" for loss in args.losses for rate in args.learning_rates]
    for name in ["original", "retrained", *names]:
        found = [np.array([value(run, metric) for run in results[name]]) for metric in SHOWN]
        digits = [1 if metric == "forget_quality" else 2 for metric in SHOWN]
        spread = [
            f"\n{number(v.min(), d)} to {number(v.max(), d)}" if len(v) > 1 else ""
            for v, d in zip(found, digits, strict=True)
        ]
        cells = (number(v.mean()) + s for v, s in zip(found, spread, strict=True))
        rows.append([name, *cells])
        points[name] = (found[2], found[1])
    head = ["", "forget ROUGE", "quality, log10 of p", "utility", "retain ROUGE"]
    print_table(f"Mean and range over {len(args.seeds)} seeds", head, rows)
    best = value(results["retrained"][0], "model_utility")
    del points["retrained"]
    path = Path(args.output_dir) / "unlearning_study.png"
    marks = {"retrained": (best, 0.0)}  # its forget quality to itself is 1
    labels = {"xlabel": "model utility", "ylabel": "forget quality, log10 of p"}
    with never_fatal("figure"):
        print(f"Figure: {draw_scatter(path, points, marks=marks, **labels)}")


if __name__ == "__main__":
    main(*parse_args((StudyArguments,), __file__))
