"""What DoReMi and DoGE share: the average of the weights on which a small proxy is trained.

    w_t ~ w_(t-1) exp(gains),   then (1 - c) w_t + c / m,   c the option `smoothing`

Both assume that the right weights for the proxy are right for the final model, and that the average
over a run is better than the last weights; the papers show it for pretraining from scratch. The
methods are in llmmix/mixing/doremi.py and llmmix/mixing/doge.py.
"""

import math
from typing import Any

import numpy as np
from transformers import TrainerControl, TrainerState, TrainingArguments

from llmmix.mixing.accounts import listed
from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.checks import Weights
from llmmix.mixing.controllers import OnlineController
from llmmix.mixing.weights import log_normalize, log_of


def reweigh(log_weights: np.ndarray, gains: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """(m,) logarithms after an update: w ~ w exp(gains), then (1 - c) w + c / m."""
    log_weights = log_normalize(log_weights + gains)
    if smoothing == 0:
        return log_weights
    return np.logaddexp(
        log_weights + math.log1p(-smoothing), math.log(smoothing / len(log_weights))
    )


class AveragedController(OnlineController):
    """A controller whose result is the mean of the weights over the steps, not the last ones.

    Args:
        config: Options of the method, `smoothing` and `interval` among them.
        names: Names of the m domains.
        targets: Not used.
        weights: (m,) first weights.

    Attributes:
        average: (m,) mean of the weights over the steps.
    """

    last_counts = True
    kept = (*OnlineController.kept, "averaged_steps")
    arrays = (*OnlineController.arrays, "log_weights", "average")

    def __init__(self, config: Any, names: list[str], targets: list[str], weights: Weights):
        super().__init__(config, names, targets, weights)
        self.log_weights, self.average = log_of(self.weights), self.weights.copy()
        self.averaged_steps = 0

    def update(self, gains: np.ndarray | None, steps: int) -> None:
        """Move the weights by the gains, if there are any, and add `steps` steps to the average."""
        if gains is not None:
            self.log_weights = reweigh(self.log_weights, gains, self.config.smoothing)
            self.weights = np.exp(self.log_weights)
        self.averaged_steps += steps
        self.average = self.average + (self.weights - self.average) * (steps / self.averaged_steps)

    def record(self) -> dict:
        """The average so far, and how many measurements were skipped."""
        return {"average": self.average.tolist(), **super().record()}


class ProxyCallback(MixtureCallback):
    """A callback that prints the average of the weights when training ends."""

    measures_losses = False
    controller: AveragedController | None

    @property
    def average(self) -> dict[str, float]:
        """The mean of the weights over the steps so far, by domain: the method's result.

        Raises:
            ValueError: The callback is not attached to a trainer yet.
        """
        if self.controller is None:
            raise ValueError("`average` is known once the callback is attached to a trainer.")
        return dict(zip(self.sampler.names, self.controller.average.tolist(), strict=True))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Print the average after the summary that every mixture prints."""
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            shares = listed(self.sampler.names, self.average.values())
            print(f"Average of the weights, to train the final model on: {shares}.", flush=True)
