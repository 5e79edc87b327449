"""Geometry of the simplex: projection onto bounds, distances to runs, runs of the same mixture."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from scipy.spatial import KDTree

from llmmix.laws.inputs import check_mixtures

GRID, OFFSET = 1e-6, 1 / np.pi  # cell size and offset of the grid on which shares are compared


def project(p: np.ndarray, lower: np.ndarray | float, upper: np.ndarray | float) -> np.ndarray:
    """The nearest points that sum to 1 within bounds: clip(p - t, lower, upper), t by bisection.

    Args:
        p: (..., k), any numbers.
        lower: (k,) or one number.
        upper: (k,) or one number.

    Returns:
        (..., k).

    Raises:
        ValueError: No mixture meets the bounds, or `p` is not finite.
    """
    p = np.asarray(p, dtype=np.float64)
    lower, upper = (np.broadcast_to(np.asarray(b, float), p.shape[-1:]) for b in (lower, upper))
    if not (lower.sum() <= 1 + 1e-9 and upper.sum() >= 1 - 1e-9 and (lower <= upper).all()):
        raise ValueError(
            f"`lower` and `upper` must leave a mixture, got sums {lower.sum():.6g} and "
            f"{upper.sum():.6g}: see `objective.bounds_of`."
        )
    if not np.isfinite(p).all():
        raise ValueError("`p` must be finite to be projected, got NaN or inf: drop those rows.")
    least = (p - upper).min(-1, keepdims=True)
    most = (p - lower).max(-1, keepdims=True)
    for _ in range(60):
        t = (least + most) / 2
        over = np.clip(p - t, lower, upper).sum(-1, keepdims=True) > 1
        least, most = np.where(over, t, least), np.where(over, most, t)
    clipped = np.clip(p - t, lower, upper)
    # The remainder of the bisection, of the size of rounding, goes to shares strictly within bounds
    tiny = 4e-16 * np.maximum(np.abs(p).max(-1, keepdims=True), 1)
    clipped = np.where(clipped - lower < tiny, lower, clipped)
    clipped = np.where(upper - clipped < tiny, upper, clipped)
    free = (clipped > lower) & (clipped < upper)
    rest = (1 - clipped.sum(-1, keepdims=True)) / np.maximum(free.sum(-1, keepdims=True), 1)
    return np.clip(clipped + rest * free, lower, upper)


def nearest_run(p: np.ndarray, mixtures: np.ndarray) -> tuple[int, float]:
    """The index of the row of mixtures (n, k) nearest to p (k,), and 1/2 sum_j |p_j - q_j|."""
    distances = np.abs(np.asarray(mixtures) - p).sum(1) / 2
    nearest = int(distances.argmin())
    return nearest, float(distances[nearest])


def hull_distance(p: np.ndarray, mixtures: np.ndarray) -> float:
    """The smallest total variation distance from p (k,) to a mean of rows of mixtures (n, k).

    min_{w, t} 1/2 sum_j (t+_j + t-_j),   sum_i w_i q_i + t+ - t- = p,   sum_i w_i = 1,   all >= 0
    """
    n, k = np.shape(mixtures)
    cost = np.concatenate([np.zeros(n), np.full(2 * k, 0.5)])
    matrix = np.block([[np.transpose(mixtures), np.eye(k), -np.eye(k)]])
    matrix = np.vstack([matrix, np.concatenate([np.ones(n), np.zeros(2 * k)])])
    solved = linprog(cost, A_eq=matrix, b_eq=np.append(p, 1.0), method="highs")
    if not solved.success:  # the program is feasible and bounded unless numbers are not finite
        raise ValueError(f"`p` and `mixtures` must be finite for a distance: {solved.message}")
    return max(float(solved.fun), 0.0)


def typical_spacing(mixtures: np.ndarray) -> float:
    """Median distance of the distinct rows of mixtures (n, k) to their nearest other row.

    Raises:
        ValueError: All rows are the same.
    """
    distinct = np.unique(np.round(mixtures, 12), axis=0)
    if len(distinct) < 2:
        raise ValueError(f"`mixtures` must hold two that differ, got {len(distinct)}: add runs.")
    return float(np.median(KDTree(distinct).query(distinct, k=2, p=1)[0][:, 1]) / 2)


def same_mixture(mixtures: ArrayLike) -> np.ndarray:
    """(n,) number of each run's mixture, independent of the order of runs and domains.

    Shares of the same mixture may differ by rounding, so they are compared on a grid of 1e-6. Its
    edges are placed where no decimal number or simple fraction lies. Mixtures are numbered in the
    order of their shares, which decides the folds that they are judged in.
    """
    X = check_mixtures(mixtures)
    domains = np.lexsort(np.sort(X, 0)[::-1])
    cells = np.floor(X[:, domains] / GRID + OFFSET)
    mixture = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort(X[:, domains].T[::-1])
    first = np.unique(mixture[order], return_index=True)[1]
    return np.argsort(np.argsort(first))[mixture]
