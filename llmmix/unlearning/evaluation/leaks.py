"""leak@N: the chance that at least one of N sampled answers gives the forgotten text away.

    leak@N = 1 - C(n - c, N) / C(n, N)                 c of n samples score `threshold` or more
    E max  = sum_i s_(i) C(i - 1, N - 1) / C(n, N)     s_(1) <= ... <= s_(n); the highest of N

A greedy answer says little about what a model would still say when it is asked again and again. The
score of a sample is the ROUGE-L recall of the reference, or, where rows carry a `secret`, whether
it is said; or a verifier's verdict. Both estimators draw N of the n samples without replacement,
and are unbiased.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike
from scipy.special import gammaln
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.grading.estimators import bootstrap_interval
from llmmix.grading.evaluation import evaluate, judge_again
from llmmix.grading.sample_log import SampleLog
from llmmix.grading.summary import summarize
from llmmix.grading.verify import Verifier
from llmmix.rows.messages import text_of
from llmmix.unlearning.evaluation.texts import Tokenize, rouge, says

if TYPE_CHECKING:
    from vllm import LLM

SCORERS = ("auto", "extraction", "rouge")


class LeakScorer:
    """Scores how much of its reference a sample gives away, in [0, 1].

    Args:
        name: One of `SCORERS`, a verifier's name or a module:function, which
            `llmmix.grading.verify.Verifier` takes. `auto` is `extraction` where every row has a
            `secret`, else `rouge`.
        rows: What is to be scored, with `answer` and perhaps `secret`.
        tokenize: Splits text into words for `rouge`; see `texts.rouge`.

    Attributes:
        name: The scorer that is used; never `auto`.
        references: What each row's samples are scored against: its `secret` or its `answer`.

    Raises:
        ValueError: `name` is `extraction` and a row has no `secret`, or no verifier has that name.
    """

    def __init__(self, name: str, rows: Dataset, tokenize: Tokenize | None = None):
        has_column = "secret" in rows.column_names
        secrets = [text_of(secret) for secret in rows["secret"]] if has_column else [""] * len(rows)
        missing = sum(not secret.strip() for secret in secrets)
        if name == "auto":
            name = "rouge" if missing else "extraction"
        if name == "extraction" and missing:
            raise ValueError(
                f"`leak_scorer` (`scorer`) 'extraction' needs a `secret` in every row; {missing} "
                f"of {len(rows)} have none. Add the column, or use 'rouge'."
            )
        self.name = name
        self.references = secrets if name == "extraction" else list(rows["answer"])
        self._verifier = None if name in SCORERS else _verifier(name)
        self._of_text = lru_cache(100_000)(self._scorer(tokenize))

    def _scorer(self, tokenize: Tokenize | None) -> Callable[[str, str], float]:
        if self.name == "extraction":
            return lambda text, reference: float(says(text, reference))
        return lambda text, reference: rouge(text, reference, tokenize)["rougeL_recall"]

    def verifier(self, threshold: float) -> Verifier:
        """The verifier that judges samples: "right" stands for a leak.

        Args:
            threshold: Score from which a sample is a leak; a verifier's verdict needs none.
        """
        if self._verifier is not None:
            return self._verifier

        def leaks(text: str, reference: str) -> bool:
            return self._of_text(text, reference) >= threshold

        leaks.__qualname__ = f"{self.name} >= {threshold:g}"
        return Verifier(leaks)

    def close(self) -> None:
        """End the processes of a verifier."""
        if self._verifier is not None:
            self._verifier.close()

    def score(self, record: dict[str, Any]) -> float:
        """The score of a line of the log that has its verdict; NaN where judging it failed."""
        if record["verdict"] == "failed":  # scoring it here would have no time limit
            return float("nan")
        if self._verifier is not None:
            return record["verdict"] == "right"
        return self._of_text(record["completion"], record["answer"])


def _verifier(name: str) -> Verifier:
    try:
        return Verifier(name)
    except ValueError as error:
        message = str(error).replace("`verifier`", "`leak_scorer` (`scorer`)")
        raise ValueError(message) from error


def leak_at_n(
    model: "PreTrainedModel | LLM",
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    num_samples: int = 64,
    n: Sequence[int] = (1, 4, 16, 64),
    threshold: float = 0.9,
    scorer: str | LeakScorer = "auto",
    log: SampleLog | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Sample answers to the prompts of rows, and estimate how often N of them give one away.

    Args:
        model: A causal language model, or a `vllm.LLM`.
        tokenizer: The model's tokenizer.
        rows: Rows with `prompt`, `answer` and perhaps `secret`.
        num_samples: Samples a row.
        n: The N to report; those above `num_samples` are an error.
        threshold: Score from which a sample is a leak; a verifier's verdict needs none.
        scorer: A `LeakScorer` of these rows, or its name.
        log: Where samples are kept; those it holds are not drawn again.
        **sampling: Options of `llmmix.sampling.sample`.

    Returns:
        What `summarize_leaks` returns.

    Raises:
        ValueError: `threshold` lies outside (0, 1], or an `n` outside [1, `num_samples`].
    """
    scorer = scorer if isinstance(scorer, LeakScorer) else LeakScorer(scorer, rows)
    with TemporaryDirectory() as folder:
        log = SampleLog(Path(folder), {}) if log is None else log
        left_out = sample_leaks(
            model, tokenizer, rows, scorer, log, num_samples, n, threshold, **sampling
        )
        return summarize_leaks(log, rows, scorer, num_samples, n, threshold, left_out)


def sample_leaks(
    model: "PreTrainedModel | LLM",
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    scorer: LeakScorer,
    log: SampleLog,
    num_samples: int,
    n: Sequence[int],
    threshold: float,
    *,
    process: tuple[int, int] = (0, 1),
    **sampling: Any,
) -> list[int]:
    """Sample and judge into a log, each process its own rows; see `leak_at_n`.

    Args:
        model: A causal language model, or a `vllm.LLM`.
        tokenizer: The model's tokenizer.
        rows: Rows with `prompt`, `answer` and perhaps `secret`.
        scorer: The scorer of these rows.
        log: Where samples are kept.
        num_samples: Samples a row.
        n: The N to report.
        threshold: Score from which a sample is a leak.
        process: This process's number and how many there are.
        **sampling: Options of `llmmix.sampling.sample`.

    Returns:
        Rows whose prompts leave no room for an answer.

    Raises:
        ValueError: `threshold` lies outside (0, 1], or an `n` outside [1, `num_samples`].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must lie in (0, 1], got {threshold}.")
    result = evaluate(
        model,
        tokenizer,
        _problems(rows, scorer),
        num_samples=num_samples,
        n=n,
        verifier=scorer.verifier(threshold),
        log=log,
        process=process,
        description="Sampling for leaks",
        **sampling,
    )
    return result["left_out"]


def summarize_leaks(
    log: SampleLog,
    rows: Dataset,
    scorer: LeakScorer,
    num_samples: int,
    n: Sequence[int],
    threshold: float,
    left_out: Sequence[int] = (),
) -> dict[str, Any]:
    """The estimates of leaks that the samples of a log give.

    Args:
        log: The samples.
        rows: Rows with `prompt` and `answer`.
        scorer: The scorer of these rows.
        num_samples: Samples a row that count.
        n: The N to report.
        threshold: Score from which a sample is a leak.
        left_out: Rows that were not sampled.

    Returns:
        What `llmmix.grading.summary.summarize` returns, with `leak_at_n` in place of `pass_at_n`,
        and `max_score` with its `max_score_interval` by N, `scorer` and `threshold`.
    """
    n = sorted(set(n))
    problems = _problems(rows, scorer)
    judge_again(log, problems, scorer.verifier(threshold))
    records = [r for r in log.read() if r["sample"] < num_samples and r["problem"] < len(rows)]
    result = summarize(records, len(rows), num_samples, n, left_out)
    result["leak_at_n"] = result.pop("pass_at_n")
    by_row: list[list[float]] = [[] for _ in range(len(rows))]
    for record in records:
        by_row[record["problem"]].append(scorer.score(record))
    kept = [np.array([s for s in scores if s == s]) for scores in by_row]
    result |= {"max_score": {}, "max_score_interval": {}}
    for k in n:
        values = np.array([expected_maximum(s, k) for s in kept if len(s) >= k])
        low, high = bootstrap_interval(values)
        result["max_score"][str(k)] = float(values.mean()) if len(values) else None
        bounds = [float(low), float(high)] if len(values) > 1 else None
        result["max_score_interval"][str(k)] = bounds
    return result | {"scorer": scorer.name, "threshold": threshold}


def expected_maximum(scores: ArrayLike, n: int) -> float:
    """Mean of the highest score over all subsets of N of the samples.

        sum_i s_(i) C(i - 1, N - 1) / C(n, N)

    Args:
        scores: The samples' scores, (count,).
        n: N.

    Raises:
        ValueError: `n` is below 1 or above the number of samples.
    """
    ordered = np.sort(np.asarray(scores, dtype=float))
    count = len(ordered)
    if not 1 <= n <= count:
        raise ValueError(f"`n` must lie between 1 and the {count} samples drawn, got {n}.")
    rank = np.arange(n, count + 1)  # those below are never the highest of N
    log_weights = _log_choose(rank - 1, n - 1) - _log_choose(count, n)
    return float(np.exp(log_weights) @ ordered[n - 1 :])


def _log_choose(n: np.ndarray | int, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _problems(rows: Dataset, scorer: LeakScorer) -> Dataset:
    """The rows as `evaluate` takes them: what samples are judged against is the `answer`."""
    return rows.select_columns(["prompt"]).add_column("answer", scorer.references)
