"""All that is measured of one checkpoint: its document, with leaks and probes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from llmmix.models import Checkpoint, Loader
from llmmix.rows.prompts import encode_answer, options_of
from llmmix.unlearning.evaluation.document import (
    as_rows,
    check_disjoint,
    evaluate_subject,
    write_document,
)
from llmmix.unlearning.evaluation.open_unlearning import open_unlearning_document
from llmmix.unlearning.evaluation.probes import Relearning, probe_metrics
from llmmix.unlearning.evaluation.sampled_leaks import LeakOptions, check_leaks, leak_metrics
from llmmix.unlearning.evaluation.subject import MeasureOptions, checkpoint_subject
from llmmix.unlearning.evaluation.summary import Fluency

PACKAGES = ("llmmix", "torch", "transformers", "datasets")  # whose versions documents state


@dataclass(frozen=True)
class Plan:
    """What is measured of every checkpoint of a run.

    Attributes:
        measuring: How items are measured.
        leaking: How leaks are sampled and counted.
        relearning: What the probe `relearn` does.
        original: The model before unlearning.
        fluency: Scores texts, higher for more fluent ones.
        open_unlearning: Whether to add that framework's document.
        sets: The flags that name the data, for the document.
    """

    measuring: MeasureOptions = field(default_factory=MeasureOptions)
    leaking: LeakOptions = field(default_factory=LeakOptions)
    relearning: Relearning = field(default_factory=Relearning)
    original: Checkpoint | None = None
    fluency: Fluency | None = None
    open_unlearning: bool = False
    sets: Mapping[str, Any] = field(default_factory=dict)


def check_plan(
    loader: Loader, checkpoints: Sequence[Checkpoint], data: Mapping[str, Dataset], plan: Plan
) -> None:
    """Refuse, before any model is loaded, rows and options that a measurement would refuse later.

    Args:
        loader: Loads the tokenizers.
        checkpoints: The models to be measured; the original is added.
        data: Rows by role, in any format of `llmmix.unlearning.qa.read_rows`.
        plan: What is measured.

    Raises:
        ValueError: Rows are of no known format, or stand in two sets; a model's chat template is
            missing or refuses messages; or `check_leaks` refuses the options.
    """
    original = [] if plan.original is None else [plan.original]
    for number, checkpoint in enumerate([*checkpoints, *original]):
        tokenizer = loader.tokenizer(checkpoint)
        sets = {role: as_rows(rows, role, tokenizer) for role, rows in data.items()}
        if not number:
            check_disjoint(sets)
            check_leaks(sets["forget"], plan.leaking)
        for role, rows in sets.items():
            for row, options in zip(rows.take(1), options_of(rows.take(1)), strict=True):
                try:
                    encode_answer(tokenizer, row["prompt"], row["answer"], options=options)
                except ValueError as error:
                    raise ValueError(f"`{role}` under {checkpoint.name}: {error}") from error


def evaluate_checkpoint(
    loader: Loader,
    checkpoint: Checkpoint,
    data: Mapping[str, Dataset],
    plan: Plan,
    folder: Path,
    *,
    retained: dict[str, Any] | None = None,
    probes: list[str] | None = None,
) -> dict[str, Any]:
    """The document of one checkpoint, which is written too.

    Args:
        loader: Loads models when they are needed.
        checkpoint: The model.
        data: Rows by role, in any format of `llmmix.unlearning.qa.read_rows`.
        plan: What is measured.
        folder: Where the document is written, and the samples for leaks are kept.
        retained: The document of the model trained without the forget set.
        probes: Probes, among `llmmix.unlearning.evaluation.probes.PROBES`; None leaves `probes` out
            of the document.

    Raises:
        ValueError: `evaluate_subject`, `leak_metrics` or `probe_metrics` refuses the data.
    """
    subject, original = checkpoint_subject(loader, checkpoint), None
    if plan.original is not None:
        original = checkpoint_subject(loader, plan.original)
    sets = {role: as_rows(rows, role, subject.tokenizer) for role, rows in data.items()}
    document, items = evaluate_subject(
        subject,
        sets,
        plan.measuring,
        retained=retained,
        original=original,
        fluency=plan.fluency,
    )
    fingerprint = loader.fingerprint(checkpoint)
    header = {
        "eval": "unlearning",
        "model": checkpoint.model,
        "adapter": checkpoint.adapter,
        "fingerprint": fingerprint,
        "versions": {package: version(package) for package in PACKAGES},
        "sets": dict(plan.sets),
        "rows": {role: len(rows) for role, rows in data.items()},
        "seed": plan.leaking.seed,
    }
    document["metrics"] |= leak_metrics(subject, sets["forget"], plan.leaking, folder, fingerprint)
    if probes is not None:
        document["probes"] = probe_metrics(
            probes,
            subject,
            sets["forget"],
            items["forget"],
            plan.measuring,
            plan.relearning,
            partial(checkpoint_subject, loader, checkpoint),
        )
    if plan.open_unlearning:
        logs = None if retained is None else retained.get("open_unlearning")
        document["open_unlearning"] = open_unlearning_document(
            items, subject.tokenizer, logs, plan.measuring.min_k
        )
    document = header | document
    if PartialState().is_main_process:
        write_document(folder, document)  # at once: another checkpoint may fail
    return document
