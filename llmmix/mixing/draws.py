"""The arithmetic of drawing: random numbers by their place in a stream, and what follows from them.

Everything here is a function of a key and a place, so that draw i of a run is the same whatever
came between, on however many processes.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


def uniforms(seed: int, stream: str, start: int, count: int) -> np.ndarray:
    """The numbers `start` to `start + count` of a random stream in [0, 1).

    A counter-based generator (Philox 4x64: Salmon et al., SC 2011) gives any part of a stream at
    the price of that part.

    Args:
        seed: Of the run, from 0 on.
        stream: Its name: streams of other names are independent.
        start: Place of the first number.
        count: How many.

    Returns:
        (count,) float64.
    """
    bits = np.random.Philox(key=np.array([seed, zlib.crc32(stream.encode())], dtype=np.uint64))
    bits.advance(int(start) // 4)  # four numbers a tick of its counter
    return np.random.Generator(bits).random(count + start % 4)[start % 4 :]


def shuffles(seed: int, stream: str, size: int, first: int, last: int) -> np.ndarray:
    """The orders in which the passes `first` to `last` visit `size` rows.

    Returns:
        (last - first + 1, size) permutations, one a pass.
    """
    keys = uniforms(seed, stream, first * size, (last - first + 1) * size)
    return keys.reshape(-1, size).argsort(axis=1)


def choose(weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The domain of each draw, independently: the one in whose part of [0, 1) its number falls.

    Args:
        weights: (k,) on the simplex.
        numbers: (n,) in [0, 1).

    Returns:
        (n,) int64; a domain of weight 0 is never among them.
    """
    edges = np.cumsum(weights)
    edges[np.flatnonzero(weights)[-1] :] = 1.0  # the sum may fall short of 1 by a rounding
    return np.searchsorted(edges, numbers, side="right")


def choose_evenly(
    weights: np.ndarray, credit: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The domain of each draw, evenly spaced: the one that is owed most is next.

        credit <- credit + weights;  j = argmax credit;  credit_j <- credit_j - 1

    Weights may change at any draw: what is owed stays within (-1, 1 + ln k) of nothing.

    Args:
        weights: (k,) on the simplex.
        credit: (k,) draws that each domain is owed.
        count: n.

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


class Cursor(NamedTuple):
    """Where the draws stand."""

    draws: int
    counts: np.ndarray  # (k, strata) draws of each domain
    credit: np.ndarray  # (k,) as `choose_evenly` takes it


@dataclass(frozen=True)
class Block:
    """Draws made in one go, under one set of weights."""

    start: Cursor
    domains: np.ndarray  # (n,)
    rows: np.ndarray  # (n,) within the domain
    passes: np.ndarray  # (n,) how often the domain had been through before
    credit: np.ndarray | None  # (n, k) of `choose_evenly`

    def cursor(self, used: int) -> Cursor:
        """Where the draws stand after the first `used` of the block."""
        if used == 0:
            return self.start
        strata = self.start.counts.shape[1]
        cells = self.domains[:used] * strata + (self.start.draws + np.arange(used)) % strata
        drawn = np.bincount(cells, minlength=self.start.counts.size)
        credit = self.start.credit if self.credit is None else self.credit[used - 1]
        counts = self.start.counts + drawn.reshape(self.start.counts.shape)
        return Cursor(self.start.draws + used, counts, credit)
