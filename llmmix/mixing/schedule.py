"""Which weights apply to which draws of a `MixtureSampler` (llmmix/mixing/sampler.py)."""

from collections.abc import Sequence

import numpy as np

from llmmix.mixing.checks import check_weights


class Schedule:
    """The weights of draws, and the place where the plan ends.

    Args:
        parts: (weights (k,), place of the first draw after them) in the order of the draws; the
            last place may be infinite.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, float]]):
        self._parts = list(parts)

    @classmethod
    def of_segments(cls, segments: Sequence[tuple], names: list[str], start: int) -> "Schedule":
        """A schedule from weights and the number of draws that each applies to.

        Args:
            segments: (weights, number of draws) each; the last number may be None, for no end.
            names: Names of the domains.
            start: Place of the first draw.

        Raises:
            ValueError: `segments` is empty; a number of draws is negative, not whole, or follows
                one that is None; or `check_weights` refuses weights.
        """
        parts: list[tuple[np.ndarray, float]] = []
        end: float = start
        for weights, draws in segments:
            weights = check_weights(weights, names)
            if end == np.inf or not (draws is None or draws == int(draws) >= 0):
                raise ValueError(
                    "`segments` must have whole numbers of draws, of which only the last may be "
                    f"None, got {draws!r}."
                )
            end = np.inf if draws is None else end + int(draws)
            parts.append((weights, end))
        if not parts:
            raise ValueError("`segments` is empty: decide at least one.")
        return cls(parts)

    @classmethod
    def of_state(cls, state: Sequence[Sequence]) -> "Schedule":
        """The schedule that `state` describes."""
        return cls([(np.array(w), np.inf if end is None else end) for w, end in state])

    def state(self) -> list[list]:
        """All parts, as JSON values."""
        return [[w.tolist(), None if end == np.inf else end] for w, end in self._parts]

    def at(self, place: int) -> tuple[np.ndarray, float]:
        """The weights of the draw at `place`, or of the last draw, and the place where they end."""
        ahead = (part for part in self._parts if place < part[1])
        return next(ahead, self._parts[-1])

    @property
    def end(self) -> float:
        """Place of the first draw after the schedule; infinite if it has no end."""
        return self._parts[-1][1]
