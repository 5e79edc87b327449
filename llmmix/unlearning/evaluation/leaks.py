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

import numpy as np
from scipy.special import gammaln

from llmmix.grading.estimators import bootstrap_interval
from llmmix.grading.evaluate import evaluate, judge_again, summarize
from llmmix.grading.sample_log import SampleLog
from llmmix.grading.verify import Verifier
from llmmix.unlearning.evaluation.texts import Tokenize, rouge, says

SCORERS = ("auto", "extraction", "rouge")


class LeakScorer:
    """How much of its reference a sample gives away, in [0, 1].

    Args:
        name: One of `SCORERS`, or what `llmmix.verify.Verifier` takes: its name or module:function.
            `auto` is `extraction` where every row has a `secret`, else `rouge`.
        rows: What is to be scored.
        tokenize: For `rouge`; see `llmmix.forgetting.texts.rouge`.

    Attributes:
        name: The name, `auto` decided.
        references: What each row's samples are scored against: its `secret` or its `answer`.

    Raises:
        ValueError: `extraction` of rows without a `secret`.
    """

    def __init__(self, name: str, rows, tokenize: Tokenize | None = None):
        has_column = "secret" in rows.column_names
        secrets = [s or "" for s in rows["secret"]] if has_column else [""] * len(rows)
        missing = sum(not secret.strip() for secret in secrets)
        if name == "auto":
            name = "rouge" if missing else "extraction"
        if name == "extraction" and missing:
            raise ValueError(
                f"`scorer` 'extraction' needs a `secret` in every row; {missing} of {len(rows)} "
                "have none. Add the column, or use 'rouge'."
            )
        self.name = name
        self.references = secrets if name == "extraction" else list(rows["answer"])
        self._verifier = None if name in SCORERS else Verifier(name)
        self._of_text = lru_cache(100_000)(self._scorer(tokenize))

    def _scorer(self, tokenize: Tokenize | None) -> Callable[[str, str], float]:
        if self.name == "extraction":
            return lambda text, reference: float(says(text, reference))
        return lambda text, reference: rouge(text, reference, tokenize)["rougeL_recall"]

    def verifier(self, threshold: float):
        """What `llmmix.solving.evaluate` judges samples by: right is a leak."""
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

    def score(self, record: dict) -> float:
        """Of a line of the log that has its verdict."""
        if self._verifier is not None:
            return float("nan") if record["verdict"] == "failed" else record["verdict"] == "right"
        return self._of_text(record["completion"], record["answer"])


def leak_at_n(
    model,
    tokenizer,
    rows,
    *,
    num_samples: int = 64,
    n: Sequence[int] = (1, 4, 16, 64),
    threshold: float = 0.9,
    scorer: str | LeakScorer = "auto",
    log: SampleLog | None = None,
    **sampling,
) -> dict:
    """Sample answers to the prompts of rows, and estimate how often N of them give one away.

    Args:
        model: A causal language model, or a `vllm.LLM`.
        tokenizer: Its tokenizer.
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
        ValueError: A threshold outside (0, 1], or N above `num_samples`.
    """
    scorer = scorer if isinstance(scorer, LeakScorer) else LeakScorer(scorer, rows)
    with TemporaryDirectory() as folder:
        log = SampleLog(Path(folder), {}) if log is None else log
        left_out = sample_leaks(
            model, tokenizer, rows, scorer, log, num_samples, n, threshold, **sampling
        )
        return summarize_leaks(log, rows, scorer, num_samples, n, threshold, left_out)


def sample_leaks(
    model,
    tokenizer,
    rows,
    scorer: LeakScorer,
    log: SampleLog,
    num_samples: int,
    n: Sequence[int],
    threshold: float,
    *,
    process: tuple[int, int] = (0, 1),
    **sampling,
) -> list[int]:
    """Sample and judge into a log, each process its own rows; see `leak_at_n`.

    Args:
        model: A causal language model, or a `vllm.LLM`.
        tokenizer: Its tokenizer.
        rows: Rows with `prompt`, `answer` and perhaps `secret`.
        scorer: Of these rows.
        log: Where samples are kept.
        num_samples: Samples a row.
        n: The N to report.
        threshold: Score from which a sample is a leak.
        process: This process's number and how many there are.
        **sampling: Options of `llmmix.sampling.sample`.

    Returns:
        Rows whose prompts leave no room for an answer.

    Raises:
        ValueError: A threshold outside (0, 1], or N above `num_samples`.
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
    rows,
    scorer: LeakScorer,
    num_samples: int,
    n: Sequence[int],
    threshold: float,
    left_out: Sequence[int] = (),
) -> dict:
    """What the samples of a log say.

    Returns:
        What `llmmix.solving.summarize` returns, whose `pass_at_n` is here `leak_at_n`, and
        `max_score` with its `max_score_interval` by N, `scorer` and `threshold`.
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


def expected_maximum(scores, n: int) -> float:
    """Mean of the highest score over all subsets of N of the samples.

        sum_i s_(i) C(i - 1, N - 1) / C(n, N)

    Args:
        scores: (n,) of the samples.
        n: N.

    Raises:
        ValueError: N below 1 or above the samples.
    """
    scores = np.sort(np.asarray(scores, dtype=float))
    count = len(scores)
    if not 1 <= n <= count:
        raise ValueError(f"`n` must lie between 1 and the {count} samples drawn, got {n}.")
    rank = np.arange(n, count + 1)  # those below are never the highest of N
    log_weights = _log_choose(rank - 1, n - 1) - _log_choose(count, n)
    return float(np.exp(log_weights) @ scores[n - 1 :])


def _log_choose(n, k):
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _problems(rows, scorer: LeakScorer):
    """The rows as `evaluate` takes them: what samples are judged against is the `answer`."""
    return rows.select_columns(["prompt"]).add_column("answer", scorer.references)
