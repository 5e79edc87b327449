"""Measure what a model has forgotten and what it has kept: one call, one document of metrics.

    result = evaluate_unlearning(model, tokenizer, {"forget": rows, "retain": rows}, retained=best)
    result["metrics"]["forget_quality"]["value"]

The sets are called by their roles: `forget`, `retain`, `holdout` (never trained on, like the forget
set in form), and any others, which hold facts to be kept. `retained` is the result of the same call
on a model trained without the forget set. A metric that cannot be had says why in its `reason`.
"""

from collections.abc import Callable, Mapping, Sequence

from datasets import Dataset

from llmmix.unlearning.evaluation.items import (
    METRIC_VERSION,
    MeasureOptions,
    Subject,
    data_digest,
    measure_items,
    perplexities_under,
    scores_of,
)
from llmmix.unlearning.evaluation.summary import (
    APART,
    fluency_metrics,
    membership_metrics,
    quality_metric,
    set_metrics,
    utility_metric,
)
from llmmix.unlearning.evaluation.texts import unicode_words
from llmmix.unlearning.qa import overlap, read_rows


def evaluate_unlearning(
    model,
    tokenizer,
    sets: Mapping[str, Dataset],
    *,
    retained: dict | None = None,
    original: tuple | None = None,
    fluency: Callable[[list[str]], Sequence[float]] | None = None,
    **options,
) -> dict:
    """Measure a model on sets of questions and answers.

    Args:
        model: A causal language model of transformers; its mode is put back at the end.
        tokenizer: Its tokenizer.
        sets: Rows by role, in any format of `llmmix.unlearning.qa.read_rows`; `forget` is needed.
        retained: What this returned for a model trained without the forget set: its truth ratios
            give the forget quality, its membership AUC that of the privacy leakage.
        original: Model and tokenizer before unlearning, for the reference attack and perplexities.
        fluency: Scores texts, higher for more fluent ones, such as a classifier of gibberish.
        **options: Fields of `llmmix.forgetting.items.MeasureOptions`.

    Returns:
        `metrics`: by name a `value` (None with a `reason`), its `direction`, `n` and `interval`;
        `items`: the records of each set; `version`, `data` and `definitions`, by which results are
        told to be comparable.

    Raises:
        ValueError: No forget set, one that shares questions with another set, or a `retained` of
            other data or definitions.
    """
    read = {role: as_rows(rows, role, tokenizer) for role, rows in sets.items()}
    subject = Subject(tokenizer, lambda: model)
    before = None if original is None else Subject(original[1], lambda: original[0])
    given = MeasureOptions(**options)
    return evaluate_subject(
        subject, read, given, retained=retained, original=before, fluency=fluency
    )


def as_rows(rows: Dataset, role: str, tokenizer) -> Dataset:
    """Rows with `prompt` and `answer`, read where they are not."""
    columns = set(rows.column_names)
    plain = {"prompt", "answer"} <= columns and not columns & {"question", "completion", "text"}
    return rows if plain else read_rows(rows, role, tokenizer)


def evaluate_subject(
    subject: Subject,
    sets: Mapping[str, Dataset],
    options: MeasureOptions,
    *,
    retained: dict | None = None,
    original: Subject | None = None,
    fluency: Callable[[list[str]], Sequence[float]] | None = None,
) -> dict:
    """`evaluate_unlearning` on rows that are read, of a model that is loaded when it is needed."""
    if "forget" not in sets:
        raise ValueError(f"`sets` must hold `forget`, got {sorted(sets)}.")
    check_disjoint(sets)
    result = {
        "version": METRIC_VERSION,
        "data": {role: data_digest(rows) for role, rows in sets.items()},
        "definitions": _definitions(options),
    }
    if retained is not None:
        check_comparable(result, retained)
    items = {role: measure_items(subject, rows, options) for role, rows in sets.items()}
    if original is not None:
        _add_original(items, sets, original, options)
    metrics: dict[str, dict] = {}
    for role, records in items.items():
        metrics |= set_metrics(role, records)
        metrics |= fluency_metrics(role, records, fluency)
    metrics["forget_quality"] = quality_metric(metrics["forget_truth_ratio"], retained)
    metrics["model_utility"] = utility_metric(metrics, [r for r in items if r not in APART])
    metrics |= membership_metrics(items, result["data"], retained)
    return result | {"metrics": metrics, "items": items}


def check_disjoint(sets: Mapping[str, Dataset]) -> None:
    """Refuse a forget set whose questions, or texts, stand in another set too.

    Raises:
        ValueError: How many do, and the first.
    """
    asked = {
        role: [
            prompt or answer for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True)
        ]
        for role, rows in sets.items()
    }
    for role in set(sets) - {"forget"}:
        if common := overlap(asked["forget"], asked[role]):
            first = common[0] if isinstance(common[0], str) else common[0][-1]["content"]
            raise ValueError(
                f"{len(common)} of {len(asked['forget'])} questions of `forget` stand in `{role}` "
                f"too (first: {first[:80]!r}). Take them out of one of the two."
            )


def check_comparable(result: dict, retained: dict) -> None:
    """Refuse to compare with a result of another version, other forget rows or definitions.

    Raises:
        ValueError: What differs.
    """
    if not {"version", "data", "definitions", "metrics"} <= set(retained):
        raise ValueError(
            "`retained` is not a result of this evaluation: it lacks "
            f"{sorted({'version', 'data', 'definitions', 'metrics'} - set(retained))}."
        )
    found = {
        "metric version": (retained["version"], result["version"]),
        "forget set": (retained["data"].get("forget"), result["data"]["forget"]),
        "definitions": (retained["definitions"], result["definitions"]),
    }
    for what, (theirs, ours) in found.items():
        if theirs != ours:
            raise ValueError(
                f"`retained` was measured with another {what}: {theirs!r}, here {ours!r}. Measure "
                "the retain model again, as this one is."
            )


def _definitions(options: MeasureOptions) -> dict:
    words = options.rouge_tokenize
    name = "latin" if words is None else "unicode" if words is unicode_words else words.__name__
    return {
        "truth_ratio": "closer_to_1_better on forget, true_better elsewhere; geometric",
        "min_k": options.min_k,
        "max_new_tokens": options.max_new_tokens,
        "stop": list(options.stop),
        "rouge_words": name,
    }


def _add_original(items: dict, sets: Mapping, original: Subject, options: MeasureOptions) -> None:
    """What the model before unlearning says of the items, and of the answers given now."""
    for role, records in items.items():
        scores = scores_of(original, sets[role], options) if role in APART else None
        texts = [record["generation"] for record in records]
        fluent = perplexities_under(original, sets[role], texts, options)
        for number, record in enumerate(records):
            record["perplexity"] = fluent[number]
            if scores is not None:
                score, nll = scores[number], record["nll"]
                known = score is not None and nll is not None
                record["reference_nll"] = nll - score.nll if known else None
