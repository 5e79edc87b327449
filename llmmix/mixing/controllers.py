"""What decides a mixture speaks to what draws it in segments: weights, for a number of steps.

A controller is arithmetic alone. It is asked for a plan, told what was measured when a segment of
it ends, and asked again when the plan is used up. Nothing is drawn past a plan's end, so weights
that are decided at a step govern the draws of the very next one. The same controller runs under a
trainer (`llmmix.mixing.callback`) and under a simulated one, in milliseconds.
"""

from typing import NamedTuple, Protocol

import numpy as np


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
        steps: Of them in this segment.
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


def check_weights(weights, names: list[str], argument: str = "weights") -> np.ndarray:
    """Weights of domains as a point of the simplex.

    Args:
        weights: (m,) in the order of `names`, or a mapping from each of them.
        names: Of the domains.
        argument: What an error calls them.

    Returns:
        (m,) float64, a copy that sums to one.

    Raises:
        ValueError: Another length or other names; what is no number, negative, NaN or infinite;
            all zero.
    """
    if hasattr(weights, "keys"):
        if unknown := set(weights.keys()) ^ set(names):
            raise ValueError(
                f"`{argument}` must name each of the domains {names} once; {sorted(unknown)} "
                "is only on one side."
            )
        weights = [weights[name] for name in names]
    try:
        given = np.asarray(weights)
    except ValueError:  # lists of several lengths
        given = np.array(None)
    if given.dtype.kind not in "biuf":
        raise ValueError(f"`{argument}` must be numbers, one a domain, got {weights!r}.")
    given = given.astype(np.float64)
    if given.shape != (len(names),):
        raise ValueError(
            f"`{argument}` must have one value for each of the {len(names)} domains {names}, got "
            f"{len(given.ravel())}."
        )
    shown = dict(zip(names, given.tolist(), strict=True))
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError(f"`{argument}` must be finite and not negative, got {shown}.")
    if not given.any():
        raise ValueError(f"`{argument}` are all zero: give at least one domain a share.")
    given = given / given.max()  # the sum of huge ones is infinite
    return given / given.sum()
