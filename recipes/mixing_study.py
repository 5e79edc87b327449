"""Study: does moving the mixture pay? Aioli and other methods against the best fixed shares.

    llmmix run mixing_study [--domains code docs cpp math]

It trains a two-layer model from scratch on domains of builtin:domains, with every method for the
same number of steps and over several seeds. It prints test losses as differences to equal shares
with 95% intervals, and writes OUTPUT_DIR/mixing_study.json and mixing_study.png. It includes a
control that is rarely reported: a fixed mixture with the shares that Aioli drew on average. No
network; about 20 minutes on a quiet machine with two cores.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers import default_data_collator as collate
from transformers.utils import logging

from llmmix import builtin, mixing
from llmmix.builtin.corpora import windows
from llmmix.cli import parse_args
from llmmix.figures import never_fatal
from llmmix.files import claim, read_record, write_whole
from llmmix.mixing.figure import draw_paths
from llmmix.mixing.record import drawn_shares
from llmmix.mixing.rows import by_target
from llmmix.precision import evaluating
from llmmix.terminal import number, print_table

EQUAL, BEST, MATCHED = "equal shares", "best fixed shares", "fixed, as Aioli drew"
ONE_HOT, REGRESSION = "Aioli, one_hot", "Aioli, regression"
MOVING = (ONE_HOT, REGRESSION, "Skill-It", "ODM")  # methods whose trajectories are drawn
GRID = (0.5, 0.8)  # shares of one domain; the others share the rest equally
DEV_SEEDS = (100, 101)  # the best fixed shares are chosen on these, by validation loss
Make = Callable[..., Any] | None  # makes a method's callback from (sampler, measured_rows)
SIZE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 4}


@dataclass
class StudyArguments:
    """Size of the study."""

    output_dir: str = field(
        default="runs/mixing_study", metadata={"help": "Folder of the results."}
    )
    domains: list[str] = field(
        default_factory=lambda: ["docs", "noise", "noise2"], metadata={"help": "Domains to mix."}
    )
    seeds: int = field(default=3, metadata={"help": "Number of seeds of the other methods."})
    aioli_seeds: int = field(
        default=8, metadata={"help": "Number of seeds of Aioli, equal and best fixed shares."}
    )
    max_steps: int = field(default=500, metadata={"help": "Steps of each training."})
    batch_size: int = field(default=8, metadata={"help": "Windows of 64 tokens in a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak of the cosine schedule."})
    test_rows: int = field(default=200, metadata={"help": "Number of test windows of each domain."})


class Study:
    """Trains models by method and seed, and keeps the results."""

    def __init__(self, args: StudyArguments):
        self.args, self.names = args, args.domains
        self.tokenizer = builtin.train_tokenizer()
        splits = windows(self.tokenizer, 64, ",".join(args.domains))
        splits = {k: rows.add_column("labels", rows["input_ids"][:]) for k, rows in splits.items()}
        parts: dict[str, dict[str, Any]] = {
            split: by_target(rows, self.names) for split, rows in splits.items()
        }
        self.train, self.rows = splits["train"], parts["train"]
        self.validation = parts["validation"]
        self.test = {name: rows.take(args.test_rows) for name, rows in parts["test"].items()}
        self.folder = claim(args.output_dir)
        self.results: dict[str, dict[int, dict]] = {}

    def fit(
        self, seed: int, weights: Any = None, make: Make = None, steps: int | None = None
    ) -> tuple[LlamaForCausalLM, Any, float]:
        """Train a model; returns it, its callback and the seconds that training took."""
        args, begun = self.args, time.perf_counter()
        torch.manual_seed(seed)
        settings = TrainingArguments(
            str(self.folder / "training"),
            max_steps=steps or args.max_steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=40,
            per_device_train_batch_size=args.batch_size,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        config = LlamaConfig(vocab_size=len(self.tokenizer), tie_word_embeddings=True, **SIZE)
        model = LlamaForCausalLM(config)
        rows = {"train_dataset": self.train, "eval_dataset": self.validation}
        trainer = Trainer(model, settings, data_collator=collate, **rows)
        trainer.remove_callback(PrinterCallback)
        sampler = mixing.MixtureSampler(self.rows, weights, seed=seed, method="even")
        made = make(sampler, measured_rows=24) if make else None
        callback = mixing.attach_mixture(trainer, sampler, made)
        with contextlib.redirect_stdout(None):
            trainer.train()
        return model, callback, time.perf_counter() - begun

    def run(
        self, name: str, seed: int, weights: Any = None, make: Make = None, before: float = 0.0
    ) -> LlamaForCausalLM:
        """Train, test and save the result; `before` are seconds of earlier stages of the method."""
        model, callback, seconds = self.fit(seed, weights, make)
        entries = read_record(self.folder / "training")[1]
        path = [[e["step"], e["weights"]] for e in entries if "weights" in e]
        losses = [self.loss(model, rows) for rows in self.test.values()]
        self.results.setdefault(name, {})[seed] = {
            "test": losses,
            "mean": float(np.mean(losses)),
            "validation": float(np.mean(self.final())),
            "shares": list(drawn_shares(self.folder / "training").values()),
            "path": path,
            "seconds": seconds + before,
        }
        write_whole(self.folder / "mixing_study.json", json.dumps(self.results, indent=1))
        print(f"{name}, seed {seed}: mean test loss {np.mean(losses):.4f}", flush=True)
        return model

    def loss(self, model: LlamaForCausalLM, rows: Dataset) -> float:
        """Mean loss a token over windows, which all have the same length."""
        ids = torch.tensor(rows["input_ids"][:])
        with evaluating(model):
            parts = [model(input_ids=part, labels=part).loss * len(part) for part in ids.split(50)]
        return float(sum(parts) / len(ids))

    def grid(self) -> list[float]:
        """The fixed shares with the smallest validation loss, of those that prefer one domain."""
        rest, found = 1 / (len(self.names) - 1), {}
        for domain in range(len(self.names)):
            for share in GRID:
                weights = np.where(np.arange(len(self.names)) == domain, share, (1 - share) * rest)
                name = "grid " + "/".join(f"{w:.2f}" for w in weights)
                for seed in DEV_SEEDS:
                    self.run(name, seed, weights)
                runs = self.results.pop(name).values()
                found[tuple(weights)] = float(np.mean([run["validation"] for run in runs]))
        return [round(float(share), 4) for share in min(found, key=lambda weights: found[weights])]

    def graph(self) -> list[list[float]]:
        """Skill-It's graph, from a quarter of a run on each domain alone."""
        ends = []
        for domain in np.eye(len(self.names)):
            self.fit(DEV_SEEDS[0], domain, steps=self.args.max_steps // 4)
            ends.append(self.final())
        self.fit(DEV_SEEDS[0], steps=1)
        return mixing.skillit_graph(self.final(), ends).tolist()

    def final(self) -> list[float]:
        """Validation losses at the end of the last training."""
        return next(e["final"] for e in read_record(self.folder / "training")[1] if "final" in e)


def aioli(estimator: str, seed: int) -> Make:
    """Makes Aioli's callback with an estimator, whose order of domains follows a seed."""
    return partial(
        mixing.AioliCallback, config=mixing.AioliConfig(estimator=estimator, order_seed=seed)
    )


def main(args: StudyArguments) -> None:
    """Train every method on every seed; print a table and draw a figure."""
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    study = Study(args)
    run, best, skillit = study.run, study.grid(), mixing.SkillItConfig(graph=study.graph())
    for seed in range(max(args.seeds, args.aioli_seeds)):
        reference = run(EQUAL, seed)
        if seed < args.aioli_seeds:
            run(BEST, seed, best)
            run(ONE_HOT, seed, None, aioli("one_hot", seed))
            run(REGRESSION, seed, None, aioli("regression", seed))
            run(MATCHED, seed, study.results[REGRESSION][seed]["shares"])
        if seed < args.seeds:
            run("Skill-It", seed, None, partial(mixing.SkillItCallback, config=skillit))
            run("ODM", seed, None, mixing.ODMCallback)
            doremi = partial(mixing.DoReMiCallback, reference=reference)
            doge = partial(mixing.DoGECallback, config=mixing.DoGEConfig(interval=5))
            for name, proxy in (("DoReMi", doremi), ("DoGE", doge)):
                _, callback, seconds = study.fit(seed, None, proxy)
                run(name, seed, callback.average, before=seconds)
    shutil.rmtree(study.folder / "training", ignore_errors=True)
    show(args, study.results, best)


def show(args: StudyArguments, results: dict, best: list[float]) -> None:
    """Print a table of differences to equal shares on the same seeds, and draw the paths."""
    equal = results[EQUAL]
    rows = []
    for name, runs in results.items():
        differences = np.array([run["mean"] - equal[seed]["mean"] for seed, run in runs.items()])
        pairs = [(run["test"], equal[seed]["test"]) for seed, run in runs.items()]
        by_domain = np.mean([np.subtract(*pair) for pair in pairs], axis=0)
        error = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
        bounds = (differences.mean() + side * error for side in (-1, 1))
        spread = "" if name == EQUAL else " ".join(number(bound, sign="+") for bound in bounds)
        shares = np.mean([run["shares"] for run in runs.values()], axis=0)
        shown = [name, str(len(runs)), number(differences.mean(), sign="+"), spread]
        shown += [number(value, 2, "+") for value in by_domain]
        shown += [" ".join(f"{share:.2f}" for share in shares)]
        rows.append([*shown, f"{np.mean([run['seconds'] for run in runs.values()]):.0f}"])
    head = ["", "seeds", "mean", "95% interval", *args.domains, "shares", "s"]
    print_table(f"Test loss less that under equal shares, {args.max_steps} steps", head, rows)
    print(f"Equal shares: {np.mean([run['mean'] for run in equal.values()]):.4f}. Best: {best}")
    paths = {k: [run["path"] for run in v.values()] for k, v in results.items() if k in MOVING}
    with never_fatal("figure"):
        figure = Path(args.output_dir) / "mixing_study.png"
        print(f"Figure: {draw_paths(figure, args.domains, paths, args.max_steps)}")


if __name__ == "__main__":
    main(*parse_args((StudyArguments,), __file__))
