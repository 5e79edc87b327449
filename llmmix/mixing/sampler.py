"""`MixtureSampler`: draws rows of named domains, in shares that may change at any draw.

    domain of draw i ~ weights decided for i, from number i of the random stream (seed)
    its row          = the next of that domain's shuffled pass, from the stream (seed, domain)

Draw i depends on the seed, on i, on the weights decided for it and on the draws before it. It does
not depend on the number of processes, loader workers or restarts.

A weight is the share of a domain among the rows drawn. With `unit="tokens"` it is the share among
the scored tokens, as the mean number of scored tokens of each domain's rows gives it.

Neighbours: which weights apply to which draws, llmmix/mixing/schedule.py; which rows are drawn,
llmmix/mixing/passes.py; draws made ahead, llmmix/mixing/blocks.py; the random numbers,
llmmix/mixing/draws.py; how a trainer uses it, llmmix/mixing/callback.py.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from llmmix.mixing.blocks import Block, BlockQueue, Cursor
from llmmix.mixing.checks import check_weights
from llmmix.mixing.draws import choose, choose_evenly, shares_of_rows, uniforms
from llmmix.mixing.passes import EXHAUSTED, Limits, Passes
from llmmix.mixing.schedule import Schedule

CHUNK = 1024  # draws made together where the sampler is iterated
UNITS = ("examples", "tokens")
DRAWS = ("multinomial", "even")
STATE_VERSION = 1


class MixtureSampler(Sampler[int]):
    """Draws rows of domains without end, as indices into the domains one after the other.

    Args:
        domains: Rows by name: sized datasets or sequences, of which only the length is used. A
            domain without a length, such as a stream, is drawn in its own order and never ends.
        weights: (k,) in the order of `domains` or by name, scaled to sum to one. Default: equal. A
            domain of weight 0 is never drawn.
        seed: Seed of the draws, 0 or more.
        unit: Unit of the shares: "examples" (rows), or "tokens" (scored tokens).
        tokens_per_row: Mean number of scored tokens of a row, by domain, for `unit="tokens"`.
            Default: `attach_mixture` counts them.
        method: "multinomial" makes every draw independently; "even" spaces the draws of a domain
            evenly, so that its number in any stretch of a run is right to within two rows.
        max_epochs: Passes over a domain after which it has no rows left, one number or by name.
            Default: 1, or no limit where `exhausted` is "reshuffle".
        exhausted: What happens when a domain has no rows left: "reshuffle" begins another pass in
            another order, "stop" ends the draws at the next draw of the domain, and "spill" gives
            its share to the other domains in proportion to their shares.

    Attributes:
        version: Number of the plan. Whoever has drawn ahead must draw again when it rises.

    Raises:
        ValueError: `domains` is not a mapping, is empty or has a domain without rows; `unit`,
            `method` or `exhausted` is none of its choices; `seed` is out of range; `tokens_per_row`
            or `max_epochs` is not positive or has other names than the domains; or `check_weights`
            refuses `weights`.
    """

    def __init__(
        self,
        domains: Mapping[str, Sized],
        weights: Any = None,
        *,
        seed: int = 0,
        unit: str = "examples",
        tokens_per_row: Mapping[str, float] | None = None,
        method: str = "multinomial",
        max_epochs: float | Mapping[str, float] | None = None,
        exhausted: str = "reshuffle",
    ):
        self.names = _check_domains(domains)
        _check_options(unit, method, exhausted, seed)
        self.seed, self.unit, self.method, self.exhausted = seed, unit, method, exhausted
        self.tokens_per_row = _check_tokens(tokens_per_row, self.names)
        self.version = 0
        self._limits = Limits(self.names, exhausted, max_epochs)
        equal = [1] * len(self.names)
        self._initial = check_weights(equal if weights is None else weights, self.names)
        self.bind({name: [_length(rows)] for name, rows in domains.items()})

    def bind(self, sizes: Mapping[str, Sequence[int | None]]) -> None:
        """Set the number of rows of each domain, by stratum (see `Passes`), and start from draw 0.

        Raises:
            ValueError: A domain or one of its strata has no rows.
        """
        self.passes = Passes(self.names, sizes, self.seed)
        self._limits.bind(self.sizes)
        self.reset()

    def reset(self) -> None:
        """Start from draw 0, with the initial weights."""
        counts = np.zeros_like(self.passes.strata)
        self._queue = BlockQueue(Cursor(0, counts, np.zeros(len(self.names))))
        self.set_weights(self._initial)

    @property
    def sizes(self) -> np.ndarray:
        """(k,) rows of each domain."""
        return self.passes.sizes

    @property
    def capacity(self) -> dict[str, float]:
        """Number of draws that each domain allows; infinite for no limit."""
        return dict(zip(self.names, self._limits.capacity.tolist(), strict=True))

    # The plan

    def set_weights(self, weights: Any) -> None:
        """Apply weights, given as to the constructor, to every draw that was not used yet.

        Raises:
            ValueError: `check_weights` refuses `weights`.
        """
        weights = check_weights(weights, self.names)
        if self.position == 0:
            self._initial = weights  # `reset` returns to them
        self.set_plan([(weights, None)])

    def set_plan(self, segments: Sequence[tuple[Any, int | None]]) -> None:
        """Decide the weights of the coming draws; nothing is drawn past the last segment.

        Args:
            segments: (weights, number of draws) each; the last number may be None, for no end.

        Raises:
            ValueError: `Schedule.of_segments` refuses `segments`.
        """
        schedule = Schedule.of_segments(segments, self.names, self.position)
        self.rewind()
        self._schedule = schedule
        self.version += 1

    @property
    def weights(self) -> np.ndarray:
        """(k,) weights of the next draw; at the end of the plan, those of the last draw."""
        return self._schedule.at(self.position)[0].copy()

    @property
    def position(self) -> int:
        """Number of draws used so far."""
        return self._queue.position

    @property
    def remaining(self) -> float:
        """Number of draws that the plan still holds."""
        return self._schedule.end - self.position

    @property
    def counts(self) -> dict[str, int]:
        """Number of draws used, by domain."""
        return dict(zip(self.names, self._queue.cursor().counts.sum(1).tolist(), strict=True))

    # Drawing

    def __iter__(self) -> Iterator[int]:
        """Indices of the rows, from the first draw that was not used yet."""
        self.rewind()
        first = self.passes.first_rows()
        while block := self.take(CHUNK):
            version = self.version
            for index in (first[block.domains] + block.rows).tolist():
                self.use(1)
                yield index
                if self.version != version:  # the consumer changed the plan
                    break

    def take(self, count: int) -> Block | None:
        """Draw ahead: up to `count` draws after the last one made, under one set of weights.

        Draws count once `use` is called. A new plan forgets those that were not used.

        Returns:
            The draws; None at the end of the plan, or where the domains have no rows left.

        Raises:
            ValueError: `unit` is "tokens" and `tokens_per_row` is None.
        """
        cursor = self._queue.end()
        weights, end = self._schedule.at(cursor.draws)
        count, drawn = int(min(count, end - cursor.draws)), cursor.counts.sum(1)
        if self.unit == "tokens":
            weights = shares_of_rows(weights, self.names, self.tokens_per_row)
        shares = self._limits.open_shares(weights, drawn)
        if shares is None or count <= 0:
            return None
        if self.method == "even":
            domains, credit = choose_evenly(shares, cursor.credit, count)
        else:
            numbers = uniforms(self.seed, "domains", cursor.draws, count)
            domains, credit = choose(shares, numbers), None
        count = self._limits.draws_before_end(domains, drawn)
        if count == 0:
            return None
        rows, passes = self.passes.rows(domains[:count], cursor)
        credit = None if credit is None else credit[:count]
        self._queue.append(block := Block(cursor, domains[:count], rows, passes, credit))
        return block

    def use(self, count: int) -> None:
        """Count the next `count` draws that `take` made as used."""
        self._queue.use(count)

    def rewind(self) -> None:
        """Forget the draws that were made and not used."""
        self._queue.rewind()

    # State

    def state_dict(self) -> dict:
        """The state that decides all later draws, as JSON values."""
        settings = _settings(self, self._limits.max_epochs)
        cursor, plan = self._queue.cursor().state(), self._schedule.state()
        return {"version": STATE_VERSION, "settings": settings, **cursor, "plan": plan}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`; draws made since are forgotten.

        Raises:
            ValueError: The state is of other domains or settings, or of another version.
        """
        _check_state(state, _settings(self, self._limits.max_epochs))
        self._queue = BlockQueue(Cursor.of_state(state, self.passes.strata.shape))
        self._schedule = Schedule.of_state(state["plan"])
        self.version += 1


def _check_domains(domains: Mapping[str, Sized]) -> list[str]:
    """The names of the domains."""
    if not isinstance(domains, Mapping) or not domains:
        raise ValueError(
            "`domains` must map the name of each domain to its rows, at least one, got "
            f"{domains!r:.80}."
        )
    return list(domains)


def _check_options(unit: str, method: str, exhausted: str, seed: int) -> None:
    for argument, value, choices in (
        ("unit", unit, UNITS),
        ("method", method, DRAWS),
        ("exhausted", exhausted, EXHAUSTED),
    ):
        if value not in choices:
            raise ValueError(f"{_flag(argument)} must be one of {choices}, got {value!r}.")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"`seed` must be an integer from 0 to 2**64 - 1, got {seed!r}.")


def _flag(argument: str) -> str:
    """How an error names an argument: first by its flag, where a recipe's has another name."""
    flag = {"unit": "weight_unit", "method": "draws"}.get(argument)
    return f"`{flag}` (`{argument}`)" if flag else f"`{argument}`"


def _check_tokens(
    given: Mapping[str, float] | None, names: list[str]
) -> Mapping[str, float] | None:
    if given is None:
        return None
    known = isinstance(given, Mapping) and set(given) == set(names)
    if not known or not all(0 < n < np.inf for n in given.values()):
        raise ValueError(
            f"`tokens_per_row` must give each of {names} a positive number, got {given!r}."
        )
    return given


def _length(rows: Sized) -> int | None:
    try:
        return len(rows)
    except TypeError:
        return None


def _settings(sampler: MixtureSampler, max_epochs: np.ndarray) -> dict:
    """The settings that must be the same when a state is loaded."""
    strata = zip(sampler.names, sampler.passes.strata.tolist(), strict=True)
    return {
        # A list, since a trainer's state sorts the keys of a mapping
        "domains": [[name, sizes] for name, sizes in strata],
        "seed": sampler.seed,
        "unit": sampler.unit,
        "method": sampler.method,
        "exhausted": sampler.exhausted,
        "tokens_per_row": sampler.unit == "tokens" and sampler.tokens_per_row,
        "max_epochs": [None if np.isinf(n) else n for n in max_epochs.tolist()],
    }


def _check_state(state: dict, ours: dict) -> None:
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"The mixture's state has version {state.get('version')!r}, and this release reads "
            f"{STATE_VERSION}: continue with the release that wrote it."
        )
    for name, value in ours.items():
        theirs = state["settings"].get(name)
        if theirs != value:
            raise ValueError(
                f"The mixture to resume has {_flag(name)} {theirs}, and this one {value}: use the "
                "same value, or begin a new run."
            )
