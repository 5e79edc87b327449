"""What decides a mixture speaks to what draws it in segments: weights, for a number of steps.

A controller is arithmetic alone. It is asked for a plan, told what was measured when a segment of
it ends, and asked again when the plan is used up. Nothing is drawn past a plan's end, so weights
that are decided at a step govern the draws of the very next one. The same controller runs under a
trainer (`llmmix.mixing.callback`) and under a simulated one, in milliseconds.

`Controller` is what the trainer's side calls. `OnlineController` is the base of the methods: Aioli,
Skill-It, DoReMi, DoGE and ODM, each in the file of its name. What is not finite teaches nothing: it
is counted in `skipped`, and the last value stands.
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
        measure: What the controller is told when the segment ends, a key of `SIGNALS` or None.
        estimates: Whether its mixture was chosen to learn from rather than to train on; the share
            of such steps is logged.
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

    weights: np.ndarray  # (m,) what it would train on now

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """Segments from `step` on, at least one step of `total_steps` in all, never past its end.

        Called when training begins and whenever the last plan is used up.
        """

    def observe(self, observation: Observation) -> None:
        """Take in what was measured at the end of a segment."""

    def state_dict(self) -> dict:
        """All that decides the plans to come, as JSON has it."""

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`."""

    def record(self) -> dict:
        """What is worth keeping of the last decision, beside the weights, as JSON has it."""


class OnlineController(ABC):
    """What moves a mixture while a model trains: its plans, its state, and what it skipped.

    A method says what is measured (`measure`), when (`steps_to_update`) and what an observation
    does to `weights` (`observe`); Aioli lays out its `segments` itself.

    Args:
        config: Options of the method.
        names: Names of the m domains.
        targets: Names of the n validation targets.
        weights: (m,) first weights.
        argument: What an error calls `weights`.
    """

    method: ClassVar[str]  # its name in warnings and errors
    measure: str  # a key of `SIGNALS`
    last_counts: ClassVar[bool] = False  # whether a measurement at the very end is of use
    # The attributes that are its state: plain numbers and lists, and arrays (None: not known yet)
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
        self.skipped = 0  # measurements that were not finite, in part or as a whole
        if len(self.names) == 1:
            logger.warning(
                "%s has nothing to mix: %r is the only domain.", self.method, self.names[0]
            )

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """Segments from `step` on: all that is left if there is but one domain, none at the end."""
        left = total_steps - step
        if left <= 0:
            return []
        if len(self.names) == 1:
            return [Segment(self.weights.copy(), left)]
        return self.segments(step, total_steps)

    def segments(self, step: int, total_steps: int) -> list[Segment]:
        """The plan where there is something to mix; by default the steps to the next update."""
        left = total_steps - step
        steps = min(left, self.steps_to_update(step, total_steps))
        measure = self.measure if steps < left or self.last_counts else None
        return [Segment(self.weights.copy(), steps, measure)]

    def steps_to_update(self, step: int, total_steps: int) -> int:
        """Steps to the next update, at least 1; by default to the next multiple of the interval."""
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
        """All that decides the plans to come, as JSON has it; minus infinity becomes None."""
        kept = {name: getattr(self, name) for name in (*self.arrays, *self.kept)}
        return plain({"names": self.names, "targets": self.targets, **kept})

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`.

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
        """An array of a state: None within it is minus infinity, None alone is not known yet."""
        if value is None:
            return None
        array = np.array(value, dtype=np.float64)  # None becomes NaN
        now = getattr(self, name)
        if now is not None:
            wanted = f"be of shape {now.shape}; resume with the options that the run began with"
            require(array.shape == now.shape, f"state[{name!r}]", wanted, array.shape)
        return np.where(np.isnan(array), -np.inf, array)
