"""Controllers: the methods that decide a mixture, as arithmetic alone.

A controller is asked for a plan, a list of segments: weights for a number of steps. When a segment
ends it is told what was measured, and when the plan is used up it is asked again. Nothing is drawn
past the end of a plan, so weights that are decided at a step apply from the next step on. The same
controller runs under a trainer (llmmix/mixing/steering.py) and, in milliseconds, under a simulated
one in the tests.

`Controller` is the interface that the trainer's side calls. `OnlineController` is the base class of
Aioli, Skill-It, DoReMi, DoGE and ODM, each in the file of its name. Measurements that are not
finite are counted in `skipped`, and the last values stay.
"""

import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from llmmix.files import plain
from llmmix.mixing.checks import Weights, check_weights, require

logger = logging.getLogger(__name__)


class Segment(NamedTuple):
    """Some steps of training on one mixture.

    Args:
        weights: (m,) on the simplex, in the order of the sampler's domains.
        steps: Optimizer steps; 0 only measures, before the next segment begins.
        measure: Key of `SIGNALS`: what is measured when the segment ends. None: nothing.
        estimates: Whether the mixture was chosen to estimate something rather than to train on; the
            number of such steps is logged.
    """

    weights: np.ndarray
    steps: int
    measure: str | None = None
    estimates: bool = False


SIGNALS = {
    "losses": "losses (n,): mean loss of each target on fixed validation rows",
    "train": "train (m,): mean loss of each domain's tokens in the batch of the segment's last "
    "step, before that step's update; NaN where the batch had none",
    "excess": "excess (m,): mean over a domain's tokens in that batch of max(loss - loss of the "
    "reference, 0), before that step's update; NaN where the batch had none",
    "gradients": "products (m, n): inner products of the gradient of each domain's loss with that "
    "of each target's; norms (m,): of the domains' gradients",
}


class Observation(NamedTuple):
    """What is known when a segment with a `measure` ends.

    Args:
        step: Optimizer steps taken since training began.
        steps: Optimizer steps of the segment.
        shares: (m,) share of each domain among the rows drawn in the segment; zeros if steps is 0.
        learning_rate: Sum of the learning rates of the segment's steps.
        signal: Arrays by name, as `SIGNALS` says.
    """

    step: int
    steps: int
    shares: np.ndarray
    learning_rate: float
    signal: dict[str, np.ndarray]


class Controller(Protocol):
    """Decides the mixture of the steps to come."""

    weights: np.ndarray  # (m,) the weights of the last decision

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """Segments from `step` on: at least one step in all, and none past `total_steps`.

        Called when training begins and whenever the last plan is used up.
        """

    def observe(self, observation: Observation) -> None:
        """Take in what was measured at the end of a segment."""

    def state_dict(self) -> dict:
        """The state that decides all later plans, as JSON values."""

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""

    def record(self) -> dict:
        """What the run's record keeps of the last decision beside the weights, as JSON values."""


class OnlineController(ABC):
    """A method that moves a mixture while a model trains: its plans and its state.

    A subclass says what is measured (`measure`), when (`steps_to_update`) and how an observation
    moves `weights` (`observe`). Aioli overrides `segments` instead of `steps_to_update`.

    Args:
        config: Options of the method.
        names: Names of the m domains.
        targets: Names of the n validation targets.
        weights: (m,) first weights.
        argument: Name of `weights` in error messages.
    """

    method: ClassVar[str]  # name in warnings and errors
    measure: str  # a key of `SIGNALS`
    last_counts: ClassVar[bool] = False  # whether to measure at the end of the run
    # Attributes that make up the state: numbers and lists, and arrays (None: not known yet)
    kept: ClassVar[tuple[str, ...]] = ("skipped",)
    arrays: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(
        self,
        config: Any,
        names: list[str],
        targets: list[str],
        weights: Weights,
        argument: str = "weights",
    ):
        self.config, self.names, self.targets = config, list(names), list(targets)
        self.weights = check_weights(weights, self.names, argument)
        self.skipped = 0  # measurements that were not finite, wholly or in part
        if len(self.names) == 1:
            logger.warning(
                "%s has nothing to mix: %r is the only domain.", self.method, self.names[0]
            )

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """Segments from `step` on: one for all steps left if there is a single domain."""
        left = total_steps - step
        if left <= 0:
            return []
        if len(self.names) == 1:
            return [Segment(self.weights.copy(), left)]
        return self.segments(step, total_steps)

    def segments(self, step: int, total_steps: int) -> list[Segment]:
        """The plan for two domains or more; by default one segment up to the next update."""
        left = total_steps - step
        steps = min(left, self.steps_to_update(step, total_steps))
        measure = self.measure if steps < left or self.last_counts else None
        return [Segment(self.weights.copy(), steps, measure)]

    def steps_to_update(self, step: int, total_steps: int) -> int:
        """Steps to the next update, at least 1; by default to the next multiple of `interval`."""
        return self.config.interval - step % self.config.interval

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Take in what was measured, and move the weights."""

    def read(self, observation: Observation, name: str, *shape: int) -> np.ndarray:
        """A signal of an observation as float64.

        Raises:
            ValueError: The signal has another shape.
        """
        values = np.asarray(observation.signal[name], dtype=np.float64)
        require(values.shape == shape, f"signal[{name!r}]", f"be of shape {shape}", values.shape)
        return values

    def record(self) -> dict:
        """How many measurements were skipped because they were not finite."""
        return {"skipped": self.skipped}

    def state_dict(self) -> dict:
        """The state that decides all later plans, as JSON values; minus infinity becomes None."""
        kept = {name: getattr(self, name) for name in (*self.arrays, *self.kept)}
        return plain({"names": self.names, "targets": self.targets, **kept})

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: The state is of another method, or of other domains, targets or sizes.
        """
        own = self.state_dict()
        way = "resume with the method, domains and options that the run began with"
        wanted = f"be of {self.method}, {list(own)}; {way}"
        require(state.keys() == own.keys(), "state", wanted, list(state))
        for name in ("names", "targets"):
            wanted = f"be {own[name]}, in this order; {way}; the state to resume has the {name}"
            require(state[name] == own[name], f"state[{name!r}]", wanted, state[name])
        loaded = {name: plain(state[name]) for name in self.kept}  # a copy
        loaded |= {name: self._array(name, state[name]) for name in self.arrays}
        vars(self).update(loaded)

    def _array(self, name: str, value: list | None) -> np.ndarray | None:
        """An array of a state; None is not known yet, and None inside a list is minus infinity."""
        if value is None:
            return None
        array = np.array(value, dtype=np.float64)  # None becomes NaN
        now = getattr(self, name)
        if now is not None:
            wanted = f"be of shape {now.shape}; resume with the options that the run began with"
            require(array.shape == now.shape, f"state[{name!r}]", wanted, array.shape)
        return np.where(np.isnan(array), -np.inf, array)
