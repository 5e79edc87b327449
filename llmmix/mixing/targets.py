"""The validation rows of each target, and the mean loss on them (for llmmix/mixing/signals.py)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from llmmix.mixing.measuring import MeasuredModel, metrics_kept, token_logps
from llmmix.positions import batches_alike

BATCH_TOKENS = 8192  # tokens of a forward pass, padding included
MEASURES = ("auto", "nll", "loss")


class TargetLosses:
    """Mean loss of each target, on the same rows every time.

        loss of a target = sum of -log p over its scored tokens / their number

    Forward passes mix rows of several targets. With `measure="loss"` the loss is the mean over rows
    of the trainer's own, computed on batches of one target each.

    Args:
        trainer: Trainer whose model, collator and loss are used.
        targets: Validation rows by name, as the trainer prepared them.
        rows: Maximum number of rows of each target, evenly spaced. None: all.
        measure: "nll" for the loss per token, "loss" for the trainer's own, or "auto": "nll" where
            rows have labels.

    Attributes:
        names: Names of the targets.
        measure: "nll" or "loss".

    Raises:
        ValueError: `measure` is none of `MEASURES`, a target has no rows, or none of its rows has
            a scored token.
    """

    def __init__(
        self, trainer: Trainer, targets: Mapping[str, Any], rows: int | None, measure: str
    ):
        if measure not in MEASURES:
            raise ValueError(f"`measure` must be one of {MEASURES}, got {measure!r}.")
        self.names = list(targets)
        self._trainer, self._measured = trainer, MeasuredModel(trainer)
        self._rows: list[tuple[int, dict]] = []  # target, row
        for number, (name, given) in enumerate(targets.items()):
            if not len(given):
                raise ValueError(
                    f"`eval_dataset`: the target {name!r} has no rows to measure its loss on. Give "
                    "it some, or leave the target out."
                )
            loader = trainer.get_eval_dataloader(given)
            dataset: Any = loader.dataset
            self._collate = loader.collate_fn
            count = len(dataset) if rows is None else min(rows, len(dataset))
            chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
            self._rows += [(number, dataset[row]) for row in chosen]
        if measure == "auto" and self._rows:
            measure = "nll" if {"labels", "input_ids"} <= set(self._rows[0][1]) else "loss"
        self.measure = measure
        if measure == "nll":
            self._check_scored()

    def _check_scored(self) -> None:
        scored = np.zeros(len(self.names))
        for number, row in self._rows:
            scored[number] += sum(label != -100 for label in row["labels"][1:])
        if not scored.all():
            empty = [name for name, n in zip(self.names, scored, strict=True) if not n]
            raise ValueError(
                f"`eval_dataset`: no row of {empty} has a scored token (labels other than -100)."
            )

    def take(self) -> Tensor:
        """(n,) mean losses, the same on every process."""
        sums = self._trainer_losses() if self.measure == "loss" else self._token_losses()
        total, count = self._measured.sum(sums)
        return total / count

    def _batch(self, group: list[int]) -> dict:
        return self._measured.to_device(self._collate([self._rows[i][1] for i in group]))

    def _token_losses(self) -> Tensor:
        """(2, n) sums of losses and numbers of tokens on this process."""
        lengths = [len(row["input_ids"]) for _, row in self._rows]
        sums = self._measured.zeros(2, len(self.names))
        batches = batches_alike(self._measured.module, lengths, BATCH_TOKENS)
        for group, counts in self._measured.share(batches):
            numbers = torch.tensor([self._rows[i][0] for i in group], device=sums.device)
            logps, mask = token_logps(self._measured.module, self._batch(group))
            sums[0].index_add_(0, numbers, -logps.double().sum(1) * counts)
            sums[1].index_add_(0, numbers, mask.double().sum(1) * counts)
        return sums

    def _trainer_losses(self) -> Tensor:
        """(2, n) sums of losses and numbers of rows on this process."""
        size = self._trainer.args.per_device_eval_batch_size
        groups = []
        for number in range(len(self.names)):
            own = [i for i, (target, _) in enumerate(self._rows) if target == number]
            groups += [own[start : start + size] for start in range(0, len(own), size)]
        sums = self._measured.zeros(2, len(self.names))
        with metrics_kept(self._trainer):
            for group, counts in self._measured.share(groups):
                loss: Any = self._trainer.compute_loss(self._measured.module, self._batch(group))
                one = torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
                sums[:, self._rows[group[0]][0]] += counts * len(group) * one
        return sums
