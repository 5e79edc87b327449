"""What all measurements of a model share: the forward pass, and the split over processes.

Used by llmmix/mixing/targets.py and llmmix/mixing/signals.py.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Trainer

from llmmix.head import attach_head
from llmmix.rows.weights import take_weights


class MeasuredModel:
    """A trainer's model to be measured: its device, and which process measures which rows.

    Args:
        trainer: The trainer of the model.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    @property
    def module(self) -> nn.Module:
        """The model, unwrapped.

        Raises:
            ValueError: The trainer has no model.
        """
        if self._trainer.model is None:
            raise ValueError("The trainer has no model to measure.")
        return self._trainer.model

    def share(self, groups: list[list[int]]) -> list[tuple[list[int], float]]:
        """This process's groups, each with the factor 1.

        Processes that have fewer repeat the first group with the factor 0, since all must make the
        same number of forward passes.
        """
        rank, ranks = self._trainer.args.process_index, self._trainer.args.world_size
        mine = [(group, 1.0) for group in groups[rank::ranks]]
        return mine + [(groups[0], 0.0)] * (-(-len(groups) // ranks) - len(mine))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        return self._trainer.accelerator.reduce(values, reduction="sum")

    def zeros(self, *shape: int) -> Tensor:
        """Float64 zeros on the model's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self._trainer.args.device)

    def to_device(self, batch: dict) -> dict:
        """The batch with its tensors on the model's device."""
        device = self._trainer.args.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def fused_head(model: nn.Module, *, padding_free: bool = False) -> Iterator[None]:
    """Attach the fused head for the duration, and put back the forward that was there before."""
    unwrap = getattr(model, "get_base_model", None)  # a model with adapters has it
    base = model if unwrap is None else unwrap()
    before = base.__dict__.get("forward")
    attach_head(base, padding_free=padding_free)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


@contextmanager
def metrics_kept(trainer: Trainer) -> Iterator[None]:
    """Forget the metrics that TRL's trainers note in each call of the loss while measuring."""
    if not hasattr(trainer, "_metrics"):
        yield
        return
    before = copy.deepcopy(trainer._metrics)
    try:
        yield
    finally:
        trainer._metrics = before


def token_logps(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """(B, T-1) log-probabilities of the labels, and the mask of scored ones; needs `fused_head`.

    Weights of rows and tokens do not count: a signal is of the model, as the rows are drawn.
    """
    output = model(**take_weights(batch)[0], fused_lm_head=True)
    return output.log_probs, output.label_mask
