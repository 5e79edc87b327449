"""What every measurement of a model shares: its forward pass, and its split over processes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Trainer

from llmmix.head import attach_head


class MeasuredModel:
    """A trainer's model as it is measured: where it is, and which process measures which part.

    Args:
        trainer: The trainer of the model.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    @property
    def module(self) -> nn.Module:
        """The model, unwrapped.

        Raises:
            ValueError: The trainer has none.
        """
        if self._trainer.model is None:
            raise ValueError("The trainer has no model to measure.")
        return self._trainer.model

    def share(self, groups: list[list[int]]) -> list[tuple[list[int], float]]:
        """This process's groups, each with 1; as many on every process, made up with 0."""
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
def fused_head(model: nn.Module) -> Iterator[None]:
    """Our head for the time being; what answered before answers afterwards."""
    unwrap = getattr(model, "get_base_model", None)  # of adapters
    base = model if unwrap is None else unwrap()
    before = base.__dict__.get("forward")
    attach_head(base)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


@contextmanager
def metrics_kept(trainer: Trainer) -> Iterator[None]:
    """TRL's trainers note metrics in each call of the loss: a measurement's are forgotten."""
    if not hasattr(trainer, "_metrics"):
        yield
        return
    before = copy.deepcopy(trainer._metrics)
    try:
        yield
    finally:
        trainer._metrics = before


def token_logps(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """(B, T-1) log-probabilities of the labels and where they count, under `fused_head`."""
    output = model(**batch, fused_lm_head=True)
    return output.log_probs, output.label_mask
