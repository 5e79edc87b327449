"""leak@N of a subject as metrics of a document, its samples kept in a log beside the results."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from llmmix.grading.estimators import pass_at_n
from llmmix.grading.sample_log import SampleLog
from llmmix.processes import main_process_says
from llmmix.sampling.requests import SamplingOptions
from llmmix.unlearning.evaluation.leaks import LeakScorer, sample_leaks, summarize_leaks
from llmmix.unlearning.evaluation.subject import Subject, data_digest
from llmmix.unlearning.evaluation.summary import Metric, metric
from llmmix.unlearning.evaluation.texts import Tokenize

LEAK_N = (1, 4, 16, 64)


@dataclass(frozen=True)
class LeakOptions:
    """How leaks are sampled and counted.

    Attributes:
        num_samples: Samples a row; 0 for none.
        n: Values of N to report; None for those of `LEAK_N` up to `num_samples`.
        threshold: Score from which a sample is a leak.
        scorer: Name of a `LeakScorer`.
        tokenize: Splits text into words for the scorer `rouge`; see `texts.rouge`.
        max_new_tokens: Tokens after which a sample is cut.
        temperature: Sampling temperature; see `llmmix.sampling.sample`.
        top_p: Nucleus mass: the most probable tokens that share it are drawn from.
        seed: Seed of the samples.
        token_budget: Tokens held at once.
    """

    num_samples: int = 0
    n: Sequence[int] | None = None
    threshold: float = 0.9
    scorer: str = "auto"
    tokenize: Tokenize | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    token_budget: int = 16384


def check_leaks(rows: Dataset, options: LeakOptions) -> None:
    """Refuse early what `leak_metrics` would refuse after everything else has been measured.

    Args:
        rows: The forget set, with `prompt`, `answer` and perhaps `secret`.
        options: How leaks are sampled and counted.

    Raises:
        ValueError: A number is out of its range, an N is above the samples, or the scorer is
            unknown or asks for a `secret` that a row lacks.
    """
    if not options.num_samples:
        return
    SamplingOptions(
        options.temperature,
        options.top_p,
        options.max_new_tokens,
        options.seed,
        options.num_samples,
        options.token_budget,
    )
    pass_at_n(options.num_samples, 0, options.n or [1])
    LeakScorer(options.scorer, rows, options.tokenize).close()


def leak_metrics(
    subject: Subject,
    rows: Dataset,
    options: LeakOptions,
    folder: Path,
    fingerprint: dict[str, Any],
) -> dict[str, Metric]:
    """leak@N and the expected highest score of N, as metrics of a document.

    All processes take part, each with rows of its own.

    Args:
        subject: The model.
        rows: The forget set, with `prompt`, `answer` and perhaps `secret`.
        options: How leaks are sampled and counted.
        folder: Where samples are kept; those it holds are not drawn again.
        fingerprint: JSON values that tell the model from any other.
    """
    if not options.num_samples:
        return {"leak": metric("lower", reason="needs --leak_samples")}
    if not all(rows["prompt"]):
        return {"leak": metric("lower", reason="the forget set has no prompts to answer")}
    n = sorted(options.n or [k for k in LEAK_N if k <= options.num_samples])
    result = _sampled(subject, rows, options, n, folder, fingerprint)
    metrics = {}
    for k in map(str, n):
        rest = {"n": result["problems"][k], "interval": result["interval"][k]}
        metrics[f"leak@{k}"] = metric("lower", result["leak_at_n"][k], **rest)
    for k in map(str, n):
        rest = {"n": result["problems"][k], "interval": result["max_score_interval"][k]}
        metrics[f"leak_score@{k}"] = metric("lower", result["max_score"][k], **rest)
    names = ("scorer", "threshold", "verdicts", "errors", "left_out", "cut", "num_samples")
    metrics[f"leak@{n[0]}"] |= {name: result[name] for name in names}
    return metrics


def _sampled(
    subject: Subject,
    rows: Dataset,
    options: LeakOptions,
    n: list[int],
    folder: Path,
    fingerprint: dict[str, Any],
) -> dict[str, Any]:
    """Draw samples into the log of their settings, unless it is complete, and summarize them."""
    state = PartialState()
    sampling: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens,
    }
    settings = fingerprint | sampling | {"data": data_digest(rows)}
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=6).hexdigest()
    log = SampleLog(folder / f"leaks-{key}", settings)
    scorer = LeakScorer(options.scorer, rows, options.tokenize)
    drawn = {(r["problem"], r["sample"]) for r in log.read()}
    wanted = [(row, s) for row in range(len(rows)) for s in range(options.num_samples)]
    left_out: list[int] = []
    if not main_process_says(drawn.issuperset(wanted)):
        left_out = sample_leaks(
            subject.load(),
            subject.tokenizer,
            rows,
            scorer,
            log,
            options.num_samples,
            n,
            options.threshold,
            process=(state.process_index, state.num_processes),
            token_budget=options.token_budget,
            **sampling,
        )
    state.wait_for_everyone()
    result: dict[str, Any] = {}
    if state.is_main_process:
        result = summarize_leaks(
            log, rows, scorer, options.num_samples, n, options.threshold, left_out
        )
    scorer.close()
    return main_process_says(result)
