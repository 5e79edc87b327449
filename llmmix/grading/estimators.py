"""What samples say about a model: pass@N without bias, majority votes, intervals over problems.

    pass@N = 1 - C(n - c, N) / C(n, N)      n samples of a problem, c of them right

Everything here is estimated by drawing subsets without replacement from the samples at hand, and
nothing is extrapolated beyond them: the plug-in 1 - (1 - c/n)^N is biased, and is not offered.
The estimator is that of Chen et al., arXiv 2107.03374.
"""

import numpy as np


def pass_at_n(n_samples, n_correct, n):
    """Unbiased estimate of pass@N from the samples of each problem.

    Args:
        n_samples: Samples drawn, int or array.
        n_correct: How many of them were right, int or array.
        n: N, int or array.

    Returns:
        A float, or an array in the broadcast shape of the arguments.

    Raises:
        ValueError: N above the samples drawn (there is no unbiased estimate then), N below 1, more
            right answers than samples, or numbers that are not whole.
    """
    given = {"n_samples": n_samples, "n_correct": n_correct, "n": n}
    n_samples, n_correct, n = np.broadcast_arrays(
        *(_whole(name, value) for name, value in given.items())
    )
    if n.size and ((n > n_samples).any() or (n < 1).any()):
        raise ValueError(
            f"`n` must lie between 1 and the {n_samples.min()} samples drawn, got {n.min()} to "
            f"{n.max()}; draw more samples."
        )
    if n.size and ((n_correct > n_samples).any() or (n_correct < 0).any()):
        raise ValueError(
            f"`n_correct` must lie between 0 and `n_samples`, got {n_correct.min()} to "
            f"{n_correct.max()}."
        )
    estimates = np.empty(n.shape)
    for samples, draws in set(zip(n_samples.flat, n.flat, strict=True)):
        here = (n_samples == samples) & (n == draws)
        estimates[here] = _estimates(int(samples), int(draws), n_correct[here])
    return float(estimates) if estimates.ndim == 0 else estimates


def _whole(name: str, value) -> np.ndarray:
    value = np.asarray(value)
    if not np.issubdtype(value.dtype, np.integer):
        if value.size and (value != np.floor(value)).any():  # NaN too
            raise ValueError(f"`{name}` must hold whole numbers, got {value}.")
        value = value.astype(np.int64)
    return value


def _estimates(samples: int, n: int, correct: np.ndarray) -> np.ndarray:
    # C(n-c, N) / C(n, N) = prod_{i=n-c+1}^{n} (1 - N/i). All logarithms have one sign, so that
    # sums from the top keep their digits; with more than n - N right, no draw can miss
    longest = int(min(correct.max(initial=0), samples - n))
    i = np.arange(samples, samples - longest, -1, dtype=float)
    log_miss = np.concatenate([[0.0], np.cumsum(np.log1p(-n / i))])
    missed = np.where(correct > samples - n, -np.inf, log_miss[np.minimum(correct, longest)])
    return -np.expm1(missed)


def maj_at_n(votes, n_right: int, n: int, *, n_silent: int = 0, resamples: int = 2000, seed=0):
    """Chance that the most frequent of N sampled answers is the right one; ties share it.

    Subsets of the samples are drawn without replacement.

    Args:
        votes: Samples that gave each distinct wrong answer.
        n_right: Samples that gave the right answer.
        n: N.
        n_silent: Samples without an answer: drawn, and without a vote.
        resamples: Subsets drawn.
        seed: Of the subsets.

    Raises:
        ValueError: N above the samples, or below 1.
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
    values, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean over problems, by drawing problems with replacement.

    Where all problems give 0, or all 1, resampling says nothing; the bound there is the largest, or
    smallest, mean under which so many such problems have a chance of (1 - level) / 2.

    Args:
        values: (problems,) or (problems, quantities); for estimates in [0, 1] or differences.
        level: Coverage.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        Lower and upper bounds, of shape () or (quantities,); NaN for fewer than two problems.
    """
    values = np.asarray(values, dtype=float)
    low, high = _percentiles(values, level, resamples, seed)
    tail = (1 - level) / 2
    if len(values) > 1:
        high = np.where((values == 0).all(0), 1 - tail ** (1 / len(values)), high)
        low = np.where((values == 1).all(0), tail ** (1 / len(values)), low)
    return low, high


def paired_difference(
    values, baseline, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean difference over the same problems, and its bootstrap interval.

    Args:
        values: (problems, quantities) of one model.
        baseline: The same of another, problem for problem.
        level: Coverage.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        Mean, lower and upper bounds, each (quantities,).

    Raises:
        ValueError: Other problems.
    """
    values, baseline = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if values.shape != baseline.shape:
        raise ValueError(
            f"`values` and `baseline` must hold the same problems, got {values.shape} and "
            f"{baseline.shape}."
        )
    difference = values - baseline
    return difference.mean(0), *_percentiles(difference, level, resamples, seed)


def _percentiles(values: np.ndarray, level: float, resamples: int, seed: int):
    problems = len(values)
    if problems < 2:
        return np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, 500):  # bounds the memory of many problems
        size = min(500, resamples - start)
        weights = rng.multinomial(problems, np.full(problems, 1 / problems), size=size)
        means.append(weights @ values / problems)
    tail = (1 - level) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
