r"""Unlearning: what a model has forgotten, what it still leaks, and what it has kept.

    llmmix eval unlearning --model_name_or_path runs/flat --original runs/taught \
        --forget builtin:authors --retain builtin:authors --holdout builtin:authors \
        --facts builtin:authors --retain_model runs/retrained --leak_samples 64 --probes int4

    llmmix eval unlearning --forget locuslab/TOFU@forget10_perturbed \
        --retain locuslab/TOFU@retain_perturbed --holdout locuslab/TOFU@holdout10 \
        --facts locuslab/TOFU@real_authors_perturbed locuslab/TOFU@world_facts_perturbed ...

A set is the split of its role's name (forget, retain, holdout, facts), or the only one, or `train`;
NAME@CONFIG names a configuration. Rows have `question` and `answer`, `prompt` and `completion` (or
`gt`), or `text`, and perhaps `paraphrased_question`, `paraphrased_answer`, `perturbed_answer` (a
list) and `secret`. Prints one table, with the model trained without the forget set in the last
column. `--output_dir` gets NAME/items.jsonl (a line an item), NAME/unlearning.json (which
`--retain_log` takes) and summary.json. Measurements are kept in the cache under the contents of
checkpoint and data: nothing is measured twice.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmmix.unlearning.evaluation.membership import (
    membership_auc,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
)
from llmmix.unlearning.evaluation.memorization import exact_memorization, extraction_strength
from llmmix.unlearning.evaluation.truth import forget_quality, truth_ratio
from llmmix.unlearning.evaluation.utility import model_utility

if TYPE_CHECKING:
    from datasets import Dataset

    from llmmix.unlearning.evaluation.checkpoint import Plan

__all__ = [
    "UnlearningArguments",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "load_sets",
    "main",
    "membership_auc",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "privacy_leakage",
    "truth_ratio",
]

SETS = ("forget", "retain", "holdout", "facts", "dataset_config")  # the flags that name data


@dataclass
class UnlearningArguments:
    """What `llmmix eval unlearning` takes."""

    model_name_or_path: list[str] = field(
        metadata={"help": "Models to evaluate: hub ids, folders, .gguf files or builtin:tiny."}
    )
    forget: str = field(
        metadata={"help": "Rows that should be forgotten: hub id, folder, file or built-in."}
    )
    retain: str | None = field(
        default=None, metadata={"help": "Rows from training that should be remembered."}
    )
    holdout: str | None = field(
        default=None,
        metadata={"help": "Rows in the form of the forget set that no model was trained on."},
    )
    facts: list[str] | None = field(
        default=None, metadata={"help": "Sets of general knowledge that should be remembered."}
    )
    adapter: list[str] | None = field(
        default=None,
        metadata={
            "help": "PEFT folders, each evaluated on the one model; 'none' is the model alone."
        },
    )
    original: str | None = field(
        default=None,
        metadata={
            "help": "Model before unlearning: an attack's reference, and the judge of fluency."
        },
    )
    retain_model: str | None = field(
        default=None,
        metadata={"help": "Model trained without the forget set: the baseline of the comparison."},
    )
    retain_log: str | None = field(
        default=None,
        metadata={"help": "Folder or unlearning.json of an earlier --retain_model, in its place."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of the hub datasets, or size of builtin:authors."},
    )
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Number of rows to use from the start of each set; all by default."},
    )
    max_new_tokens: int = field(default=200, metadata={"help": "Longest greedy answer, in tokens."})
    stop: list[str] = field(
        default_factory=list, metadata={"help": "Strings before which a greedy answer is cut."}
    )
    rouge_words: str = field(
        default="latin",
        metadata={"help": "What ROUGE counts as words: latin, or unicode for words of any script."},
    )
    min_k: float = field(
        default=0.4,
        metadata={"help": "Share of the least probable tokens that Min-K attacks look at."},
    )
    gradient_norms: bool = field(
        default=False, metadata={"help": "Attack membership by gradient norms too, which is slow."}
    )
    fluency: str | None = field(
        default=None,
        metadata={
            "help": "Your module:function that scores a list of texts, higher for more fluent ones."
        },
    )
    leak_samples: int = field(
        default=0,
        metadata={"help": "Answers to sample for each forget row, in search of leaks; 0 for none."},
    )
    leak_n: list[int] | None = field(
        default=None,
        metadata={"help": "The N of leak@N; by default 1, 4, 16 and 64 up to --leak_samples."},
    )
    leak_threshold: float = field(
        default=0.9, metadata={"help": "Score from which a sampled answer is a leak."}
    )
    leak_scorer: str = field(
        default="auto",
        metadata={
            "help": "How sampled answers are scored: auto, extraction, rouge, a verifier, or your "
            "module:function."
        },
    )
    leak_max_new_tokens: int = field(
        default=64, metadata={"help": "Longest sampled answer, in tokens."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the answers searched for leaks; 0: greedy."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Nucleus mass of the answers searched for leaks."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampled answers and of relearning."})
    probes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Attempts to bring answers back: any of relearn, paraphrase, int8 and int4."
        },
    )
    relearn_steps: int = field(default=10, metadata={"help": "Optimizer steps of relearning."})
    relearn_learning_rate: float = field(
        default=1e-5, metadata={"help": "Learning rate of relearning."}
    )
    relearn_batch_size: int = field(default=4, metadata={"help": "Rows a step of relearning."})
    relearn_share: float = field(
        default=0.5,
        metadata={"help": "Share of the forget set that is relearnt; the rest is measured."},
    )
    compat: str | None = field(
        default=None,
        metadata={
            "help": "Framework whose files to write too: open_unlearning, for TOFU_EVAL.json."
        },
    )
    token_budget: int = field(
        default=16384, metadata={"help": "Size of a batch in tokens, padding included."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the weights; auto is the checkpoint's own, and fp32 on a CPU."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoint."}
    )
    output_dir: str = field(
        default="runs/unlearning", metadata={"help": "Folder that gets the results."}
    )


def main(args: UnlearningArguments) -> dict[str, dict[str, Any]]:
    """Evaluate each model; print the table and write what the module's docstring lists."""
    from transformers.utils import logging

    from llmmix.files import claim
    from llmmix.models import Loader, check_checkpoints, named_checkpoints
    from llmmix.processes import evaluation_state
    from llmmix.unlearning.evaluation.checkpoint import check_plan, evaluate_checkpoint
    from llmmix.unlearning.evaluation.document import read_document
    from llmmix.unlearning.evaluation.printing import print_table
    from llmmix.unlearning.evaluation.probes import check_probes

    _check(args)
    runs = named_checkpoints(args.model_name_or_path, args.adapter)
    check_checkpoints(runs, retain_model=args.retain_model, original=args.original)
    state = evaluation_state()
    claim(args.output_dir)
    logging.disable_progress_bar()
    if args.retain_model and "retain_model" in [run.name for run in runs]:
        raise ValueError("A run cannot be called `retain_model`, which is the baseline's folder.")
    data, plan, probes = load_sets(args), _plan(args), args.probes or []
    check_probes(probes, data["forget"], plan.relearning)
    loader = Loader(state.device, args.dtype, args.trust_remote_code)
    retained, results = read_document(args.retain_log) if args.retain_log else None, {}
    folder = Path(args.output_dir)
    named = [args.retain_model] if args.retain_model else []
    baselines = named_checkpoints(named, argument="retain_model") if named else []
    check_plan(loader, [*runs, *baselines], data, plan)
    for baseline in baselines:
        retained = evaluate_checkpoint(loader, baseline, data, plan, folder / "retain_model")
    for run in runs:
        results[run.name] = evaluate_checkpoint(
            loader, run, data, plan, folder / run.name, retained=retained, probes=probes
        )
    loader.let_go()
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return {}
    _write(args, results, retained)
    print_table(results, retained)
    print(f"Results: {args.output_dir}")
    return results


def load_sets(args: UnlearningArguments) -> "dict[str, Dataset]":
    """The rows that the arguments name, by role, as `load_roles` returns them."""
    from llmmix.unlearning.evaluation.sets import load_roles

    names = {"forget": args.forget, "retain": args.retain, "holdout": args.holdout}
    return load_roles(names, args.facts or [], config=args.dataset_config, max_rows=args.max_rows)


def _plan(args: UnlearningArguments) -> "Plan":
    from accelerate import PartialState

    from llmmix.checkpoints.adapters import named_checkpoint
    from llmmix.unlearning.evaluation.checkpoint import Plan
    from llmmix.unlearning.evaluation.probes import Relearning
    from llmmix.unlearning.evaluation.sampled_leaks import LeakOptions
    from llmmix.unlearning.evaluation.subject import MeasureOptions
    from llmmix.unlearning.evaluation.texts import unicode_words

    words = unicode_words if args.rouge_words == "unicode" else None
    measuring = MeasureOptions(
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop),
        rouge_tokenize=words,
        gradient_norms=args.gradient_norms,
        min_k=args.min_k,
        token_budget=args.token_budget,
        shared=PartialState().num_processes > 1,
    )
    leaking = LeakOptions(
        num_samples=args.leak_samples,
        n=args.leak_n,
        threshold=args.leak_threshold,
        scorer=args.leak_scorer,
        tokenize=words,
        max_new_tokens=args.leak_max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        token_budget=args.token_budget,
    )
    relearning = Relearning(
        steps=args.relearn_steps,
        learning_rate=args.relearn_learning_rate,
        batch_size=args.relearn_batch_size,
        share=args.relearn_share,
        seed=args.seed,
    )
    return Plan(
        measuring,
        leaking,
        relearning,
        original=named_checkpoint(args.original, "original"),
        fluency=_function(args.fluency) if args.fluency else None,
        open_unlearning=args.compat is not None,
        sets={name: getattr(args, name) for name in SETS},
    )


def _check(args: UnlearningArguments) -> None:
    from llmmix.unlearning.evaluation.probes import PROBES

    if args.retain_model and args.retain_log:
        raise ValueError("Give `retain_model` or its `retain_log`, not both.")
    if args.compat not in (None, "open_unlearning"):
        raise ValueError(f"`compat` must be 'open_unlearning', got {args.compat!r}.")
    if args.rouge_words not in ("latin", "unicode"):
        raise ValueError(f"`rouge_words` must be 'latin' or 'unicode', got {args.rouge_words!r}.")
    if unknown := sorted(set(args.probes or ()) - set(PROBES)):
        raise ValueError(f"`probes`: no {unknown[0]!r}; there are {', '.join(PROBES)}.")
    for name in ("leak_threshold", "min_k"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"`{name}` must lie in (0, 1], got {getattr(args, name)}.")
    counts = dict.fromkeys(("leak_max_new_tokens", "max_new_tokens", "token_budget", "max_rows"), 1)
    for name, least in (counts | {"leak_samples": 0}).items():
        given = getattr(args, name)
        if given is not None and given < least:
            raise ValueError(f"`{name}` must be {least} or more, got {given}.")
    if args.leak_n and max(args.leak_n) > args.leak_samples:
        raise ValueError(
            f"`leak_n` of {max(args.leak_n)} needs as many samples; `leak_samples` is "
            f"{args.leak_samples}. Raise it."
        )


def _function(path: str) -> Callable:
    module, _, name = path.partition(":")
    sys.path.append(os.getcwd())  # where the user's module is; what is installed comes first
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`fluency` must be module:function, got {path}: {error}.") from error


def _write(
    args: UnlearningArguments, results: dict[str, dict[str, Any]], retained: dict[str, Any] | None
) -> None:
    from llmmix.unlearning.evaluation.document import write_summary
    from llmmix.unlearning.evaluation.open_unlearning import write_open_unlearning

    folder = Path(args.output_dir)
    for name, result in results.items() if args.compat else ():
        write_open_unlearning(folder / name / "open_unlearning", result["open_unlearning"])
    write_summary(folder / "summary.json", results, retained)


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((UnlearningArguments,), __file__))
