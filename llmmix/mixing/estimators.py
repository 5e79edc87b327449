"""Aioli's controllers: which mixtures to train on next, and what the losses say of the domains.

`OneHotAioli` is the paper's, `RegressionAioli` ours; llmmix/mixing/aioli.py describes both.
"""

import copy
import logging
from typing import TYPE_CHECKING

import numpy as np

from llmmix.mixing.controllers import Observation, Segment, check_weights
from llmmix.mixing.draws import shuffles
from llmmix.mixing.influence import (
    InfluenceMatrix,
    normalize_matrix,
    probe_mixtures,
    solve_mixing_matrix,
    update_weights,
    with_floor,
)
from llmmix.mixing.regression import InfluenceRegression, advantage

if TYPE_CHECKING:
    from llmmix.mixing.aioli import AioliConfig

logger = logging.getLogger(__name__)

# Measurements before the regression first moves: the fall that every loss begins with says little
BEFORE_MOVING = 7


class Aioli:
    """The controller: what both estimators share.

    Args:
        config: Its options.
        names: Of the m domains.
        targets: Of the n validation targets.
        weights: (m,) p0, unless the config names another.
    """

    def __init__(self, config: "AioliConfig", names: list[str], targets: list[str], weights):
        self.config, self.names, self.targets = config, list(names), list(targets)
        if not targets:
            raise ValueError("Aioli needs at least one target with rows to measure a loss on.")
        given = weights if config.prior_weights is None else config.prior_weights
        self.prior = check_weights(given, self.names, "prior_weights")
        official = config.compat == "official"
        self.anchor = self.prior
        if official or config.anchor == "uniform":
            self.anchor = np.full(len(names), 1 / len(names))
        self.floor = 0.0 if official else config.min_share / len(names)
        u = [1.0] * len(targets) if config.target_weights is None else config.target_weights
        self.u = check_weights(u, self.targets, "target_weights") * len(targets)
        self.weights = self.prior.copy()
        self.losses: np.ndarray | None = None  # as last measured
        self.matrix: np.ndarray | None = None  # (n, m), as last estimated
        self.cycles = 0  # begun
        self.skipped = 0  # measurements that were not finite
        if len(names) == 1:
            logger.warning("Aioli has nothing to mix: %r is the only domain.", names[0])

    def first_step(self, total_steps: int) -> int:
        """When measuring begins: losses that fall as the rate warms up say nothing of domains."""
        given = self.config.first_step
        if given is None:
            given = 0 if self.config.compat else total_steps // 10
        return min(max(given, self.config.prior_steps), total_steps)

    def update_steps(self, total_steps: int, share: int, least: int = 1) -> int:
        """Steps between updates: as configured, or a share of the run and `least` at least."""
        return self.config.update_steps or max(least, total_steps // share)

    def read(self, observation: Observation) -> np.ndarray | None:
        """What the losses shed since they were last measured, None where that is not known."""
        now = np.asarray(observation.signal["losses"], dtype=np.float64)
        if not np.isfinite(now).all():
            self.skipped += 1
            bad = [t for t, loss in zip(self.targets, now, strict=True) if not np.isfinite(loss)]
            logger.warning(
                "Step %d: the loss of %s is not finite; the last weights are kept.",
                observation.step,
                bad,
            )
            self.losses = None
            return None
        before, self.losses = self.losses, now
        return None if before is None else before - now

    def influence(self) -> InfluenceMatrix | None:
        """The last estimate, with the names of its axes."""
        if self.matrix is None:
            return None
        return InfluenceMatrix(self.matrix, tuple(self.targets), tuple(self.names))

    def record(self) -> dict:
        """The last estimate, rows targets and columns domains."""
        found = None if self.matrix is None else self.matrix.tolist()
        return {"matrix": found, "skipped": self.skipped}

    def _order(self) -> list[int]:
        """Every domain once, in an order of this cycle's own."""
        self.cycles += 1
        stream = f"probes {self.cycles}"
        return shuffles(self.config.order_seed, stream, len(self.names), 0, 0)[0].tolist()

    def state_dict(self) -> dict:
        """All that decides the plans to come, as JSON has it."""
        arrays = {name: getattr(self, name) for name in ("weights", "losses", "matrix")}
        listed = {name: None if x is None else x.tolist() for name, x in arrays.items()}
        axes = {"names": self.names, "targets": self.targets}
        return {**axes, **listed, "cycles": self.cycles, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: It is of other domains or targets.
        """
        for axis in ("names", "targets"):
            if state[axis] != getattr(self, axis):
                raise ValueError(
                    f"The state to resume has the {axis} {state[axis]}, this run has "
                    f"{getattr(self, axis)}: give it the same, in the same order."
                )
        for name in ("weights", "losses", "matrix"):
            setattr(self, name, None if state[name] is None else np.array(state[name]))
        self.cycles, self.skipped = state["cycles"], state["skipped"]


class OneHotAioli(Aioli):
    """The paper's estimator: probes on nearly one-hot mixtures, which are real training steps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.pending: list[int] = []  # domains of this cycle's probes, in turn
        self.probes: list[list] = []  # shares, steps and drops of those that are over
        self.past: np.ndarray | None = None  # the moving average of the matrices
        self.cycle_end = 0
        if len(self.names) > 1:
            probe_mixtures(len(self.names), self.config.one_hot_factor)

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """A cycle in two parts: the losses and the probes; then what is left to the next one."""
        if self.pending:
            self._update()
            return [Segment(self.weights, self.cycle_end - step)]
        begin, m = self.first_step(total_steps), len(self.names)
        if m == 1:
            return [Segment(self.weights, total_steps - step)]
        every = self.update_steps(total_steps, 10, least=4 * m * self.config.rounds)
        length = self._probe_steps(every, step == 0)
        if step < begin:
            return [Segment(self.weights, begin - step)]
        self.cycle_end = min(step + every, total_steps)
        probes = m * self.config.rounds * length
        if probes >= self.cycle_end - step:  # too short for a cycle
            if step == begin:
                logger.warning(
                    "The %d steps left hold no %d of probes and any after them: the weights stay "
                    "as they are. Lower `update_steps`, `probe_steps` or `rounds`.",
                    total_steps - step,
                    probes,
                )
            return [Segment(self.weights, total_steps - step)]
        mixtures = probe_mixtures(m, self.config.one_hot_factor)
        self.pending = [j for _ in range(self.config.rounds) for j in self._order()]
        self.probes = []
        probes = [Segment(mixtures[j], length, "losses", True) for j in self.pending]
        return [Segment(self.weights, 0, "losses"), *probes]

    def _probe_steps(self, every: int, first: bool) -> int:
        probes = len(self.names) * self.config.rounds
        length = self.config.probe_steps or max(1, every // (4 * probes))
        if probes * length >= every:
            raise ValueError(
                f"Probes take {probes * length} steps of every {every}: lower `rounds` or "
                "`probe_steps`, or raise `update_steps` (or `max_steps`, from which it follows)."
            )
        if probes * length > 0.3 * every and first:
            share = probes * length / every
            logger.warning(
                "Probes take %.0f%% of the steps: the rest is what they serve.", 100 * share
            )
        return length

    def observe(self, observation: Observation) -> None:
        """Note what a probe shed."""
        drops = self.read(observation)
        if observation.steps:
            found = None if drops is None else drops.tolist()
            self.probes.append([observation.shares.tolist(), observation.steps, found])

    def _update(self) -> None:
        complete = all(drops is not None for _, _, drops in self.probes)
        matrix = self._estimate() if complete else None
        self.pending = []
        if matrix is None:
            return
        self.matrix, now = matrix, normalize_matrix(matrix)
        official, ema = self.config.compat == "official", self.config.ema
        eta = self.config.eta
        if eta is None:
            eta = 0.2 if official else 2.0 * len(self.names)
        first = self.past is None
        if ema is None:
            before, self.past = (self.anchor if first else self.weights), now
        else:
            before, self.past = self.anchor, now if first else (1 - ema) * now + ema * self.past
        moved = update_weights(before, self.past, eta=eta, normalize=False, target_weights=self.u)
        self.weights = with_floor(moved, self.floor)

    def _estimate(self) -> np.ndarray | None:
        shares, steps, drops = (np.array(part, float) for part in zip(*self.probes, strict=True))
        if self.config.compat == "official":
            return self._official(drops)
        return self._least_squares(shares, drops / steps[:, None])

    def _official(self, drops: np.ndarray) -> np.ndarray:
        """As published: averaged over the rounds, and solved with the mixtures as planned."""
        gains = np.zeros((len(self.targets), len(self.names)))
        for j, shed in zip(self.pending, drops, strict=True):
            gains[:, j] += shed / self.config.rounds
        if self.config.one_hot_factor == 1:
            return gains
        return solve_mixing_matrix(gains, self.config.one_hot_factor)

    def _least_squares(self, shares: np.ndarray, drops: np.ndarray) -> np.ndarray | None:
        """With the shares as drawn, and the drift over the probes taken out.

        None where the domains' gains differ by less than their own error allows to tell.
        """
        m, probes = len(self.names), len(drops)
        drift = np.arange(probes) - (probes - 1) / 2
        x = np.column_stack([shares, drift]) if probes > m + 1 else shares
        found, *_ = np.linalg.lstsq(x, drops, rcond=None)
        free = probes - x.shape[1]
        if free > 0:
            gains, rest = found[:m] @ self.u, (drops - x @ found) @ self.u
            pair = np.zeros(x.shape[1])
            pair[[gains.argmin(), gains.argmax()]] = -1.0, 1.0
            error = np.sqrt(pair @ np.linalg.pinv(x.T @ x) @ pair * (rest @ rest) / free)
            if np.ptp(gains) < self.config.evidence * error:
                return None
        return found[:m].T

    def state_dict(self) -> dict:
        """As the parent's, and the cycle."""
        past = None if self.past is None else self.past.tolist()
        cycle = {"pending": self.pending, "probes": self.probes, "cycle_end": self.cycle_end}
        return {**super().state_dict(), **copy.deepcopy(cycle), "past": past}

    def load_state_dict(self, state: dict) -> None:
        """As the parent's, and the cycle."""
        super().load_state_dict(state)
        self.pending, self.probes = list(state["pending"]), copy.deepcopy(state["probes"])
        self.cycle_end = state["cycle_end"]
        self.past = None if state["past"] is None else np.array(state["past"])


class RegressionAioli(Aioli):
    """Our estimator: every step tells, none is spent on an estimate."""

    def __init__(self, *args):
        super().__init__(*args)
        where = [self.names.index(t) if t in self.names else -1 for t in self.targets]
        self.turn: list[int] = []  # domains that the mixture is yet to be tilted to
        given = (self.config.memory, self.config.transfer)
        self.regression = InfluenceRegression(np.array(where), len(self.names), *given)

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """One segment to the next measurement, tilted to the domain whose turn it is."""
        begin, m = self.first_step(total_steps), len(self.names)
        if m == 1:
            return [Segment(self.weights, total_steps - step)]
        if step < begin:
            return [Segment(self.weights, begin - step), Segment(self.weights, 0, "losses")]
        first = [Segment(self.weights, 0, "losses")] if self.losses is None else []
        steps = min(self.update_steps(total_steps, 40), total_steps - step)
        return [*first, Segment(self._tilted(), steps, "losses")]

    def _tilted(self) -> np.ndarray:
        """The weights with some mass on one domain; over a turn of all, the weights again."""
        tilt, m = self.config.tilt, len(self.names)
        if tilt == 0:
            return self.weights
        self.turn = self.turn or self._order()
        base = np.clip(self.weights - tilt / m, 0.0, None)
        base *= (1 - tilt) / max(base.sum(), 1e-300)
        base[self.turn.pop(0)] += tilt
        return base

    def observe(self, observation: Observation) -> None:
        """Take in what the segment shed, and move the weights."""
        drops = self.read(observation)
        if drops is None or not observation.steps:
            return
        self.regression.update(observation.shares, observation.steps, drops, observation.step)
        mean, covariance = self.regression.estimate()
        self.matrix = mean
        if self.regression.seen < BEFORE_MOVING:
            return
        gains = self.u @ mean
        error = np.einsum("i,ijk->jk", self.u**2, covariance)
        eta = 0.5 if self.config.eta is None else self.config.eta
        step = eta * advantage(self.weights, gains, error)
        moved = update_weights(self.weights, step[None], eta=1.0, normalize=False)
        self.weights = with_floor(moved, self.floor)

    def state_dict(self) -> dict:
        """As the parent's, and the regression."""
        sums = self.regression.state_dict()
        return {**super().state_dict(), "turn": list(self.turn), "regression": sums}

    def load_state_dict(self, state: dict) -> None:
        """As the parent's, and the regression."""
        super().load_state_dict(state)
        self.turn = list(state["turn"])
        self.regression.load_state_dict(state["regression"])
