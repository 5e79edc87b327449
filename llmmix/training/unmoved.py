"""A run whose loss did not move by its end says so: too low a rate looks like any other run."""

import statistics

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmmix.processes import warn_once

FEWEST = 20  # logged losses from which on their noise is known


def has_moved(losses: list[float]) -> bool:
    """Whether the losses of a run differ between its ends by more than they do from log to log.

        |mean of the last tenth - mean of the first tenth| > 2 standard errors

    The noise is that of the differences between neighbors, in which a slow fall does not count. A
    tenth has at least five losses; of fewer than 20 losses nothing is known, and they count as
    moved.

    Args:
        losses: The logged losses, first to last.
    """
    if len(losses) < FEWEST:
        return True
    tenth = max(5, len(losses) // 10)
    steps = [after - before for before, after in zip(losses, losses[1:], strict=False)]
    noise = statistics.fmean(step * step for step in steps) ** 0.5 / 2**0.5
    moved = statistics.fmean(losses[-tenth:]) - statistics.fmean(losses[:tenth])
    return abs(moved) > 2 * noise * (2 / tenth) ** 0.5


class UnmovedCallback(TrainerCallback):
    """Warns at the end of a run whose logged losses did not move; see `has_moved`.

    Args:
        metric: Name of what is compared, where the value of the loss says little.
    """

    def __init__(self, metric: str = "loss"):
        self._metric = metric

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Compare the losses of the whole run, those before it was resumed included."""
        losses = [x[self._metric] for x in state.log_history if self._metric in x]
        if has_moved(losses):
            return
        tenth = max(5, len(losses) // 10)
        subject = "The loss" if self._metric == "loss" else f"`{self._metric}`"
        warn_once(
            f"{subject} did not move: {statistics.fmean(losses[:tenth]):.4g} in the first {tenth} "
            f"logs, {statistics.fmean(losses[-tenth:]):.4g} in the last {tenth}, which is within "
            f"its noise. Raise `learning_rate` ({args.learning_rate:g}), or train longer."
        )


def tell_if_unmoved(trainer: Trainer, metric: str = "loss") -> None:
    """Have a trainer warn at the end of `train()` if its loss did not move, once.

    Args:
        trainer: Any trainer.
        metric: See `UnmovedCallback`.
    """
    if not any(isinstance(other, UnmovedCallback) for other in trainer.callback_handler.callbacks):
        trainer.add_callback(UnmovedCallback(metric))
