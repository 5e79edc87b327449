"""Which weights govern which draws: decided piece by piece, as far as they are known."""

from collections.abc import Sequence

import numpy as np

from llmmix.mixing.checks import check_weights


class Schedule:
    """The weights of draws to come, and where they end.

    Args:
        parts: (weights (k,), place of the first draw that they no longer govern) in the order of
            the draws; the last place may be infinite.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, float]]):
        self._parts = list(parts)

    @classmethod
    def of_segments(cls, segments: Sequence[tuple], names: list[str], start: int) -> "Schedule":
        """A schedule of weights by the number of draws that they govern.

        Args:
            segments: (weights, number of draws), of which the last number may be None: without end.
            names: Names of the domains.
            start: Place of the first draw.

        Raises:
            ValueError: `segments` is empty, a number of draws is negative, not whole, or follows
                one that is None; weights as `check_weights` refuses them.
        """
        parts: list[tuple[np.ndarray, float]] = []
        end: float = start
        for weights, draws in segments:
            weights = check_weights(weights, names)
            if end == np.inf or not (draws is None or draws == int(draws) >= 0):
                raise ValueError(
                    "`segments` must be of whole numbers of draws, of which only the last may be "
                    f"None, got {draws!r}."
                )
            end = np.inf if draws is None else end + int(draws)
            parts.append((weights, end))
        if not parts:
            raise ValueError("`segments` is empty: decide at least one.")
        return cls(parts)

    @classmethod
    def of_state(cls, state: Sequence[Sequence]) -> "Schedule":
        """The schedule that `state` was taken of."""
        return cls([(np.array(w), np.inf if end is None else end) for w, end in state])

    def state(self) -> list[list]:
        """All parts, as JSON has it."""
        return [[w.tolist(), None if end == np.inf else end] for w, end in self._parts]

    def at(self, place: int) -> tuple[np.ndarray, float]:
        """The weights of a draw, or of the last one decided, and where they end."""
        ahead = (part for part in self._parts if place < part[1])
        return next(ahead, self._parts[-1])

    @property
    def end(self) -> float:
        """Place of the first draw that is not decided, infinite where all are."""
        return self._parts[-1][1]
