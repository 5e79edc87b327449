"""The passes that measure: each takes records of rows, and returns them with its part filled in.

    items = score_items(subject, rows, options)              how probable the answers are
    items = answer_items(subject, rows, items, options)      what the model says when asked
    items = ask_original(original, rows, items, options)     what the original model says of both

Whatever runs a model goes through `Subject.keep`, which may hold the measurement already.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from datasets import Dataset

from llmmix.rows.messages import text_of
from llmmix.rows.prompts import TEMPLATE_COLUMNS, encode, end_tokens, options_of
from llmmix.unlearning.evaluation.gradients import gradient_norms
from llmmix.unlearning.evaluation.items import Item
from llmmix.unlearning.evaluation.membership import min_k, min_k_plus_plus, zlib_score
from llmmix.unlearning.evaluation.memorization import exact_memorization, extraction_strength
from llmmix.unlearning.evaluation.scores import AnswerScore, alternative_nlls, score_answers
from llmmix.unlearning.evaluation.subject import MeasureOptions, Subject, data_digest
from llmmix.unlearning.evaluation.texts import (
    ROUGE_SCORES,
    generate_greedily,
    has_words,
    perplexities,
    repetition,
    rouge,
    says,
)


def measure_items(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[Item]:
    """Score every row and let the model answer it.

    Args:
        subject: The model.
        rows: Rows with `prompt` and `answer`, as `unlearning.qa.read_rows` gives them, and any of
            `paraphrased_answer`, `perturbed_answer` (a list) and `secret`.
        options: How items are measured.

    Returns:
        An item a row.
    """
    return answer_items(subject, rows, score_items(subject, rows, options), options)


def score_items(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[Item]:
    """The scoring pass: how probable the answers of each row are; nothing is generated.

    Arguments and result are those of `measure_items`.
    """
    scores = _scores(subject, rows, options)
    correct, wrong = _truth_nlls(subject, rows, options, scores)
    norms = _gradient_norms(subject, rows, options)
    secrets = rows["secret"][:] if "secret" in rows.column_names else [None] * len(rows)
    secrets = [text_of(secret) or None for secret in secrets]
    questions = rows["question"][:] if "question" in rows.column_names else rows["prompt"][:]
    columns = (questions, rows["answer"][:], scores, correct, wrong, norms, secrets)
    ends = end_tokens(subject.tokenizer)
    items = []
    for row, (question, answer, score, right, wrongs, norm, secret) in enumerate(
        zip(*columns, strict=True)
    ):
        item = Item(
            row,
            question,
            answer,
            correct_nll=right,
            wrong_nlls=wrongs,
            gradient_norm=norm,
            secret=secret,
        )
        items.append(item if score is None else _with_likelihoods(item, score, ends, options.min_k))
    return items


def answer_items(
    subject: Subject, rows: Dataset, items: Sequence[Item], options: MeasureOptions
) -> list[Item]:
    """The generating pass: what the model answers, and how close that is to the right answer.

    Args:
        subject: The model.
        rows: The rows of the items.
        items: What `score_items` returned.
        options: How items are measured.
    """
    said = _generations(subject, rows, options)
    return [
        item if text is None else _with_answer(item, text, options)
        for item, text in zip(items, said, strict=True)
    ]


def ask_original(
    original: Subject,
    rows: Dataset,
    items: Sequence[Item],
    options: MeasureOptions,
    reference: bool = True,
) -> list[Item]:
    """Score the rows, and the answers given now, under the model before unlearning.

    Args:
        original: The model before unlearning.
        rows: The rows of the items.
        items: What `answer_items` returned.
        options: How items are measured.
        reference: Whether to fill `reference_nll` in too.
    """
    scores = _scores(original, rows, options) if reference else [None] * len(items)
    fluent = _perplexities(original, rows, [item.generation for item in items], options)
    asked = ("perplexity", "reference_nll") if reference else ("perplexity",)
    found = []
    for item, score, perplexity in zip(items, scores, fluent, strict=True):
        less = None if score is None or item.nll is None else item.nll - score.nll
        found.append(replace(item, perplexity=perplexity, reference_nll=less, under_original=asked))
    return found


def _scores(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[AnswerScore | None]:
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

    kept = subject.keep("scores", data_digest(rows), {}, compute)
    return [
        None if given is None else AnswerScore(**{k: np.array(x) for k, x in given.items()})
        for given in kept
    ]


def _generations(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[str | None]:
    """Greedy answers; None for rows without a prompt, and for all where none is wanted."""
    prompts = rows["prompt"][:]
    if not options.generate or not any(prompts):
        return [None] * len(rows)

    def compute() -> list[str | None]:
        model, tokenizer = subject.load(), subject.tokenizer
        return generate_greedily(
            model,
            tokenizer,
            [
                encode(tokenizer, prompt, options=asked) if prompt else ""
                for prompt, asked in zip(prompts, options_of(rows), strict=True)
            ],
            max_new_tokens=options.max_new_tokens,
            stop=options.stop,
            token_budget=options.token_budget,
            shared=options.shared,
        )

    given = {"max_new_tokens": options.max_new_tokens, "stop": list(options.stop)}
    return subject.keep("generations", data_digest(rows), given, compute)


def _perplexities(
    original: Subject, rows: Dataset, texts: list[str | None], options: MeasureOptions
) -> list[float | None]:
    given = [name for name in ("prompt", *TEMPLATE_COLUMNS) if name in rows.column_names]
    asked = rows.select_columns(given).add_column("answer", texts)

    def compute() -> list[float | None]:
        return perplexities(
            original.load(),
            original.tokenizer,
            rows["prompt"][:],
            texts,
            options=options_of(rows),
            shared=options.shared,
        )

    return original.keep("perplexities", data_digest(asked), {}, compute)


def _gradient_norms(subject: Subject, rows: Dataset, options: MeasureOptions) -> list[float | None]:
    if not options.gradient_norms:
        return [None] * len(rows)

    def compute() -> list[float | None]:
        return gradient_norms(subject.load(), subject.tokenizer, rows, shared=options.shared)

    return subject.keep("gradient_norms", data_digest(rows), {}, compute)


def _truth_nlls(
    subject: Subject, rows: Dataset, options: MeasureOptions, scores: list[AnswerScore | None]
) -> tuple[list[float | None], list[list[float]]]:
    """NLLs of the right answer and of the wrong ones, as truth ratios compare them.

    The right answer is the paraphrased one where a row has one, and the answer itself elsewhere.
    """
    columns = rows.column_names
    own = [None if score is None else score.nll for score in scores]
    if "perturbed_answer" not in columns:
        return own, [[] for _ in own]
    perturbed = [
        [text_of(text) for text in (p if isinstance(p, list) else [p])]
        for p in rows["perturbed_answer"]
    ]
    given = rows["paraphrased_answer"][:] if "paraphrased_answer" in columns else [None] * len(own)
    rephrased = [text_of((r or [None])[0] if isinstance(r, list) else r) for r in given]
    asked = [
        [*([right] if right.strip() else []), *wrong]
        for right, wrong in zip(rephrased, perturbed, strict=True)
    ]

    def compute() -> list[list[float | None]]:
        return alternative_nlls(
            subject.load(),
            subject.tokenizer,
            rows["prompt"][:],
            asked,
            options=options_of(rows),
            token_budget=options.token_budget,
            shared=options.shared,
        )

    found = subject.keep("alternatives", data_digest(rows), {}, compute)
    correct, wrong = [], []
    for nlls, right, nll in zip(found, rephrased, own, strict=True):
        with_right = bool(right.strip())
        correct.append(nlls[0] if with_right else nll)
        wrong.append([n for n in nlls[with_right:] if n is not None])
    return correct, wrong


def _with_likelihoods(item: Item, score: AnswerScore, ends: Collection[int], k: float) -> Item:
    bare = score.without_last(ends)
    least = None
    if bare.means is not None and bare.variances is not None:
        least = min_k_plus_plus(bare.token_logps, bare.means, bare.variances, k)
    return replace(
        item,
        score=score,
        tokens=score.tokens,
        nll=score.nll,
        probability=float(np.exp(-score.nll)),
        exact_memorization=exact_memorization(bare.labels, bare.predictions),
        extraction_strength=extraction_strength(bare.labels, bare.predictions),
        min_k=min_k(bare.token_logps, k),
        min_k_plus_plus=least,
        zlib=zlib_score(score.nll, item.answer),
    )


def _with_answer(item: Item, text: str, options: MeasureOptions) -> Item:
    words, likeness = options.rouge_tokenize, dict.fromkeys(ROUGE_SCORES)
    if has_words(item.answer, words):
        likeness |= rouge(text, item.answer, words)
    return replace(
        item,
        generation=text,
        secret_said=says(text, item.secret) if item.secret else None,
        repetition=repetition(text),
        rouge1_recall=likeness["rouge1_recall"],
        rougeL_f1=likeness["rougeL_f1"],
        rougeL_recall=likeness["rougeL_recall"],
    )
