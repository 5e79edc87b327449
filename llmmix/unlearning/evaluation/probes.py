"""Probes: whether what an unlearned model has forgotten can be brought back.

    relearn      a few steps of training on a part of the forgotten rows; measured on the others
    paraphrase   the same questions in other words
    int8, int4   weights rounded to nearest, which undoes changes smaller than a step

The copies that are relearnt or rounded are made in `copies`; what comes back is measured as the
model was measured before.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.rows.messages import text_of
from llmmix.rows.prompts import TEMPLATE_COLUMNS
from llmmix.unlearning.evaluation.copies import check_relearning, quantized, relearn
from llmmix.unlearning.evaluation.items import Item
from llmmix.unlearning.evaluation.passes import measure_items
from llmmix.unlearning.evaluation.subject import Change, MeasureOptions, Subject, data_digest
from llmmix.unlearning.evaluation.summary import set_metrics
from llmmix.unlearning.qa import question_prompt

PROBES = ("relearn", "paraphrase", "int8", "int4")


@dataclass(frozen=True)
class Relearning:
    """What the probe `relearn` does.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Constant learning rate of AdamW.
        batch_size: Rows a step.
        share: Share of the forget set that is relearnt; the rest is measured.
        seed: Seed of the choice of rows, of their order and of dropout.
    """

    steps: int = 10
    learning_rate: float = 1e-5
    batch_size: int = 4
    share: float = 0.5
    seed: int = 0


def probe_metrics(
    names: Sequence[str],
    subject: Subject,
    rows: Dataset,
    items: Sequence[Item],
    options: MeasureOptions,
    relearning: Relearning,
    changed: Callable[[Change], Subject],
) -> dict[str, dict[str, Any]]:
    """Metrics of the forget set before and after each probe, on the same rows.

    Args:
        names: Probes, among `PROBES`.
        subject: The model.
        rows: The forget set, with `prompt` and `answer`.
        items: The items of the rows before any probe.
        options: How items are measured.
        relearning: What the probe `relearn` does.
        changed: Returns the subject of the model after a change.

    Returns:
        For each probe, the number of `rows`, and by metric the values `before` and `after`.

    Raises:
        ValueError: A row has no `paraphrased_question`, `relearning` leaves no row to learn or to
            measure, or most weights of the model are in layers that cannot be rounded.
    """
    columns = ("question", "prompt", "answer", "secret", *TEMPLATE_COLUMNS)
    asked = rows.select_columns([name for name in columns if name in rows.column_names])
    found = {}
    for name in names:
        probed, places, questions = subject, list(range(len(rows))), asked
        if name == "paraphrase":
            questions = paraphrased(rows, subject.tokenizer)
        elif name == "relearn":
            learned, places = relearning_parts(len(rows), relearning.share, relearning.seed)
            probed = changed(_relearnt(rows.select(learned), subject.tokenizer, relearning))
        else:
            probed = changed(_rounded(name))
        chosen = questions.select(places).select_columns(asked.column_names)
        after = set_metrics("forget", measure_items(probed, chosen, options))
        before = set_metrics("forget", [items[place] for place in places])
        found[name] = {
            "rows": len(places),
            "before": {key: before[key]["value"] for key in after},
            "after": {key: entry["value"] for key, entry in after.items()},
        }
    return found


def check_probes(names: Sequence[str], rows: Dataset, relearning: Relearning) -> None:
    """Refuse early what a probe would refuse after everything else has been measured.

    Raises:
        ValueError: A row has no `paraphrased_question`, or `relearning` leaves no row to learn or
            to measure, or cannot train.
    """
    if "paraphrase" in names:
        check_paraphrases(rows)
    if "relearn" in names:
        relearning_parts(len(rows), relearning.share, relearning.seed)
        check_relearning(relearning.steps, relearning.learning_rate, relearning.batch_size)


def _relearnt(rows: Dataset, tokenizer: PreTrainedTokenizerBase, relearning: Relearning) -> Change:
    def learn(model: PreTrainedModel) -> PreTrainedModel:
        return relearn(
            model,
            tokenizer,
            rows,
            steps=relearning.steps,
            learning_rate=relearning.learning_rate,
            batch_size=relearning.batch_size,
            seed=relearning.seed,
        )

    identity = {
        "probe": "relearn",
        "rows": data_digest(rows),
        "steps": relearning.steps,
        "learning_rate": relearning.learning_rate,
        "batch_size": relearning.batch_size,
        "seed": relearning.seed,
    }
    return Change(identity, learn)


def _rounded(name: str) -> Change:
    bits = int(name.removeprefix("int"))
    return Change({"probe": name}, lambda model: quantized(model, bits))


def relearning_parts(count: int, share: float = 0.5, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows to relearn, and rows to measure on, each in order.

    Args:
        count: How many rows there are.
        share: Share of the rows to relearn.
        seed: Seed of the choice.

    Raises:
        ValueError: `share` leaves one part empty.
    """
    learned = round(share * count)
    if not 0 < learned < count:
        raise ValueError(
            f"`relearn_share` (`share`) of {share} parts {count} rows into {learned} to relearn "
            f"and {count - learned} to measure on; each needs one."
        )
    order = list(range(count))
    random.Random(f"relearn {seed}").shuffle(order)
    return sorted(order[:learned]), sorted(order[learned:])


def paraphrased(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows with their `paraphrased_question` asked in place of the question.

    Raises:
        ValueError: A row has no `paraphrased_question`.
    """
    asked = check_paraphrases(rows)
    prompts = [question_prompt(tokenizer, question) for question in asked]
    rows = rows.remove_columns({"prompt", "question"} & set(rows.column_names))
    return rows.add_column("question", asked).add_column("prompt", prompts)


def check_paraphrases(rows: Dataset) -> list[str]:
    """The `paraphrased_question` of each row.

    Raises:
        ValueError: A row has no `paraphrased_question`.
    """
    column = "paraphrased_question"
    given = rows[column][:] if column in rows.column_names else [None] * len(rows)
    asked = [text_of(question) for question in given]
    if missing := sum(not question.strip() for question in asked):
        raise ValueError(
            f"The probe 'paraphrase' needs a `{column}` in every row; {missing} of {len(rows)} "
            "have none. Add the column, or leave the probe out."
        )
    return asked
