"""Draws in blocks: made in one go, ahead of their use, from where the draws stand."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Cursor(NamedTuple):
    """Where the draws stand.

    Args:
        draws: Number of draws so far.
        counts: (k, strata) draws of each domain.
        credit: (k,) draws that each domain is owed, as `choose_evenly` takes it.
    """

    draws: int
    counts: np.ndarray
    credit: np.ndarray

    @classmethod
    def of_state(cls, state: dict, shape: tuple[int, ...]) -> "Cursor":
        """The cursor that `state` was taken of; `shape` is that of its counts."""
        counts = np.array(state["counts"], dtype=np.int64).reshape(shape)
        return cls(state["draws"], counts, np.array(state["credit"]))

    def state(self) -> dict:
        """Its parts by name, as JSON has them."""
        counts, credit = self.counts.tolist(), self.credit.tolist()
        return {"draws": self.draws, "counts": counts, "credit": credit}


@dataclass(frozen=True)
class Block:
    """Draws made in one go, under one set of weights.

    Args:
        start: Where the draws stood before it.
        domains: (n,) domain of each draw.
        rows: (n,) row within the domain.
        passes: (n,) how often the domain had been passed through before.
        credit: (n, k) credit after each draw, None where draws are independent.
    """

    start: Cursor
    domains: np.ndarray
    rows: np.ndarray
    passes: np.ndarray
    credit: np.ndarray | None

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


class BlockQueue:
    """Blocks drawn ahead, in the order of their draws; the first may be used in part.

    Args:
        start: Where the draws stand.
    """

    def __init__(self, start: Cursor):
        self._blocks: deque[Block] = deque()
        self._start = start  # of the first block
        self._used = 0  # of the first block

    @property
    def position(self) -> int:
        """Draws used so far."""
        return self._start.draws + self._used

    def cursor(self) -> Cursor:
        """Where the draws stand after those that were used."""
        return self._blocks[0].cursor(self._used) if self._blocks else self._start

    def end(self) -> Cursor:
        """Where the draws stand after all that were made."""
        return self._blocks[-1].cursor(len(self._blocks[-1].rows)) if self._blocks else self._start

    def append(self, block: Block) -> None:
        """Add a block, which begins at `end`."""
        self._blocks.append(block)

    def use(self, count: int) -> None:
        """Count the next draws as used."""
        self._used += count
        while self._blocks and self._used >= len(self._blocks[0].rows):
            block = self._blocks.popleft()
            self._start = block.cursor(len(block.rows))
            self._used -= len(block.rows)

    def rewind(self) -> None:
        """Forget the draws that were not used."""
        self._start, self._used = self.cursor(), 0
        self._blocks.clear()
