"""The estimates that judged samples give, of one model and of several beside each other."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmmix.grading.answers import VERDICTS, stated_answer
from llmmix.grading.estimators import bootstrap_interval, maj_at_n, paired_difference, pass_at_n


def summarize(
    records: Sequence[dict[str, Any]],
    problems: int,
    num_samples: int,
    n: Sequence[int],
    left_out: Sequence[int] = (),
    *,
    maj: bool = False,
) -> dict[str, Any]:
    """The estimates that samples and verdicts give.

    Samples whose verification failed are left out of a problem's n. A problem with fewer than N
    judged samples has no estimate of pass@N, and is left out of that one: `problems` says how many
    each estimate rests on.

    Args:
        records: Lines of a `SampleLog`.
        problems: Rows of the dataset.
        num_samples: Samples of each problem; further ones in the records are not used.
        n: The N to report.
        left_out: Problems that could not be sampled.
        maj: Whether to estimate maj@N too.

    Returns:
        `pass_at_n`, `interval` (95%) and `problems` by N, `maj_at_n` and its interval if asked for,
        `verdicts`, `errors` (why verifications failed, the five commonest), `cut` (samples that
        reached the token limit), `mean_tokens`, and `n_judged` and `n_correct` of each problem.
    """
    used = [r for r in records if r["sample"] < num_samples and r["problem"] < problems]
    by_problem: list[list[dict[str, Any]]] = [[] for _ in range(problems)]
    for record in used:
        by_problem[record["problem"]].append(record)
    verdicts = [Counter(r["verdict"] for r in rows) for rows in by_problem]
    judged = np.array([c.total() - c["failed"] for c in verdicts])
    correct = np.array([c["right"] for c in verdicts])
    values, intervals = _by_n(n, judged, lambda rows, k: pass_at_n(judged[rows], correct[rows], k))
    result = {
        "estimator": "unbiased",
        "num_samples": num_samples,
        "rows": problems,
        "left_out": list(left_out),
        "verdicts": {v: sum(c[v] for c in verdicts) for v in VERDICTS},
        "cut": sum(not r["finished"] for r in used),
        "errors": dict(Counter(r["error"] for r in used if r.get("error")).most_common(5)),
        "mean_tokens": float(np.mean([r["tokens"] for r in used])) if used else None,
        "n_judged": judged.tolist(),
        "n_correct": correct.tolist(),
        "pass_at_n": values,
        "interval": intervals,
        "problems": {str(k): int((judged >= k).sum()) for k in n},
    }
    if maj:
        votes = [_votes(rows) for rows in by_problem]
        result["maj_at_n"], result["maj_interval"] = _by_n(
            n,
            judged,
            lambda rows, k: np.array([maj_at_n(n=k, seed=row, **votes[row]) for row in rows]),
        )
    return result


def _by_n(
    n: Sequence[int], judged: np.ndarray, values_of: Callable[[np.ndarray, int], np.ndarray]
) -> tuple[dict[str, float | None], dict[str, list[float] | None]]:
    """Mean over the problems with enough judged samples, and its interval, for each N.

    Args:
        n: The N to report.
        judged: (problems,) samples with a verdict.
        values_of: Gives the estimates of some problems, by number, at an N.
    """
    values: dict[str, float | None] = {}
    intervals: dict[str, list[float] | None] = {}
    for k in n:
        rows = np.flatnonzero(judged >= k)
        found = values_of(rows, k)
        low, high = bootstrap_interval(found)
        values[str(k)] = float(found.mean()) if len(rows) else None
        intervals[str(k)] = [float(low), float(high)] if len(rows) > 1 else None
    return values, intervals


def _votes(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the judged samples of a problem vote for, as arguments of `maj_at_n`."""
    wrong: Counter[str] = Counter()
    right = silent = 0
    for record in records:
        if record["verdict"] == "failed":
            continue
        given = stated_answer(record["completion"], record["verifier"])
        if record["verdict"] == "right":
            right += 1
        elif record["verdict"] == "unparsable" or given is None:
            silent += 1
        else:
            wrong[given] += 1
    return {"votes": list(wrong.values()), "n_right": right, "n_silent": silent}


def compare(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """pass@N of each run minus that of the first, over the problems that both have estimates of.

    Args:
        results: What `summarize` returned, by name of the run.

    Returns:
        For each run but the first and each N: `difference`, `interval` and `problems`, the number
        of problems compared. An N with fewer than two such problems is left out.
    """
    first, *others = results
    return {name: _compare_two(results[name], results[first]) for name in others}


def _compare_two(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    judged = [np.array(result["n_judged"]) for result in (one, other)]
    correct = [np.array(result["n_correct"]) for result in (one, other)]
    for k in one["pass_at_n"]:
        both = np.flatnonzero((judged[0] >= int(k)) & (judged[1] >= int(k)))
        if len(both) < 2:
            continue
        values, baseline = (
            pass_at_n(samples[both], right[both], int(k))
            for samples, right in zip(judged, correct, strict=True)
        )
        mean, low, high = paired_difference(values, baseline)
        differences[k] = {
            "difference": float(mean),
            "interval": [float(low), float(high)],
            "problems": len(both),
        }
    return differences
