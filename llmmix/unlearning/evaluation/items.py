"""What unlearning is judged by, item by item: one record a row, from which all metrics follow.

The measurements that run a model (likelihoods, answers, gradients) go through `Subject.keep`, where
a caller may keep them: what is kept is not measured again, and the model then not even loaded.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from llmmix.unlearning.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    min_k,
    min_k_plus_plus,
    zlib_score,
)
from llmmix.unlearning.evaluation.scores import (
    TOKEN_BUDGET,
    AnswerScore,
    alternative_nlls,
    gradient_norms,
    score_answers,
)
from llmmix.unlearning.evaluation.texts import (
    Tokenize,
    generate_greedily,
    has_words,
    perplexities,
    repetition,
    rouge,
    says,
)

METRIC_VERSION = 1  # raise it when a measurement or the definition of a metric changes

Keep = Callable[[str, str, dict, Callable[[], Any]], Any]


def measure_anew(kind: str, data: str, options: dict, compute: Callable[[], Any]) -> Any:
    """Keep nothing; any other `Keep` returns what it has for (kind, data, options), or computes."""
    return compute()


@dataclass
class Subject:
    """A model to measure.

    Attributes:
        tokenizer: Its tokenizer.
        load: Returns the model; called where something is to be measured.
        keep: Where measurements are kept, each a JSON value.
    """

    tokenizer: Any
    load: Callable[[], Any]
    keep: Keep = measure_anew


@dataclass(frozen=True)
class MeasureOptions:
    """How items are measured.

    Attributes:
        generate: Whether to let the model answer, greedily.
        max_new_tokens: Of an answer.
        stop: Strings before which an answer is cut.
        rouge_tokenize: See `llmmix.forgetting.texts.rouge`.
        gradient_norms: Whether to take the norm of each item's gradient.
        min_k: Share of the least probable tokens that Min-K attacks look at.
        token_budget: Tokens of a batch.
        shared: Whether all processes take part; each then gets all results.
    """

    generate: bool = True
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    rouge_tokenize: Tokenize | None = None
    gradient_norms: bool = False
    min_k: float = 0.4
    token_budget: int = TOKEN_BUDGET
    shared: bool = False


def measure_items(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[dict]:
    """Measure every row.

    Args:
        subject: The model.
        rows: Rows with `prompt` and `answer`, as `unlearning.qa.read_rows` gives them, and any of
            `paraphrased_answer`, `perturbed_answer` (a list) and `secret`.
        options: How.

    Returns:
        A record a row. A number that cannot be had is None: `nll` where the row exceeds the
        context, `generation` where it has no prompt or leaves no room for an answer.
    """
    scores = scores_of(subject, rows, options)
    correct, wrong = _truth_nlls(subject, rows, options, scores)
    said = generations_of(subject, rows, options)
    norms = [None] * len(rows)
    if options.gradient_norms:
        norms = _kept(
            subject,
            "gradient_norms",
            rows,
            {},
            lambda: gradient_norms(subject.load(), subject.tokenizer, rows, shared=options.shared),
        )
    secrets = rows["secret"][:] if "secret" in rows.column_names else [None] * len(rows)
    questions = rows["question"][:] if "question" in rows.column_names else rows["prompt"][:]
    eos = subject.tokenizer.eos_token_id
    columns = (questions, rows["answer"][:], secrets, scores, correct, wrong, said, norms)
    records = []
    for number, row in enumerate(zip(*columns, strict=True)):
        question, answer, secret, score, correct_nll, wrong_nlls, text, norm = row
        record = {"row": number, "question": question, "answer": answer}
        record |= _likelihoods(score, answer, eos, options.min_k)
        record |= {"correct_nll": correct_nll, "wrong_nlls": wrong_nlls, "gradient_norm": norm}
        records.append(record | _likeness(text, answer, secret, options.rouge_tokenize))
    return records


def scores_of(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[AnswerScore | None]:
    """`llmmix.forgetting.scores.score_answers`, kept."""

    def compute() -> list[dict | None]:
        scores = score_answers(
            subject.load(),
            subject.tokenizer,
            rows,
            token_budget=options.token_budget,
            shared=options.shared,
        )
        return [
            None if s is None else {name: x.tolist() for name, x in vars(s).items()} for s in scores
        ]

    kept = _kept(subject, "scores", rows, {}, compute)
    return [
        None if given is None else AnswerScore(**{k: np.array(x) for k, x in given.items()})
        for given in kept
    ]


def generations_of(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[str | None]:
    """Greedy answers, kept; None for rows without a prompt, and for all where none is wanted."""
    prompts = rows["prompt"][:]
    if not options.generate or not any(prompts):
        return [None] * len(rows)
    given = {"max_new_tokens": options.max_new_tokens, "stop": list(options.stop)}

    def compute() -> list[str | None]:
        shared = {"token_budget": options.token_budget, "shared": options.shared}
        return generate_greedily(subject.load(), subject.tokenizer, prompts, **given, **shared)

    return _kept(subject, "generations", rows, given, compute)


def perplexities_under(
    original: Subject, rows: Dataset, texts: list[str | None], options: MeasureOptions
) -> list[float | None]:
    """Perplexity of generated texts under another model, kept."""
    asked = Dataset.from_dict({"prompt": rows["prompt"][:], "answer": texts})

    def compute() -> list[float | None]:
        model = original.load()
        prompts = asked["prompt"][:]
        return perplexities(model, original.tokenizer, prompts, texts, shared=options.shared)

    return _kept(original, "perplexities", asked, {}, compute)


def data_digest(rows: Dataset) -> str:
    """Of what is asked and answered: prompts, answers, and what else of a row is measured."""
    names = ("prompt", "answer", "paraphrased_answer", "perturbed_answer", "secret")
    columns = {name: rows[name][:] for name in names if name in rows.column_names}
    return hashlib.blake2b(json.dumps(columns).encode(), digest_size=8).hexdigest()


def _kept(subject: Subject, kind: str, rows: Dataset, options: dict, compute) -> Any:
    return subject.keep(kind, data_digest(rows), options, compute)


def _truth_nlls(subject: Subject, rows: Dataset, options: MeasureOptions, scores) -> tuple:
    """NLLs of the right answer and of the wrong ones, as truth ratios compare them.

    The right answer is the paraphrased one where a row has one, and the answer itself elsewhere.
    """
    columns = rows.column_names
    own = [None if score is None else score.nll for score in scores]
    if "perturbed_answer" not in columns:
        return own, [[] for _ in own]
    perturbed = [[p] if isinstance(p, str) else p or [] for p in rows["perturbed_answer"]]
    rephrased = (
        rows["paraphrased_answer"][:] if "paraphrased_answer" in columns else [None] * len(rows)
    )
    rephrased = [r[0] if isinstance(r, list) and r else r for r in rephrased]
    asked = [
        [*([right] if right and right.strip() else []), *wrong]
        for right, wrong in zip(rephrased, perturbed, strict=True)
    ]

    def compute() -> list[list[float | None]]:
        model, prompts = subject.load(), rows["prompt"][:]
        given = {"token_budget": options.token_budget, "shared": options.shared}
        return alternative_nlls(model, subject.tokenizer, prompts, asked, **given)

    found = _kept(subject, "alternatives", rows, {}, compute)
    correct, wrong = [], []
    for nlls, right, nll in zip(found, rephrased, own, strict=True):
        with_right = bool(right and right.strip())
        correct.append(nlls[0] if with_right else nll)
        wrong.append([n for n in nlls[with_right:] if n is not None])
    return correct, wrong


def _likelihoods(score: AnswerScore | None, answer: str, eos: int | None, k: float) -> dict:
    names = ("nll", "probability", "exact_memorization", "extraction_strength")
    names += ("min_k", "min_k_plus_plus", "zlib")
    if score is None:
        return {"tokens": 0, **dict.fromkeys(names)}
    bare = score.without_last(eos)
    values = (
        score.nll,
        float(np.exp(-score.nll)),
        exact_memorization(bare.labels, bare.predictions),
        extraction_strength(bare.labels, bare.predictions),
        min_k(bare.token_logps, k),
        min_k_plus_plus(bare.token_logps, bare.means, bare.variances, k),
        zlib_score(score.nll, answer),
    )
    return {"tokens": score.tokens, **dict(zip(names, values, strict=True))}


def _likeness(text: str | None, answer: str, secret: str | None, tokenize) -> dict:
    known = text is not None and has_words(answer, tokenize)
    scores = rouge(text, answer, tokenize) if known else dict.fromkeys(rouge("", "", tokenize))
    said = says(text, secret) if secret and text is not None else None
    repeated = None if text is None else repetition(text)
    return {"generation": text, **scores, "secret_said": said, "repetition": repeated}
