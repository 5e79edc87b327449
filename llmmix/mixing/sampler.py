"""MixtureSampler: rows of named domains in shares that may change at any draw.

    domain of draw i ~ weights decided for i, from number i of the stream (seed)
    its row          = the next of that domain's shuffled pass, from the stream (seed, domain)

So draw i depends on the seed, on i, on the weights decided for it and on the draws before it, and
on nothing else: not on the number of processes, loader workers or restarts. What a trainer does
with it is in llmmix/mixing/callback.py.

A weight means one thing: the share of the rows drawn. With `unit="tokens"` it means the share of
the tokens that are scored, by each domain's mean per row.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized

import numpy as np
from torch.utils.data import Sampler

from llmmix.mixing.controllers import check_weights
from llmmix.mixing.draws import Block, Cursor, choose, choose_evenly, shuffles, uniforms

CHUNK = 1024  # draws made at once when they are asked for one by one
UNITS = ("examples", "tokens")
METHODS = ("multinomial", "even")
EXHAUSTED = ("reshuffle", "stop", "spill")
STATE_VERSION = 1
ENDLESS = 1 << 60  # rows of a domain without a length


class MixtureSampler(Sampler[int]):
    """Draws rows of domains without end, as indices into the domains one after the other.

    Args:
        domains: Rows by name, of which only the number counts: sized datasets, sequences. One
            without a length, such as a stream, is drawn in its own order and never ends.
        weights: (k,) in the order of `domains` or by name, scaled to sum to one; equal by default.
            A domain of weight 0 is never drawn.
        seed: Of the draws, from 0 on.
        unit: What a weight is a share of: "examples", or the "tokens" that are scored.
        tokens_per_row: Mean scored tokens a row of each domain by name, for `unit="tokens"`;
            `attach_mixture` counts them where they are left out.
        method: "multinomial", every draw on its own, or "even", which spaces the draws of a domain
            evenly, so that any stretch of a run has its share to within two rows.
        max_epochs: Passes over a domain, one number or by name, at which `exhausted` sets in; 1
            unless `exhausted` is "reshuffle", which knows no limit.
        exhausted: When a domain has no rows left: "reshuffle" begins its next pass in another
            order, "stop" ends the draws when it is to be drawn again, "spill" gives its share to
            the other domains in proportion to theirs.

    Raises:
        ValueError: No domain, an empty one, or one of the settings out of range; weights as
            `check_weights` refuses them.
    """

    def __init__(
        self,
        domains: Mapping[str, Sized],
        weights=None,
        *,
        seed: int = 0,
        unit: str = "examples",
        tokens_per_row: Mapping[str, float] | None = None,
        method: str = "multinomial",
        max_epochs: float | Mapping[str, float] | None = None,
        exhausted: str = "reshuffle",
    ):
        if not isinstance(domains, Mapping) or not domains:
            raise ValueError(
                "`domains` must map the name of each domain to its rows, at least one, got "
                f"{domains!r:.80}."
            )
        for argument, value, choices in (
            ("unit", unit, UNITS),
            ("method", method, METHODS),
            ("exhausted", exhausted, EXHAUSTED),
        ):
            if value not in choices:
                raise ValueError(f"`{argument}` must be one of {choices}, got {value!r}.")
        if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ValueError(f"`seed` must be an integer from 0 to 2**64 - 1, got {seed!r}.")
        self.names = list(domains)
        self.seed, self.unit, self.method, self.exhausted = seed, unit, method, exhausted
        self.tokens_per_row = tokens_per_row
        if tokens_per_row is not None:
            self._check_tokens()
        self.version = 0  # of the plan: whoever drew ahead of it draws again when it rises
        self._max_epochs = self._check_max_epochs(max_epochs)
        equal = [1] * len(self.names)
        self._initial = check_weights(equal if weights is None else weights, self.names)
        self.bind({name: [_length(rows)] for name, rows in domains.items()})

    def _check_max_epochs(self, given) -> np.ndarray:
        if self.exhausted == "reshuffle":
            if given is not None:
                raise ValueError(
                    f"`max_epochs={given}` needs `exhausted` 'stop' or 'spill': 'reshuffle' begins "
                    "another pass, however many there were."
                )
            return np.full(len(self.names), np.inf)
        if isinstance(given, Mapping):
            if unknown := set(given) - set(self.names):
                raise ValueError(f"`max_epochs` names {sorted(unknown)}, no domain.")
            given = [given.get(name, np.inf) for name in self.names]
        try:
            allowed = np.asarray(1.0 if given is None else given, float)
            allowed = np.broadcast_to(allowed, len(self.names))
        except (TypeError, ValueError):
            raise ValueError(
                f"`max_epochs` must be one number, or numbers by name, got {given!r}."
            ) from None
        if not (allowed > 0).all():
            raise ValueError(f"`max_epochs` must be positive, got {given}.")
        return allowed

    def _check_tokens(self) -> None:
        given = self.tokens_per_row
        known = isinstance(given, Mapping) and set(given) == set(self.names)
        if not known or not all(0 < n < np.inf for n in given.values()):
            raise ValueError(
                f"`tokens_per_row` must give each of {self.names} a positive number, got {given!r}."
            )

    def bind(self, sizes: Mapping[str, Sequence[int | None]]) -> None:
        """Set how many rows each domain has, before the first draw.

        Args:
            sizes: By name, the rows of each stratum: draw i comes from stratum i modulo their
                number. None is without end.

        Raises:
            ValueError: A domain or a stratum of it without rows.
        """
        for name, parts in sizes.items():
            if 0 in parts:
                which = "has no rows" if len(parts) == 1 else "has no rows in one of its strata"
                raise ValueError(f"`domains`: {name!r} {which}; leave it out or give it some.")
        self._sizes = np.array(
            [[ENDLESS if n is None else n for n in sizes[name]] for name in self.names]
        )
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self._capacity = np.floor(self._max_epochs * self.sizes)
        self.reset()

    @property
    def sizes(self) -> np.ndarray:
        """(k,) rows of each domain."""
        return self._sizes.sum(1)

    @property
    def endless(self) -> bool:
        """Whether a domain has no length."""
        return bool((self._sizes == ENDLESS).any())

    def reset(self) -> None:
        """Begin anew, with the weights given at first."""
        self._blocks: deque[Block] = deque()  # drawn and not yet used
        # At the start of the first block
        self._base = Cursor(0, np.zeros_like(self._sizes), np.zeros(len(self.names)))
        self._used = 0  # of the first block
        self.set_weights(self._initial)

    # What is decided

    def set_weights(self, weights) -> None:
        """Let weights govern every draw that has not been used yet.

        Args:
            weights: As those of the constructor.
        """
        weights = check_weights(weights, self.names)
        if self.position == 0:
            self._initial = weights  # a run begins with them
        self.set_plan([(weights, None)])

    def set_plan(self, segments: Sequence[tuple]) -> None:
        """Decide the draws to come, as far as they are known; nothing is drawn past the last.

        Args:
            segments: (weights, number of draws), of which the last number may be None: without end.

        Raises:
            ValueError: As `check_weights`.
        """
        plan, end = [], self.position
        for weights, draws in segments:
            weights = check_weights(weights, self.names)
            if end is None or not (draws is None or draws == int(draws) >= 0):
                raise ValueError(
                    "`segments` must be of whole numbers of draws, of which only the last may be "
                    f"None, got {draws!r}."
                )
            end = None if draws is None else end + int(draws)
            plan.append((weights, end))
        if not plan:
            raise ValueError("`segments` is empty: decide at least one.")
        self.rewind()
        self._plan = plan
        self.version += 1

    @property
    def weights(self) -> np.ndarray:
        """(k,) the weights decided for the next draw, or of the last one decided."""
        return self._decided(self.position)[0].copy()

    def _decided(self, place: int) -> tuple[np.ndarray, int | None]:
        """The weights of a draw, or of the last one decided, and where they end."""
        ahead = (part for part in self._plan if part[1] is None or place < part[1])
        return next(ahead, self._plan[-1])

    @property
    def position(self) -> int:
        """Draws used so far."""
        return self._base.draws + self._used

    @property
    def remaining(self) -> float:
        """Draws that are decided and not used yet."""
        end = self._plan[-1][1]
        return np.inf if end is None else end - self.position

    @property
    def counts(self) -> dict[str, int]:
        """Draws used of each domain."""
        return dict(zip(self.names, self._cursor().counts.sum(1).tolist(), strict=True))

    @property
    def capacity(self) -> dict[str, float]:
        """Draws that each domain allows, infinite where it has no limit."""
        return dict(zip(self.names, self._capacity.tolist(), strict=True))

    # Drawing

    def __iter__(self) -> Iterator[int]:
        """Go on from the first draw not used yet."""
        self.rewind()
        first = self.first_rows()
        while block := self.take(CHUNK):
            version = self.version
            for index in (first[block.domains] + block.rows).tolist():
                self._used += 1
                yield index
                if self.version != version:  # the plan was changed by whoever reads
                    break
            self._settle()

    def take(self, count: int) -> Block | None:
        """Draw ahead: up to `count` draws after those drawn before, under one set of weights.

        They count as drawn once `use` says so; a new plan forgets those that do not.

        Returns:
            None at the end of what is decided, or of what the domains hold.
        """
        last = self._blocks[-1] if self._blocks else None
        cursor = last.cursor(len(last.rows)) if last else self._base
        weights, end = self._decided(cursor.draws)
        if end is not None and cursor.draws >= end:
            return None
        count = count if end is None else min(count, end - cursor.draws)
        weights = self._shares_of_rows(weights)
        if self.exhausted == "spill":
            weights = np.where(cursor.counts.sum(1) < self._capacity, weights, 0.0)
            if not weights.any():
                return None
            weights = weights / weights.sum()
        domains, credit = self._choose(weights, cursor, count)
        count = self._until_exhausted(domains, cursor)
        if count == 0:
            return None
        domains, credit = domains[:count], None if credit is None else credit[:count]
        block = Block(cursor, domains, *self._rows(domains, cursor), credit)
        self._blocks.append(block)
        return block

    def use(self, count: int) -> None:
        """Count the next draws, made by `take`, as used."""
        self._used += count
        self._settle()

    def _settle(self) -> None:
        while self._blocks and self._used >= len(self._blocks[0].rows):
            block = self._blocks.popleft()
            self._base = block.cursor(len(block.rows))
            self._used -= len(block.rows)

    def rewind(self) -> None:
        """Forget what was drawn ahead and not used."""
        self._base, self._used = self._cursor(), 0
        self._blocks.clear()

    def _cursor(self) -> Cursor:
        return self._blocks[0].cursor(self._used) if self._blocks else self._base

    def first_rows(self) -> np.ndarray:
        """(k,) index of each domain's first row, the domains one after the other."""
        if self.endless:
            raise ValueError("A domain without a length has no indices: see llmmix.mixing.streams.")
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]])

    def _shares_of_rows(self, weights: np.ndarray) -> np.ndarray:
        if self.unit == "examples":
            return weights
        if self.tokens_per_row is None:
            raise ValueError(
                "`unit='tokens'` needs `tokens_per_row`, the mean scored tokens of each domain's "
                "rows; `attach_mixture` counts them."
            )
        shares = weights / [self.tokens_per_row[name] for name in self.names]
        return shares / shares.sum()

    def _choose(self, weights, cursor: Cursor, count: int):
        if self.method == "even":
            return choose_evenly(weights, cursor.credit, count)
        return choose(weights, uniforms(self.seed, "domains", cursor.draws, count)), None

    def _until_exhausted(self, domains: np.ndarray, cursor: Cursor) -> int:
        """How many of the draws come before the first that its domain has no row for.

        With "spill", before the first that its domain's last row has changed the shares of.
        """
        left = self._capacity - cursor.counts.sum(1)
        count, spill = len(domains), self.exhausted == "spill"
        for j in np.flatnonzero(left <= len(domains)):
            own = np.flatnonzero(domains == j)
            if spill and 0 < left[j] <= len(own):
                count = min(count, own[int(left[j]) - 1] + 1)
            elif len(own) > left[j]:
                count = min(count, own[int(left[j])])
        return count

    def _rows(self, domains: np.ndarray, cursor: Cursor) -> tuple[np.ndarray, np.ndarray]:
        """The row of each draw, and the pass over its stratum that it belongs to."""
        strata = self._sizes.shape[1]
        stratum = (cursor.draws + np.arange(len(domains))) % strata
        rows, passes = np.empty(len(domains), np.int64), np.zeros(len(domains), np.int64)
        before = np.cumsum(self._sizes, axis=1) - self._sizes
        for j, s in np.ndindex(self._sizes.shape):
            own = np.flatnonzero((domains == j) & (stratum == s))
            if not len(own):
                continue
            places = cursor.counts[j, s] + np.arange(len(own))
            if self._sizes[j, s] == ENDLESS:
                rows[own] = places
                continue
            passes[own], places = np.divmod(places, self._sizes[j, s])
            first, orders = self._shuffled(j, s, passes[own[0]], passes[own[-1]])
            rows[own] = before[j, s] + orders[passes[own] - first, places]
        return rows, passes

    def _shuffled(self, j: int, s: int, first: int, last: int) -> tuple[int, np.ndarray]:
        """The orders of some passes over a stratum, the last of which is kept."""
        known, orders = self._orders.get((j, s), (-1, None))
        stream = f"rows of {self.names[j]}, {s}"
        size = int(self._sizes[j, s])
        if known != first:
            orders = shuffles(self.seed, stream, size, first, last)
        elif last > first:
            new = shuffles(self.seed, stream, size, first + 1, last)
            orders = np.concatenate([orders, new])
        self._orders[j, s] = (last, orders[-1:])
        return first, orders

    # State

    def state_dict(self) -> dict:
        """All that decides the draws to come, as JSON has it."""
        cursor = self._cursor()
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "draws": cursor.draws,
            "counts": cursor.counts.tolist(),
            "credit": cursor.credit.tolist(),
            "plan": [[weights.tolist(), end] for weights, end in self._plan],
        }

    def _settings(self) -> dict:
        return {
            # A list, since a trainer's state sorts the keys of a mapping
            "domains": [[n, s.tolist()] for n, s in zip(self.names, self._sizes, strict=True)],
            "seed": self.seed,
            "unit": self.unit,
            "method": self.method,
            "exhausted": self.exhausted,
            "tokens_per_row": self.unit == "tokens" and self.tokens_per_row,
            "max_epochs": [None if np.isinf(n) else n for n in self._max_epochs.tolist()],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`, whatever was drawn since.

        Raises:
            ValueError: A state of other domains or settings, or of another version.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"The mixture's state has version {state.get('version')!r}, this release reads "
                f"{STATE_VERSION}: go on with the release that wrote it."
            )
        ours = self._settings()
        for name, value in ours.items():
            theirs = state["settings"].get(name)
            if theirs != value:
                raise ValueError(
                    f"The mixture to resume has `{name}` {theirs}, this one has {value}: give it "
                    "the same, or begin anew."
                )
        counts = np.array(state["counts"], dtype=np.int64).reshape(self._sizes.shape)
        self._blocks.clear()
        self._base = Cursor(state["draws"], counts, np.array(state["credit"]))
        self._used = 0
        self._plan = [(np.array(weights), end) for weights, end in state["plan"]]
        self.version += 1


def _length(rows) -> int | None:
    try:
        return len(rows)
    except TypeError:
        return None
