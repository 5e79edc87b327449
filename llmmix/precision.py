"""The precision of a model that runs outside of a training step: sampled, scored or measured.

    with a trainer      the one it trains in: its autocast under `bf16` or `fp16`
    without             the autocast around the call, if any; else the weights' own

Whatever it is, log-probabilities, the softmax of attention and draws are taken in fp32.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from llmmix.models import eval_mode

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def evaluating(
    model: torch.nn.Module, trainer: "Trainer | None" = None, *, gradients: bool = False
) -> Iterator[None]:
    """Eval mode, no gradients, and the precision that this module chooses.

    Args:
        model: The model that runs; its modes are put back at the end.
        trainer: The trainer that trains it, if one does. A model has its autocast only from the
            first training step on, and its reference never, unless they run in here.
        gradients: Whether gradients are taken.
    """
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        if not gradients:
            stack.enter_context(torch.no_grad())
        if trainer is not None:
            stack.enter_context(trainer.accelerator.autocast())
        yield


def operand_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product takes a tensor here and now."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of one operation, at least: the spacing of numbers of that precision."""
    if not dtype.is_floating_point or torch.finfo(dtype).bits > 32:
        dtype = torch.float32  # in which attention takes its softmax
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(torch.finfo(dtype).eps, 2**-10 if tf32 else 0.0)


def at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    """The values in fp32, or in fp64 if they are in fp64."""
    return values if values.dtype == torch.float64 else values.float()
