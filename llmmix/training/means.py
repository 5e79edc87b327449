"""What trainers log: sums and counts over micro-batches, steps and processes, divided once.

TRL's log takes the mean of one value a micro-batch, and transformers' evaluation that of one loss a
row of a batch. Neither is a mean over rows or tokens where micro-batches have different numbers of
them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

# A sum and its count; for the difference of two means, those of both
Sums = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


class Mean(list[float]):
    """The mean of all that was added: the one entry of a list, which is what TRL's log averages.

    It is 0 where nothing was counted.
    """

    def __init__(self) -> None:
        super().__init__([0.0])
        self._sums = [0.0] * 4

    def add(self, total: float, count: float, less: float = 0.0, less_count: float = 0.0) -> None:
        """Add a sum and its count, or those of a mean and of another that is taken from it."""
        added = zip(self._sums, (total, count, less, less_count), strict=True)
        self._sums = [before + new for before, new in added]
        total, count, less, less_count = self._sums
        self[:] = [(total / count if count else 0.0) - (less / less_count if less_count else 0.0)]


def log_metric(trainer: Trainer, name: str, *sums: float, training: bool = True) -> None:
    """Let TRL log a metric's mean since its last log; other trainers do not show it.

    Args:
        trainer: Any trainer.
        name: Name of the metric.
        *sums: A sum and its count, or whatever `Mean.add` takes; the same on every process.
        training: Whether it belongs to the training's log, or to the evaluation's.
    """
    metrics = log_of(trainer, training=training)
    mean = metrics.get(name)
    if not isinstance(mean, Mean):
        metrics[name] = mean = Mean()
    mean.add(*sums)


def log_of(trainer: Any, *, training: bool) -> dict[str, list[float]]:
    """What TRL has to log, by name: lists whose means it takes. Other trainers have nothing."""
    mode = "train" if training else "eval"
    return trainer._metrics[mode] if hasattr(trainer, "_metrics") else {}


class Means:
    """What a trainer of ours counts in its micro-batches, and the loss of its evaluations.

    An evaluation's loss is then a mean over all rows or tokens, in batches of any size and on any
    number of processes.

    Args:
        trainer: The trainer, whose `evaluation_loop` reports that loss.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._terms: dict[str, Mean] = {}
        self._own_loop = trainer.evaluation_loop
        # On the instance alone: other trainers of the class keep theirs
        trainer.evaluation_loop = self._evaluation_loop  # type: ignore[method-assign]

    @property
    def training(self) -> bool:
        """Whether the trainer trains now, or evaluates."""
        return self._trainer.model is not None and self._trainer.model.training

    def add(
        self, values: Mapping[str, Sums], loss: Iterable[tuple[Tensor, Tensor]] = ()
    ) -> dict[str, list[float]]:
        """Count a micro-batch, over all processes, each of which must give the same names.

        Args:
            values: (sum, count) of each metric on this process.
            loss: (sum, count) of each term of the loss; in an evaluation, their means add up to it.

        Returns:
            The sums over the processes, of each metric.
        """
        training = self.training
        terms = {} if training else {f"term {place}": term for place, term in enumerate(loss)}
        entries: dict[str, Sums] = {**values, **terms}
        flat = torch.stack([x.detach().float() for sums in entries.values() for x in sums])
        flat = self._trainer.accelerator.gather(flat.unsqueeze(0)).sum(0)
        found = iter(flat.tolist())
        totals = {name: [next(found) for _ in sums] for name, sums in entries.items()}
        for name in terms:
            self._terms.setdefault(name, Mean()).add(*totals.pop(name))
        for name, sums in totals.items():
            log_metric(self._trainer, name, *sums, training=training)
        return totals

    def _evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._terms = {}
        log_of(self._trainer, training=False).clear()  # `predict` counts, and logs nothing
        output = self._own_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._terms and output.metrics is not None:
            loss = sum(mean[0] for mean in self._terms.values())
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output
