"""Means of a step over its micro-batches and processes, and ending a run by them.

Unlearning losses have no bottom that is worth reaching: past some point they only break the model.
"""

import logging
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from llmmix.training.means import Means, Sums
from llmmix.training.resuming import ResumedCallback

logger = logging.getLogger(__name__)

Terms = tuple[Tensor, Tensor]

# A run is ended by a mean over this many steps, or over an epoch that has fewer
STEPS_AVERAGED = 16


class UnlearningGuard(ResumedCallback):
    """Logs a step's means, and ends a run that has forgotten enough or lost its utility.

    Args:
        trainer: The trainer whose steps are watched, and whose log shows the means.
        min_forget_prob: The run ends when the mean probability of the answers to forget falls below
            this; None for never.
        max_retain_loss: The run ends when the mean of the retain term exceeds this; None for never.

    Attributes:
        step: The means of the last step, by name.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        *,
        min_forget_prob: float | None = None,
        max_retain_loss: float | None = None,
    ):
        self.trainer = trainer
        self.min_forget_prob, self.max_retain_loss = min_forget_prob, max_retain_loss
        self.means = Means(trainer)
        self.step: dict[str, float] = {}
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._recent: deque[dict[str, float]] = deque(maxlen=STEPS_AVERAGED)

    def add(
        self,
        prefix: str,
        values: dict[str, Terms],
        loss: Sequence[Terms],
        parts: dict[str, Terms],
        others: Mapping[str, Terms] | None = None,
    ) -> None:
        """Log a micro-batch's (sum, count) of each value, summed over the processes.

        Every process must add the same names.

        Args:
            prefix: What is written before the names.
            values: (sum, count) of each value.
            loss: (sum, count) of each term of the loss, which an evaluation reports.
            parts: Token log-probabilities and masks (B, T) of each part, whose NLL is logged.
            others: (sum, count) of what is logged without the prefix.
        """
        sums: dict[str, Sums] = {f"{prefix}/{name}": terms for name, terms in values.items()}
        sums |= others or {}
        for part, name in (("forget", "nll_per_token"), ("retain", "retain_nll_per_token")):
            if part in parts:
                token_logps, mask = parts[part]
                sums[name] = (-token_logps.sum(), mask.sum())
        found = self.means.add(sums, loss)
        if self.means.training:
            for name in values:
                total, count = found[f"{prefix}/{name}"]
                self._sums[name][0] += total
                self._sums[name][1] += count

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the step's means, and end the run where they say so."""
        self.step = {name: total / max(count, 1) for name, (total, count) in self._sums.items()}
        self._sums.clear()
        self._recent.append(self.step)
        self._end_if_enough(state, control)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on, unless the run that is resumed had ended."""
        super().on_train_begin(args, state, control, **kwargs)
        self._end_if_enough(state, control)

    def _end_if_enough(self, state: TrainerState, control: TrainerControl) -> None:
        """End the run where the means of the last steps say so."""
        steps = min(STEPS_AVERAGED, math.ceil(state.max_steps / max(state.num_train_epochs, 1)))
        recent = list(self._recent)[-steps:]
        if len(recent) < steps or control.should_training_stop:
            return
        for name, limit, passed, what in (
            ("forget_prob", self.min_forget_prob, lambda x, y: x < y, "below min_forget_prob"),
            ("retain_loss", self.max_retain_loss, lambda x, y: x > y, "above max_retain_loss"),
        ):
            seen = [step[name] for step in recent if name in step]
            if limit is None or not seen or not passed(sum(seen) / len(seen), limit):
                continue
            mean = sum(seen) / len(seen)
            logger.warning(
                "Training ends at step %d: %s has been %.4g over the last %d steps, %s=%g.",
                *(state.global_step, name, mean, len(seen), what, limit),
            )
            control.should_training_stop = True

    def begin(self) -> None:
        """Forget the steps of another run."""
        self._sums.clear()
        self._recent.clear()

    def saved(self) -> dict:
        """The means of the last steps."""
        return {"recent": list(self._recent)}

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Go on with the means of the steps before the checkpoint."""
        self._recent.extend(saved["recent"])


def check_limit(name: str, value: float | None, top: float = math.inf) -> None:
    """Refuse a limit outside (0, top).

    Raises:
        ValueError: `value` is not None, and not between 0 and `top`.
    """
    if value is not None and not 0 < value < top:
        raise ValueError(
            f"`{name}` must lie between 0 and {top:g}, got {value}; None sets no limit."
        )
