"""Aioli: estimate during the run how much each domain lowers each loss, and mix accordingly.

    L_i(t+1) = L_i(t) - sum_j A_ij p_j        A_ij: how far a step on domain j lowers loss i
    W A_i = G_i                               probes on mixtures W lower loss i by G_i: solve for A
    p_j ~ p0_j exp(eta * sum_i u_i A_ij)      exponentiated gradient: more of what helps more

    symbol   argument            symbol   argument
    f        one_hot_factor      eta      eta
    EMA      ema                 p0       prior_weights, `anchor`

There are two estimators of A. "one_hot" is the paper's: every `update_steps` it trains a few steps
on each nearly one-hot mixture in turn and measures the losses in between. "regression" is ours: it
tilts the mixture a little towards each domain in turn, all the time, and estimates A from every
step by recursive least squares with forgetting. It spends no step on estimation alone.

A's rows are targets and its columns domains; `InfluenceMatrix` carries their names.

Source: Chen et al., "Aioli: A Unified Optimization Framework for Language Model Data Mixing"
(arXiv:2411.05735), and its released code, which `compat="official"` reproduces. Pure functions:
llmmix/mixing/influence.py (probes, A and the update) and llmmix/mixing/regression.py (least squares
with forgetting). Options: llmmix/mixing/aioli_config.py. Recipe: recipes/aioli.py.
"""

import functools
import logging
from typing import Any

import numpy as np

from llmmix.files import plain
from llmmix.mixing.aioli_config import AioliConfig
from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.checks import Weights, check_weights
from llmmix.mixing.controllers import Observation, OnlineController, Segment
from llmmix.mixing.draws import shuffles
from llmmix.mixing.influence import (
    InfluenceMatrix,
    least_squares_matrix,
    normalize_matrix,
    probe_mixtures,
    published_matrix,
    solve_mixing_matrix,
    update_weights,
)
from llmmix.mixing.regression import InfluenceRegression, advantage, tilted
from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.weights import stratified, with_floor

__all__ = ["AioliCallback", "AioliConfig", "solve_mixing_matrix", "update_weights"]

logger = logging.getLogger(__name__)

# Measurements before the regression first moves the weights: how losses fall at first says little
BEFORE_MOVING = 7


class Aioli(OnlineController):
    """What both estimators share: the prior, the targets' weights and the losses last measured.

    Args:
        config: Options of the method.
        names: Names of the m domains.
        targets: Names of the n validation targets, at least one.
        weights: (m,) p0, unless `config.prior_weights` is set.

    Raises:
        ValueError: There is no target, or weights of the config do not fit the domains or targets.
    """

    method = "Aioli"
    config: AioliConfig
    kept = (*OnlineController.kept, "cycles")
    arrays = (*OnlineController.arrays, "losses", "matrix")

    def __init__(self, config: AioliConfig, names: list[str], targets: list[str], weights: Weights):
        if not targets:
            raise ValueError("Aioli needs at least one target with rows to measure a loss on.")
        given = weights if config.prior_weights is None else config.prior_weights
        super().__init__(config, names, targets, given, "prior_weights")
        self.anchor = self.weights.copy()  # the mixture that updates tilt
        official = config.compat == "official"
        if official or config.anchor == "uniform":
            self.anchor = stratified(len(names))
        self.floor = 0.0 if official else config.min_share / len(names)
        u = [1.0] * len(targets) if config.target_weights is None else config.target_weights
        self.u = check_weights(u, self.targets, "target_weights") * len(targets)
        self.losses: np.ndarray | None = None  # (n,) as last measured
        self.matrix: np.ndarray | None = None  # (n, m) as last estimated
        self.cycles = 0  # begun

    def first_step(self, total_steps: int) -> int:
        """Step at which measuring begins, once the learning rate has warmed up."""
        given = self.config.first_step
        if given is None:
            given = 0 if self.config.compat else total_steps // 10
        return min(max(given, self.config.prior_steps), total_steps)

    def update_steps(self, total_steps: int, share: int, least: int = 1) -> int:
        """Steps between updates: as configured, else 1 / `share` of the run, at least `least`."""
        return self.config.update_steps or max(least, total_steps // share)

    def drops(self, observation: Observation) -> np.ndarray | None:
        """(n,) fall of the losses since the last measurement; None where it is not known."""
        now = self.read(observation, "losses", len(self.targets))
        if not np.isfinite(now).all():
            self.skipped += 1
            bad = [t for t, loss in zip(self.targets, now, strict=True) if not np.isfinite(loss)]
            logger.warning(
                "Step %d: the loss of %s is not finite; the weights stay as they are.",
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
        """The last estimate (rows targets, columns domains), and the number of skipped losses."""
        return {"matrix": plain(self.matrix), **super().record()}

    def _order(self) -> list[int]:
        """Every domain once, in another order each cycle."""
        self.cycles += 1
        stream = f"probes {self.cycles}"
        return shuffles(self.config.order_seed, stream, len(self.names), 0, 0)[0].tolist()


class OneHotAioli(Aioli):
    """The paper's estimator: probes, which are training steps on nearly one-hot mixtures."""

    kept = (*Aioli.kept, "pending", "probes", "cycle_end")
    arrays = (*Aioli.arrays, "past")

    def __init__(self, config: AioliConfig, names: list[str], targets: list[str], weights: Weights):
        super().__init__(config, names, targets, weights)
        self.pending: list[int] = []  # domain of each probe of this cycle
        self.probes: list[list] = []  # shares, steps and drops of each finished probe
        self.past: np.ndarray | None = None  # the moving average of the matrices
        self.cycle_end = 0
        if len(names) > 1:
            probe_mixtures(len(names), config.one_hot_factor)  # refuses a bad factor

    def segments(self, step: int, total_steps: int) -> list[Segment]:
        """A cycle in two plans: the losses and the probes, then the steps to the next cycle."""
        if self.pending:
            self._update()
            return [Segment(self.weights, self.cycle_end - step)]
        begin, m, rounds = self.first_step(total_steps), len(self.names), self.config.rounds
        every = self.update_steps(total_steps, 10, least=4 * m * rounds)
        length = self._probe_steps(every, step == 0)
        if step < begin:
            return [Segment(self.weights, begin - step)]
        self.cycle_end = min(step + every, total_steps)
        if m * rounds * length >= self.cycle_end - step:  # too short for a cycle
            if step == begin:
                logger.warning(
                    "The %d steps left are too few for %d steps of probes and training after "
                    "them: the weights stay as they are. Lower `update_steps`, `probe_steps` or "
                    "`rounds`.",
                    total_steps - step,
                    m * rounds * length,
                )
            return [Segment(self.weights, total_steps - step)]
        mixtures = probe_mixtures(m, self.config.one_hot_factor)
        self.pending = [j for _ in range(rounds) for j in self._order()]
        self.probes = []
        probes = [Segment(mixtures[j], length, "losses", True) for j in self.pending]
        return [Segment(self.weights, 0, "losses"), *probes]

    def _probe_steps(self, every: int, first: bool) -> int:
        probes = len(self.names) * self.config.rounds
        length = self.config.probe_steps or max(1, every // (4 * probes))
        share = probes * length / every
        if share >= 1:
            raise ValueError(
                f"Probes take {probes * length} steps of every {every}: lower `rounds` or "
                "`probe_steps`, or raise `update_steps` (or `max_steps`, from which it follows)."
            )
        if share > 0.3 and first:
            logger.warning(
                "Probes take %.0f%% of the steps; only the rest trains on the weights.", 100 * share
            )
        return length

    def observe(self, observation: Observation) -> None:
        """Note how far the losses fell during a probe."""
        drops = self.drops(observation)
        if observation.steps:
            self.probes.append([observation.shares.tolist(), observation.steps, plain(drops)])

    def _update(self) -> None:
        complete = all(drops is not None for _, _, drops in self.probes)
        matrix = self._estimate() if complete else None
        self.pending = []
        if matrix is None:
            return
        self.matrix, now = matrix, normalize_matrix(matrix)
        eta, ema = self.config.eta, self.config.ema
        if eta is None:
            eta = 0.2 if self.config.compat == "official" else 2.0 * len(self.names)
        before = self.anchor
        if ema is None:
            before, self.past = (self.anchor if self.past is None else self.weights), now
        else:
            self.past = now if self.past is None else (1 - ema) * now + ema * self.past
        moved = update_weights(before, self.past, eta=eta, normalize=False, target_weights=self.u)
        self.weights = with_floor(moved, self.floor)

    def _estimate(self) -> np.ndarray | None:
        shares, steps, drops = (np.array(part, float) for part in zip(*self.probes, strict=True))
        config, m = self.config, len(self.names)
        if config.compat == "official":
            return published_matrix(self.pending, drops, config.rounds, m, config.one_hot_factor)
        return least_squares_matrix(shares, drops / steps[:, None], self.u, config.evidence)


class RegressionAioli(Aioli):
    """Our estimator: it learns from every step, and spends none on estimation alone."""

    kept = (*Aioli.kept, "turn")

    def __init__(self, config: AioliConfig, names: list[str], targets: list[str], weights: Weights):
        super().__init__(config, names, targets, weights)
        own = np.array([names.index(t) if t in names else -1 for t in targets])
        self.turn: list[int] = []  # domains that the mixture is still to be tilted towards
        self.regression = InfluenceRegression(own, len(names), config.memory, config.transfer)

    def segments(self, step: int, total_steps: int) -> list[Segment]:
        """One segment up to the next measurement, tilted towards the domain whose turn it is."""
        begin = self.first_step(total_steps)
        if step < begin:
            return [Segment(self.weights, begin - step), Segment(self.weights, 0, "losses")]
        first = [Segment(self.weights, 0, "losses")] if self.losses is None else []
        steps = min(self.update_steps(total_steps, 40), total_steps - step)
        weights = self.weights
        if self.config.tilt:
            self.turn = self.turn or self._order()
            weights = tilted(weights, self.turn.pop(0), self.config.tilt)
        return [*first, Segment(weights, steps, "losses")]

    def observe(self, observation: Observation) -> None:
        """Take in how far the losses fell during the segment, and move the weights."""
        drops = self.drops(observation)
        if drops is None or not observation.steps:
            return
        self.regression.update(observation.shares, observation.steps, drops, observation.step)
        self.matrix, covariance = self.regression.estimate()
        if self.regression.seen < BEFORE_MOVING:
            return
        error = np.einsum("i,ijk->jk", self.u**2, covariance)
        eta = 0.5 if self.config.eta is None else self.config.eta
        step = eta * advantage(self.weights, self.u @ self.matrix, error)
        moved = update_weights(self.weights, step[None], eta=1.0, normalize=False)
        self.weights = with_floor(moved, self.floor)

    def state_dict(self) -> dict:
        """The state that all controllers have, and the sums of the regression."""
        return {**super().state_dict(), "regression": self.regression.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: The state is of another method, or of other domains, targets or sizes.
        """
        super().load_state_dict(state)
        self.regression.load_state_dict(state["regression"])


CONTROLLERS: dict[str, type[Aioli]] = {"one_hot": OneHotAioli, "regression": RegressionAioli}


class AioliCallback(MixtureCallback):
    """Moves a sampler's weights by Aioli while a trainer runs.

    Args:
        sampler: Sampler of the trainer's rows; its weights are the first ones.
        config: Options of Aioli.
        options: Keyword arguments of `MixtureCallback`.
    """

    method = "shares moved by Aioli"
    paper = (
        "Aioli: A Unified Optimization Framework for Language Model Data Mixing",
        "2411.05735",
    )

    def __init__(self, sampler: MixtureSampler, config: AioliConfig | None = None, **options: Any):
        config = AioliConfig() if config is None else config
        make = functools.partial(CONTROLLERS[config.estimator], config)
        super().__init__(sampler, make, **options)
