"""Scores of predicted losses against observed ones, and their confidence intervals.

    bootstrap(lambda counts: spearman(observed, predicted, counts), same_mixture(mixtures))

Runs of the same mixture are not independent, so the 95 % intervals resample mixtures, not runs.
Runs with a NaN are left out of a score.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

RESAMPLES = 1000


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], mixture: np.ndarray, resamples: int = RESAMPLES
) -> Interval:
    """A statistic of all runs, and its interval over mixtures drawn with replacement.

    Args:
        statistic: Maps (resamples, n) counts of each run to (resamples,) values.
        mixture: (n,) number of each run's mixture, as from `simplex.same_mixture`.
        resamples: Number of draws. 0: the bounds are NaN.
    """
    groups = mixture.max() + 1
    drawn = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), resamples)
    found = statistic(np.vstack([np.ones(len(mixture)), drawn[:, mixture]]))
    drawn = found[1:][~np.isnan(found[1:])]  # NaN: a draw of runs without a loss
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return Interval(float(found[0]), float(low), float(high))


def r2(*, observed: ArrayLike, predicted: ArrayLike, baseline: ArrayLike) -> np.ndarray:
    """1 - sum (observed - predicted)^2 / sum (observed - baseline)^2, over the runs (axis 0).

    Where `baseline` is the mean of the fitted runs, that mean scores 0. Runs with a NaN are left
    out; the result is NaN where no loss differs from the baseline.
    """
    left = np.subtract(observed, predicted) ** 2
    base = np.subtract(observed, baseline) ** 2
    total = np.nansum(base + 0 * left, 0)
    return 1 - np.nansum(left + 0 * base, 0) / np.where(total > 0, total, np.nan)


def spearman(
    observed: np.ndarray, predicted: np.ndarray, counts: np.ndarray | None = None
) -> np.ndarray:
    """(draws,) rank correlations of (n,) and (n,); NaN for fewer than 3 runs without a NaN.

    The same as scipy's spearmanr, for all draws of a bootstrap at once: `counts` (draws, n) says
    how often each run counts. Without it there is one draw, in which every run counts once.
    """
    kept = ~np.isnan(observed + predicted)
    counts = np.ones((1, len(kept))) if counts is None else counts
    if kept.sum() < 3:
        return np.full(len(counts), np.nan)
    counts = counts[:, kept]
    x, y = (_ranks(values[kept], counts) for values in (observed, predicted))
    both, xx, yy = ((counts * product).sum(1) for product in (x * y, x * x, y * y))
    return both / np.where(xx * yy > 0, np.sqrt(xx * yy), np.nan)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(draws, n) ranks, averaged where values tie, minus their mean over all runs."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(np.hstack([np.zeros((len(counts), 1)), counts[:, order]]), 1)
    first, last = (np.searchsorted(values[order], values, side) for side in ("left", "right"))
    ranks = (below[:, first] + below[:, last]) / 2
    total = np.maximum(counts.sum(1), 1)
    return ranks - ((counts * ranks).sum(1) / total)[:, None]


def weighted(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) objective of (n, m) losses; NaN for a run that lacks a target with a weight."""
    return losses[:, weights > 0] @ weights[weights > 0]


def regret_of(observed: np.ndarray, predicted: np.ndarray) -> float:
    """Loss of the run predicted best (mean of ties) minus the loss of the best run."""
    kept = ~np.isnan(observed + predicted)
    observed, predicted = observed[kept], predicted[kept]
    if not len(observed):
        return np.nan
    return float(observed[predicted == predicted.min()].mean() - observed.min())


def coverage_of(errors: np.ndarray, stds: np.ndarray, level: float) -> float:
    """Fraction of the errors inside the central normal interval of `level`, given `stds`."""
    kept = ~np.isnan(errors + stds)
    return float(np.mean(np.abs(errors[kept]) <= norm.ppf(0.5 + level / 2) * stds[kept]))
