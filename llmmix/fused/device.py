"""What a head is computed with on the device of its tensors: the precision, and the kernels."""

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from llmmix.fused import tiles


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of what enters the matrix products; what comes out is in fp32 or better.

    It is fp64 if either input is; bf16 on a GPU, if the weight or autocast is in bf16; else fp32. A
    CPU gains nothing from bf16, and fp16 would lose the smallest probabilities.
    """
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if has_kernels(hidden) and torch.bfloat16 in (weight.dtype, autocast):
        return torch.bfloat16
    return torch.float32


def has_kernels(x: Tensor) -> bool:
    """Whether `llmmix.fused.kernels` serves the device of `x`."""
    return x.is_cuda and find_spec("triton") is not None


def arithmetic(logits: Tensor) -> ModuleType:
    """The module that has `fold` and `softmax_gradient` for a tile: Triton where it serves."""
    if has_kernels(logits) and logits.dtype == torch.float32:
        from llmmix.fused import kernels

        return kernels
    return tiles
