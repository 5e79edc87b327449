"""Estimates from samples: pass@N without bias, majority votes, intervals over problems.

    pass@N = 1 - C(n - c, N) / C(n, N)      n samples of a problem, c of them right

Everything here is estimated by drawing subsets without replacement from the samples at hand, and
nothing is extrapolated beyond them: the plug-in 1 - (1 - c/n)^N is biased, and is not offered.
The estimator is that of Chen et al., arXiv 2107.03374.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap


def pass_at_n(n_samples: ArrayLike, n_correct: ArrayLike, n: ArrayLike) -> Any:
    """Unbiased estimate of pass@N from the samples of each problem.

    Args:
        n_samples: Samples drawn, int or array.
        n_correct: How many of them were right, int or array.
        n: N, int or array.

    Returns:
        A float, or an array in the broadcast shape of the arguments.

    Raises:
        ValueError: An N is below 1 or above the samples drawn (there is no unbiased estimate
            then), there are more right answers than samples, or a number is not whole.
    """
    given = {"n_samples": n_samples, "n_correct": n_correct, "n": n}
    samples, correct, drawn = np.broadcast_arrays(
        *(_whole(name, value) for name, value in given.items())
    )
    if drawn.size and ((drawn > samples).any() or (drawn < 1).any()):
        raise ValueError(
            f"`n` must lie between 1 and the {samples.min()} samples drawn, got {drawn.min()} to "
            f"{drawn.max()}; draw more samples."
        )
    if drawn.size and ((correct > samples).any() or (correct < 0).any()):
        raise ValueError(
            f"`n_correct` must lie between 0 and `n_samples`, got {correct.min()} to "
            f"{correct.max()}."
        )
    estimates = np.empty(drawn.shape)
    for count, k in set(zip(samples.flat, drawn.flat, strict=True)):
        here = (samples == count) & (drawn == k)
        estimates[here] = _estimates(int(count), int(k), correct[here])
    return float(estimates) if estimates.ndim == 0 else estimates


def _whole(name: str, value: ArrayLike) -> np.ndarray:
    numbers = np.asarray(value)
    if not np.issubdtype(numbers.dtype, np.integer):
        if numbers.size and (numbers != np.floor(numbers)).any():  # NaN too
            raise ValueError(f"`{name}` must hold whole numbers, got {numbers}.")
        numbers = numbers.astype(np.int64)
    return numbers


def _estimates(samples: int, n: int, correct: np.ndarray) -> np.ndarray:
    # C(n-c, N) / C(n, N) = prod_{i=n-c+1}^{n} (1 - N/i). All logarithms have one sign, so that
    # sums from the top keep their digits; with more than n - N right, no draw can miss
    longest = int(min(correct.max(initial=0), samples - n))
    i = np.arange(samples, samples - longest, -1, dtype=float)
    log_miss = np.concatenate([[0.0], np.cumsum(np.log1p(-n / i))])
    missed = np.where(correct > samples - n, -np.inf, log_miss[np.minimum(correct, longest)])
    return 0.0 - np.expm1(missed)  # not -expm1, which makes -0.0 of 0


def maj_at_n(
    votes: Sequence[int],
    n_right: int,
    n: int,
    *,
    n_silent: int = 0,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """Chance that the most frequent of N sampled answers is the right one; ties share it.

    Subsets of the samples are drawn without replacement.

    Args:
        votes: Samples that gave each distinct wrong answer.
        n_right: Samples that gave the right answer.
        n: N.
        n_silent: Samples without an answer, which are drawn and have no vote.
        resamples: Subsets drawn.
        seed: Seed of the subsets.

    Raises:
        ValueError: N is below 1 or above the number of samples.
    """
    counts = np.array([n_right, n_silent, *votes])
    if not 1 <= n <= counts.sum():
        raise ValueError(f"`n` must lie between 1 and the {counts.sum()} samples drawn, got {n}.")
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(
        counts, n, size=resamples, method="marginals"
    )
    right, wrong = drawn[:, 0], drawn[:, 2:]
    most = wrong.max(1, initial=0)
    ties = 1 + ((wrong == right[:, None]) & (right > 0)[:, None]).sum(1)
    return float(np.where((right > 0) & (right >= most), 1 / ties, 0).mean())


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean over problems, by drawing problems with replacement.

    Resampling knows the problems at hand alone. A kind of problem that none of n is may be a share
    of up to q = 1 - ((1 - level) / 2)^(1/n): of a greater one, some would be among the n. So where
    all values lie in [0, 1], the interval reaches at least from (1 - q) * mean, were those problems
    all 0, to (1 - q) * mean + q, were they all 1. It decides where nearly all problems give 0, or
    1, and is the exact bound where all do.

    Args:
        values: (problems,) or (problems, quantities).
        level: Coverage of the interval.
        resamples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        Lower and upper bounds, of shape () or (quantities,); NaN for fewer than two problems.
    """
    known = np.asarray(values, dtype=float)
    low, high = _percentiles(known, level, resamples, seed)
    if len(known) > 1:
        seen = ((1 - level) / 2) ** (1 / len(known))
        is_share = ((known >= 0) & (known <= 1)).all(0)
        low = np.where(is_share, np.minimum(low, seen * known.mean(0)), low)
        high = np.where(is_share, np.maximum(high, seen * known.mean(0) + 1 - seen), high)
    return low, high


def paired_difference(
    values: ArrayLike,
    baseline: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean difference over the same problems, and its bootstrap interval.

    Args:
        values: (problems, quantities) of one model.
        baseline: The same of another, problem for problem.
        level: Coverage of the interval.
        resamples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        Mean, lower and upper bounds, each (quantities,).

    Raises:
        ValueError: `values` and `baseline` have different shapes.
    """
    one, other = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if one.shape != other.shape:
        raise ValueError(
            f"`values` and `baseline` must hold the same problems, got {one.shape} and "
            f"{other.shape}."
        )
    difference = one - other
    return difference.mean(0), *_percentiles(difference, level, resamples, seed)


def _percentiles(
    values: np.ndarray, level: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    if len(values) < 2:
        unknown = np.full(values.shape[1:], np.nan)
        return unknown, unknown
    bounds = np.empty((2, *values.shape[1:]))
    for quantity in np.ndindex(values.shape[1:]):  # each alone, so that none depends on the others
        with warnings.catch_warnings():
            # A NaN among the values makes both bounds NaN, as it should
            warnings.simplefilter("ignore", DegenerateDataWarning)
            found = bootstrap(
                (values[:, *quantity].copy(),),
                np.mean,
                method="percentile",
                confidence_level=level,
                n_resamples=resamples,
                batch=500,  # bounds the memory of many problems
                rng=np.random.default_rng(seed),
            )
        bounds[:, *quantity] = found.confidence_interval
    return bounds[0], bounds[1]
