"""Which row of its domain a draw gets, pass after pass, and what happens when rows run out.

`MixtureSampler` (llmmix/mixing/sampler.py) decides the domain of a draw.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from llmmix.mixing.blocks import Cursor
from llmmix.mixing.draws import shuffles

ENDLESS = 1 << 60  # rows of a domain without a length
EXHAUSTED = ("reshuffle", "stop", "spill")


class Passes:
    """The row of each draw of a domain.

        row = the next one of the domain's shuffled pass, from the random stream (seed, domain)

    Args:
        names: Names of the domains.
        sizes: Number of rows of each stratum, by domain; draw i comes from stratum i modulo the
            number of strata. None: a domain without a length, which is read in its own order.
        seed: Seed of the orders.

    Attributes:
        strata: (k, strata) rows of each stratum, `ENDLESS` for a domain without a length.
        sizes: (k,) rows of each domain.
        endless: Whether any domain has no length.

    Raises:
        ValueError: A domain or one of its strata has no rows.
    """

    def __init__(self, names: list[str], sizes: Mapping[str, Sequence[int | None]], seed: int):
        for name, parts in sizes.items():
            if 0 in parts:
                which = "has no rows" if len(parts) == 1 else "has no rows in one of its strata"
                raise ValueError(f"`domains`: {name!r} {which}; leave it out or give it some.")
        self.strata = np.array(
            [[ENDLESS if n is None else n for n in sizes[name]] for name in names]
        )
        self.sizes: np.ndarray = self.strata.sum(1)
        self.endless = bool((self.strata == ENDLESS).any())
        self._names, self._seed = names, seed
        # (domain, stratum) -> the last pass that was shuffled, and its order
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def first_rows(self) -> np.ndarray:
        """(k,) index of each domain's first row if the domains stand one after the other.

        Raises:
            ValueError: A domain has no length.
        """
        if self.endless:
            raise ValueError("A domain without a length has no indices: see llmmix.mixing.streams.")
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]])

    def rows(self, domains: np.ndarray, cursor: Cursor) -> tuple[np.ndarray, np.ndarray]:
        """The row of each draw, and the number of its pass over the stratum.

        Args:
            domains: (n,) domain of each draw.
            cursor: Cursor before the first of them.

        Returns:
            (n,) rows within the domain and (n,) passes, from 0 on.
        """
        stratum = (cursor.draws + np.arange(len(domains))) % self.strata.shape[1]
        rows, passes = np.empty(len(domains), np.int64), np.zeros(len(domains), np.int64)
        before = np.cumsum(self.strata, axis=1) - self.strata
        for j, s in np.ndindex(self.strata.shape):
            own = np.flatnonzero((domains == j) & (stratum == s))
            if not len(own):
                continue
            places = cursor.counts[j, s] + np.arange(len(own))
            if self.strata[j, s] == ENDLESS:
                rows[own] = places
                continue
            passes[own], places = np.divmod(places, self.strata[j, s])
            first = passes[own[0]]
            orders = self._orders_of(j, s, first, passes[own[-1]])
            rows[own] = before[j, s] + orders[passes[own] - first, places]
        return rows, passes

    def _orders_of(self, j: int, s: int, first: int, last: int) -> np.ndarray:
        """(passes, rows) orders of passes `first` to `last` over a stratum; keeps the last one."""
        stream = f"rows of {self._names[j]}, {s}"
        size = int(self.strata[j, s])
        known, orders = self._orders.get((j, s), (-1, np.empty((0, size), np.int64)))
        if known != first:
            orders = shuffles(self._seed, stream, size, first, last)
        elif last > first:
            new = shuffles(self._seed, stream, size, first + 1, last)
            orders = np.concatenate([orders, new])
        self._orders[j, s] = (last, orders[-1:])
        return orders


class Limits:
    """How many draws each domain allows, and what happens when a domain has no rows left.

    Args:
        names: Names of the domains.
        exhausted: One of `EXHAUSTED`; `MixtureSampler` describes them.
        max_epochs: Maximum number of passes over a domain, one number or by name.

    Raises:
        ValueError: `max_epochs` is not a positive number, names an unknown domain, or is given
            although `exhausted` is "reshuffle".
    """

    def __init__(
        self, names: list[str], exhausted: str, max_epochs: float | Mapping[str, float] | None
    ):
        self.exhausted = exhausted
        self.max_epochs = _check_max_epochs(names, exhausted, max_epochs)
        self.capacity = self.max_epochs  # (k,) draws that each domain allows, after `bind`

    def bind(self, sizes: np.ndarray) -> None:
        """Set the numbers of rows (k,) from which the allowed draws follow."""
        # 0.29 * 100 is 28.999...
        self.capacity = np.floor(self.max_epochs * sizes * (1 + 1e-12))

    def open_shares(self, shares: np.ndarray, drawn: np.ndarray) -> np.ndarray | None:
        """The shares of the domains that have rows left; None if no domain with a share has any.

        Args:
            shares: (k,) on the simplex.
            drawn: (k,) draws of each domain so far.
        """
        if self.exhausted != "spill":
            return shares
        shares = np.where(drawn < self.capacity, shares, 0.0)
        return shares / shares.sum() if shares.any() else None

    def draws_before_end(self, domains: np.ndarray, drawn: np.ndarray) -> int:
        """Number of draws before the first one for which its domain has no row left.

        With "spill": before the first one that comes after a domain's last row, from which on the
        shares differ.

        Args:
            domains: (n,) domain of each draw.
            drawn: (k,) draws of each domain before these.
        """
        left = self.capacity - drawn
        count, spill = len(domains), self.exhausted == "spill"
        for j in np.flatnonzero(left <= len(domains)):
            own = np.flatnonzero(domains == j)
            if spill and 0 < left[j] <= len(own):
                count = min(count, own[int(left[j]) - 1] + 1)
            elif len(own) > left[j]:
                count = min(count, own[int(left[j])])
        return int(count)


def _check_max_epochs(
    names: list[str], exhausted: str, given: float | Mapping[str, float] | None
) -> np.ndarray:
    """(k,) passes that each domain allows; infinite for no limit."""
    if exhausted == "reshuffle":
        if given is not None:
            raise ValueError(
                f"`max_epochs={given}` needs `exhausted` 'stop' or 'spill': 'reshuffle' always "
                "begins another pass."
            )
        return np.full(len(names), np.inf)
    values: object = 1.0 if given is None else given
    if isinstance(given, Mapping):
        if unknown := set(given) - set(names):
            raise ValueError(f"`max_epochs`: no domain {sorted(unknown)}; there are {names}.")
        values = [given.get(name, np.inf) for name in names]
    try:
        allowed = np.broadcast_to(np.asarray(values, float), len(names))
    except (TypeError, ValueError):
        raise ValueError(
            f"`max_epochs` must be one number, or numbers by name, got {given!r}."
        ) from None
    if not (allowed > 0).all():
        raise ValueError(f"`max_epochs` must be positive, got {given}.")
    return allowed
