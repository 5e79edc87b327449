"""Weights of domains as points of the simplex: fixed choices, logarithms, and a floor.

The methods keep logarithms of weights and normalize them at each update. The published EXP3 plugin
multiplies plain weights, which overflow within a thousand updates.
"""

import math
from collections.abc import Sequence

import numpy as np

from llmmix.mixing.checks import check_weights, require


def stratified(m: int) -> np.ndarray:
    """(m,) the same share for each of `m` domains.

    Raises:
        ValueError: `m` is below 1.
    """
    require(m >= 1, "m", "be at least 1", m)
    return np.full(m, 1 / m)


def proportional(sizes: Sequence[float] | np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """(m,) shares w_j ~ size_j ** alpha of domains with (m,) rows or tokens; 0 for an empty one.

    Raises:
        ValueError: A size or `alpha` is negative or not finite, or all sizes are zero.
    """
    sizes = check_weights(sizes, [str(j) for j in range(len(sizes))], "sizes")
    require(0 <= alpha < math.inf, "alpha", "be finite and not negative", alpha)
    return np.exp(log_normalize(np.where(sizes > 0, alpha * log_of(sizes + (sizes == 0)), -np.inf)))


def log_of(weights: np.ndarray) -> np.ndarray:
    """Logarithms of weights; minus infinity for a share of zero."""
    with np.errstate(divide="ignore"):
        return np.log(weights)


def log_normalize(logs: np.ndarray) -> np.ndarray:
    """Logarithms of weights, shifted so that the weights sum to one."""
    with np.errstate(over="ignore"):  # a difference too large for a float is -inf, a share of 0
        logs = logs - logs.max()
    return logs - np.log(np.exp(logs).sum())


def with_floor(weights: np.ndarray, floor: np.ndarray | float) -> np.ndarray:
    """The point of the simplex nearest in KL divergence whose entries are at least `floor`."""
    floor = np.broadcast_to(floor, weights.shape)
    held = np.zeros(len(weights), dtype=bool)
    while True:
        free = 1 - floor[held].sum()
        scaled = np.where(held, floor, weights * free / max(weights[~held].sum(), 1e-300))
        below = (scaled < floor - 1e-15) & ~held
        if not below.any():
            return scaled / scaled.sum()
        held |= below
