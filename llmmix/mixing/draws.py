"""The arithmetic of drawing: random numbers by their place in a stream, and draws from them.

Every function depends on its arguments alone, so that draw i of a run is the same after a restart
and on any number of processes.
"""

import zlib
from collections.abc import Mapping

import numpy as np


def uniforms(seed: int, stream: str, start: int, count: int) -> np.ndarray:
    """The numbers `start` to `start + count` of a random stream in [0, 1).

    A counter-based generator (Philox 4x64: Salmon et al., SC 2011) can start anywhere in a stream
    at no cost.

    Args:
        seed: Seed of the run, from 0 on.
        stream: Name of the stream; streams with different names are independent.
        start: Place of the first number.
        count: Number of numbers.

    Returns:
        (count,) float64.
    """
    bits = np.random.Philox(key=np.array([seed, zlib.crc32(stream.encode())], dtype=np.uint64))
    bits.advance(int(start) // 4)  # four numbers a tick of its counter
    return np.random.Generator(bits).random(count + start % 4)[start % 4 :]


def shuffles(seed: int, stream: str, size: int, first: int, last: int) -> np.ndarray:
    """The orders in which passes `first` to `last` (inclusive) visit `size` rows.

    Returns:
        (last - first + 1, size) permutations, one a pass.
    """
    keys = uniforms(seed, stream, first * size, (last - first + 1) * size)
    return keys.reshape(-1, size).argsort(axis=1)


def choose(weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The domain of each draw, independently: each domain owns a part of [0, 1) as its weight.

    Args:
        weights: (k,) on the simplex.
        numbers: (n,) in [0, 1).

    Returns:
        (n,) int64 domains, none of weight 0.
    """
    edges = np.cumsum(weights)
    edges[np.flatnonzero(weights)[-1] :] = 1.0  # the sum may fall short of 1 by a rounding
    return np.searchsorted(edges, numbers, side="right")


def choose_evenly(
    weights: np.ndarray, credit: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The domain of each draw, evenly spaced: the next is the one with the largest credit.

        credit <- credit + weights;  j = argmax credit;  credit_j <- credit_j - 1

    Weights may change at any draw: each credit stays between -1 and 1 + ln k.

    Args:
        weights: (k,) on the simplex.
        credit: (k,) draws that each domain is owed.
        count: Number n of draws.

    Returns:
        (n,) domains, and (n, k) credit after each draw.
    """
    domains, after = np.empty(count, np.int64), np.empty((count, len(weights)))
    closed = np.where(weights > 0, 0.0, -np.inf)
    for i in range(count):
        credit = credit + weights
        domains[i] = j = (credit + closed).argmax()
        credit[j] -= 1.0
        after[i] = credit
    return domains, after


def shares_of_rows(
    weights: np.ndarray, names: list[str], tokens_per_row: Mapping[str, float] | None
) -> np.ndarray:
    """Shares of the rows with which each domain gets its share of the tokens.

    Args:
        weights: (k,) shares of the tokens, on the simplex.
        names: Names of the domains.
        tokens_per_row: Mean number of scored tokens of a row, by domain.

    Returns:
        (k,) on the simplex.

    Raises:
        ValueError: `tokens_per_row` is None.
    """
    if tokens_per_row is None:
        raise ValueError(
            "`unit='tokens'` needs `tokens_per_row`, the mean scored tokens of each domain's rows; "
            "`attach_mixture` counts them."
        )
    shares = weights / [tokens_per_row[name] for name in names]
    return shares / shares.sum()
