"""Blocks of draws: made together, ahead of their use, and forgotten when the plan changes.

`MixtureSampler` (llmmix/mixing/sampler.py) makes the draws; here is how they are counted.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Cursor(NamedTuple):
    """A position in the sequence of draws, with all that the next draw depends on.

    Args:
        draws: Number of draws so far.
        counts: (k, strata) draws of each domain.
        credit: (k,) draws that each domain is owed (see `draws.choose_evenly`).
    """

    draws: int
    counts: np.ndarray
    credit: np.ndarray

    @classmethod
    def of_state(cls, state: dict, shape: tuple[int, ...]) -> "Cursor":
        """The cursor that `state` describes; `shape` is the shape of its counts."""
        counts = np.array(state["counts"], dtype=np.int64).reshape(shape)
        return cls(state["draws"], counts, np.array(state["credit"]))

    def state(self) -> dict:
        """The fields by name, as JSON values."""
        counts, credit = self.counts.tolist(), self.credit.tolist()
        return {"draws": self.draws, "counts": counts, "credit": credit}


@dataclass(frozen=True)
class Block:
    """Draws made together, under one set of weights.

    Args:
        start: Cursor before the first draw.
        domains: (n,) domain of each draw.
        rows: (n,) row within the domain.
        passes: (n,) number of complete passes over the domain before the draw.
        credit: (n, k) credit after each draw; None where draws are independent.
    """

    start: Cursor
    domains: np.ndarray
    rows: np.ndarray
    passes: np.ndarray
    credit: np.ndarray | None

    def cursor(self, used: int) -> Cursor:
        """The cursor after the first `used` draws of the block."""
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
        start: Cursor before the first block.
    """

    def __init__(self, start: Cursor):
        self._blocks: deque[Block] = deque()
        self._start = start  # of the first block
        self._used = 0  # of the first block

    @property
    def position(self) -> int:
        """Number of draws used so far."""
        return self._start.draws + self._used

    def cursor(self) -> Cursor:
        """The cursor after the draws that were used."""
        return self._blocks[0].cursor(self._used) if self._blocks else self._start

    def end(self) -> Cursor:
        """The cursor after all draws that were made."""
        return self._blocks[-1].cursor(len(self._blocks[-1].rows)) if self._blocks else self._start

    def append(self, block: Block) -> None:
        """Add a block, which must begin at `end`."""
        self._blocks.append(block)

    def use(self, count: int) -> None:
        """Count the next `count` draws as used."""
        self._used += count
        while self._blocks and self._used >= len(self._blocks[0].rows):
            block = self._blocks.popleft()
            self._start = block.cursor(len(block.rows))
            self._used -= len(block.rows)

    def rewind(self) -> None:
        """Forget the draws that were made and not used."""
        self._start, self._used = self.cursor(), 0
        self._blocks.clear()
