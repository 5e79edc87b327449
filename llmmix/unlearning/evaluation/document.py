"""Measure what a model has forgotten and what it has kept, in one document of metrics.

    result = evaluate_unlearning(model, tokenizer, {"forget": rows, "retain": rows}, retained=best)
    result["metrics"]["forget_quality"]["value"]

The sets are called by their roles: `forget`, `retain`, `holdout` (never trained on, like the forget
set in form), and any others, which hold facts to be kept. `retained` is the result of the same call
on a model trained without the forget set. A metric that cannot be had says why in its `reason`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.files import plain, read_json, write_whole
from llmmix.rows.messages import spoken
from llmmix.unlearning.evaluation.items import Item
from llmmix.unlearning.evaluation.passes import answer_items, ask_original, score_items
from llmmix.unlearning.evaluation.subject import (
    METRIC_VERSION,
    MeasureOptions,
    Subject,
    data_digest,
)
from llmmix.unlearning.evaluation.summary import APART, Fluency, summarize
from llmmix.unlearning.evaluation.texts import unicode_words
from llmmix.unlearning.qa import overlap, read_rows

LONG = ("items", "open_unlearning")  # left out of summaries


def evaluate_unlearning(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    *,
    retained: dict[str, Any] | None = None,
    original: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    fluency: Fluency | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model on sets of questions and answers.

    Args:
        model: A causal language model of transformers; its mode is put back at the end.
        tokenizer: The model's tokenizer.
        sets: Rows by role, in any format of `llmmix.unlearning.qa.read_rows`; `forget` is needed.
        retained: What this returned for a model trained without the forget set: its truth ratios
            give the forget quality, its membership AUC that of the privacy leakage.
        original: Model and tokenizer before unlearning, for the reference attack and perplexities.
        fluency: Scores texts, higher for more fluent ones, such as a classifier of gibberish.
        **options: Fields of `llmmix.unlearning.evaluation.subject.MeasureOptions`.

    Returns:
        `metrics`: by name a `value` (None with a `reason`), its `direction`, `n` and `interval`;
        `items`: the records of each set; `version`, `data` and `definitions`, which must agree
        where results are compared.

    Raises:
        ValueError: `sets` has no `forget`, the forget set shares questions with another set, or
            `retained` was measured on other data or by other definitions.
    """
    document, _ = evaluate_subject(
        Subject(tokenizer, lambda: model),
        {role: as_rows(rows, role, tokenizer) for role, rows in sets.items()},
        MeasureOptions(**options),
        retained=retained,
        original=None if original is None else Subject(original[1], lambda: original[0]),
        fluency=fluency,
    )
    return document


def as_rows(rows: Dataset, role: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows with `prompt` and `answer`; rows in another format are read.

    Args:
        rows: Rows in any format of `llmmix.unlearning.qa.read_rows`.
        role: Name of the rows, for errors.
        tokenizer: The tokenizer whose chat template asks the questions.
    """
    columns = set(rows.column_names)
    read = {"prompt", "answer"} <= columns and not columns & {"question", "completion", "text"}
    of_text = read and all(prompt == "" for prompt in rows["prompt"])  # read from `text`
    return rows if of_text else read_rows(rows, role, tokenizer)


def evaluate_subject(
    subject: Subject,
    sets: Mapping[str, Dataset],
    options: MeasureOptions,
    *,
    retained: dict[str, Any] | None = None,
    original: Subject | None = None,
    fluency: Fluency | None = None,
) -> tuple[dict[str, Any], dict[str, list[Item]]]:
    """`evaluate_unlearning` on rows that are read, of a model that is loaded when it is needed.

    Args:
        subject: The model.
        sets: Rows by role, as `as_rows` gives them.
        options: How items are measured.
        retained: The document of a model trained without the forget set.
        original: The model before unlearning.
        fluency: Scores texts, higher for more fluent ones.

    Returns:
        The document, and the items that it was made from.

    Raises:
        ValueError: `sets` has no `forget`, the forget set shares questions with another set, or
            `retained` was measured on other data or by other definitions.
    """
    if "forget" not in sets:
        raise ValueError(f"`sets` must hold `forget`, got {sorted(sets)}.")
    check_disjoint(sets)
    document: dict[str, Any] = {
        "version": METRIC_VERSION,
        "data": {role: data_digest(rows) for role, rows in sets.items()},
        "definitions": _definitions(options),
    }
    if retained is not None:
        check_comparable(document, retained)
    items = {role: score_items(subject, rows, options) for role, rows in sets.items()}
    for role, rows in sets.items():
        items[role] = answer_items(subject, rows, items[role], options)
    if original is not None:
        for role, rows in sets.items():
            items[role] = ask_original(original, rows, items[role], options, role in APART)
    document["metrics"] = summarize(items, document["data"], retained, fluency)
    document["items"] = {role: [item.record() for item in given] for role, given in items.items()}
    return document, items


def write_document(folder: Path, document: dict[str, Any]) -> None:
    """Write `items.jsonl`, with a line for each item, and `unlearning.json`, with all else."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(plain({"set": role, **record}), ensure_ascii=False) + "\n"
        for role, records in document["items"].items()
        for record in records
    ]
    write_whole(folder / "items.jsonl", "".join(lines))
    rest = {name: entry for name, entry in document.items() if name != "items"}
    write_whole(folder / "unlearning.json", json.dumps(plain(rest), indent=1))


def write_summary(
    file: Path, documents: Mapping[str, dict[str, Any]], retained: dict[str, Any] | None
) -> None:
    """Write several documents into one, without what is long in them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = {name: _brief(document) for name, document in documents.items()}
    summary = {"runs": shown, "retained": retained and _brief(retained)}
    write_whole(file, json.dumps(plain(summary), indent=1))


def _brief(document: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in document.items() if name not in LONG}


def read_document(path: str | Path) -> dict[str, Any]:
    """The document of an `unlearning.json`, given that file or its folder.

    Raises:
        FileNotFoundError: `path` is no file, and no folder with such a file.
        ValueError: The file is not whole JSON.
    """
    path = Path(path).expanduser()
    file = path / "unlearning.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"`retain_log`: no file {file}.")
    document = read_json(file)
    if document is None:
        raise ValueError(
            f"`retain_log`: {file} is no whole JSON document. Evaluate the retain model again, "
            "with `--retain_model`."
        )
    return document


def check_disjoint(sets: Mapping[str, Dataset]) -> None:
    """Refuse a forget set whose questions, or texts, stand in another set too.

    Args:
        sets: Rows by role, as `as_rows` gives them.

    Raises:
        ValueError: Another set holds a question or text of the forget set.
    """
    asked = {
        role: [
            prompt or answer for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True)
        ]
        for role, rows in sets.items()
    }
    for role in set(sets) - {"forget"}:
        if common := overlap(asked["forget"], asked[role]):
            first = spoken(common[0])
            raise ValueError(
                f"{len(common)} of {len(asked['forget'])} questions of `forget` stand in `{role}` "
                f"too (first: {first[:80]!r}). Take them out of one of the two."
            )


def check_comparable(result: dict[str, Any], retained: dict[str, Any]) -> None:
    """Refuse to compare with a result of another version, other forget rows or definitions.

    Args:
        result: A document, or its `version`, `data` and `definitions`.
        retained: The document to compare with.

    Raises:
        ValueError: `retained` is no document of this evaluation, or one of the three differs.
    """
    if not {"version", "data", "definitions", "metrics"} <= set(retained):
        raise ValueError(
            "`retain_log` (`retained`) is not a result of this evaluation: it lacks "
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
                f"`retain_log` (`retained`) was measured with another {what}: {theirs!r}, here "
                f"{ours!r}. Measure the retain model again, as this one is."
            )


def _definitions(options: MeasureOptions) -> dict[str, Any]:
    words = options.rouge_tokenize
    name = "latin" if words is None else "unicode" if words is unicode_words else words.__name__
    return {
        "truth_ratio": "closer_to_1_better on forget, true_better elsewhere; geometric",
        "min_k": options.min_k,
        "max_new_tokens": options.max_new_tokens,
        "stop": list(options.stop),
        "rouge_words": name,
    }
