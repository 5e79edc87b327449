"""A simulated trainer whose losses follow power laws, and controllers of Aioli to run under it."""

import copy
import json
from collections import deque

import numpy as np
import pytest
from scipy.optimize import minimize

from llmmix.mixing.aioli import CONTROLLERS, AioliConfig
from llmmix.mixing.controllers import Observation, Segment

AB, ABC = ["a", "b"], ["a", "b", "c"]
ESTIMATORS = list(CONTROLLERS)
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


def make(names, targets=None, weights=None, **options):
    """A controller of an `AioliConfig` of these options."""
    weights = np.full(len(names), 1 / len(names)) if weights is None else weights
    config = AioliConfig(**options)
    targets = names if targets is None else targets
    return CONTROLLERS[config.estimator](config, list(names), list(targets), weights)


class World:
    """Losses of targets as power laws of the rows that serve them: the integral of L' = -A p.

        L_i = 2 + height_i (1 + r_i / scale_i)^-power_i,    r = influence @ rows drawn

    so that A_ij = influence_ij height_i power_i / scale_i (1 + r_i / scale_i)^(-power_i - 1) falls
    as more is drawn. Domains stand for targets of the same place where there is no influence.
    """

    batch = 16

    def __init__(self, height, scale, power, influence=None):
        self.height, self.scale, self.power = (np.array(x, float) for x in (height, scale, power))
        self.influence = np.eye(len(height)) if influence is None else np.array(influence, float)
        self.names = [f"domain {j}" for j in range(self.influence.shape[1])]
        own = len(height) == len(self.names)
        self.targets = self.names if own else [f"target {i}" for i in range(len(height))]

    def losses(self, rows):
        """(n,) of `rows` (m,) drawn."""
        served = 1 + self.influence @ rows / self.scale
        return 2 + self.height * served**-self.power

    def outcome(self, weights, steps):
        """Mean loss after steps on one mixture."""
        return self.losses(np.asarray(weights) * steps * self.batch).mean()

    def best(self, steps, floor=0.0):
        """The best static mixture whose shares are at least `floor`."""
        m = len(self.names)

        def mixture(x):
            p = np.exp(x - x.max())
            return floor + (1 - m * floor) * p / p.sum()

        options = {"xatol": 1e-7, "fatol": 1e-12, "maxiter": 5000, "maxfev": 5000}
        found = minimize(
            lambda x: self.outcome(mixture(x), steps),
            np.zeros(m),
            method="Nelder-Mead",
            options=options,
        )
        return mixture(found.x)


# One domain goes on being learned, the others are soon learned out
ONE = World([2, 2, 2], [400, 40, 40], [0.4, 3, 3])
# All go on being learned; from some there is more to have
UNEQUAL = World([3, 1, 0.5], [400] * 3, [0.4] * 3)
SAME = World([2, 2, 2], [400] * 3, [0.4] * 3)
PAIR = World([2, 2], [400, 40], [0.4, 3])


class Simulated:
    """A trainer of a world that keeps segments as `MixtureCallback` does, step by step.

    Its draws and errors depend on the seed and on the number of the step or measurement alone.

    Args:
        world: What is trained.
        controller: What decides the mixture.
        total: Steps.
        noise: Standard deviation of a measured loss.
        jitter: Of what a step adds to a loss, for good.
        broken: Measurements, by number, that find this for the first target.
    """

    def __init__(self, world, controller, total, *, seed=0, noise=0.0, jitter=0.0, broken=None):
        self.world, self.controller, self.total = world, controller, total
        self.broken = broken or {}
        random, n = np.random.default_rng(seed), len(world.targets)
        self.uniforms = random.random((total, world.batch))
        self.noise = noise * random.standard_normal((2 * total + 2, n))
        self.jitter = jitter * random.standard_normal((total + 1, n)).cumsum(0)
        self.step, self.measured, self.taken = 0, 0, 0
        self.rows = np.zeros(len(world.names), dtype=int)
        self.before = self.rows
        self.segments: deque[Segment] = deque()
        self.plans, self.history = [], []  # plans as given; weights after each step
        self._extend()

    def _extend(self):
        if self.step >= self.total:
            return
        segments = self.controller.plan(self.step, self.total)
        assert 0 < sum(s.steps for s in segments) <= self.total - self.step
        for weights, steps, *_ in segments:
            assert isinstance(steps, int) and steps >= 0
            assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)
        self.plans.append((self.step, segments))
        self.segments.extend(segments)
        self._begin()
        self._finish()

    def _begin(self):
        self.taken, self.before = 0, self.rows
        if self.segments:
            self.edges = np.append(self.segments[0].weights.cumsum()[:-1], 1.0)

    def _finish(self):
        while self.segments and self.taken >= self.segments[0].steps:
            segment = self.segments.popleft()
            if segment.measure is not None:
                assert segment.measure == "losses"
                drawn = self.rows - self.before
                shares = drawn / max(drawn.sum(), 1)
                found = Observation(self.step, segment.steps, shares, 1.0, self._measure())
                self.controller.observe(found)
            self._begin()
        if not self.segments:
            self._extend()

    def _measure(self):
        losses = self.world.losses(self.rows) + self.jitter[self.step] + self.noise[self.measured]
        losses[0] = self.broken.get(self.measured, losses[0])
        self.measured += 1
        return {"losses": losses}

    def advance(self):
        """One step."""
        drawn = np.searchsorted(self.edges, self.uniforms[self.step], side="right")
        self.rows = self.rows + np.bincount(drawn, minlength=len(self.rows))
        self.step += 1
        self.taken += 1
        self._finish()
        self.history.append(self.controller.weights)

    def run(self):
        """To the end."""
        while self.step < self.total:
            self.advance()
        return self

    @property
    def outcome(self):
        """Mean loss now, without what is random in it."""
        return self.world.losses(self.rows).mean()

    def state(self):
        """What a checkpoint keeps, as a file has it."""
        return json.dumps(
            {
                "controller": self.controller.state_dict(),
                "segments": [[s.weights.tolist(), *s[1:]] for s in self.segments],
                "rows": [self.rows.tolist(), self.before.tolist()],
                "numbers": [self.step, self.measured, self.taken],
            }
        )

    def resumed(self, controller, state):
        """Another trainer, which goes on from a state of this one."""
        other, state = copy.copy(self), json.loads(state)
        controller.load_state_dict(state["controller"])
        other.controller, other.plans, other.history = controller, [], []
        other.segments = deque(Segment(np.array(w), *rest) for w, *rest in state["segments"])
        other._begin()
        other.rows, other.before = (np.array(x) for x in state["rows"])
        other.step, other.measured, other.taken = state["numbers"]
        return other


class Uniform:
    """The mixture to beat."""

    def __init__(self, world):
        self.weights = np.full(len(world.names), 1 / len(world.names))

    def plan(self, step, total):
        return [Segment(self.weights, total - step)]


def trained(world, total, seed=0, noise=0.0, jitter=0.0, broken=None, **options):
    controller = make(world.names, world.targets, **options)
    return Simulated(
        world, controller, total, seed=seed, noise=noise, jitter=jitter, broken=broken
    ).run()


def margins(world, total, seeds=20, noise=0.0, jitter=0.0, **options):
    """By seed: (seeds,) loss less that on uniform, (seeds, m) last weights, (seeds, m) shares."""
    found = []
    for seed in range(seeds):
        run = trained(world, total, seed, noise, jitter, **options)
        uniform = Simulated(world, Uniform(world), total, seed=seed).run()
        found.append((run.outcome - uniform.outcome, run.controller.weights, run.rows))
    loss, weights, rows = (np.array(part) for part in zip(*found, strict=True))
    return loss, weights, rows / rows.sum(1, keepdims=True)
