r"""How far the logit of a target is above the mean logit, by products with two rows of the head.

    z_y - mean_v z_v = gain * (h (W_y - W_mean) + b_y - b_mean)

where W_mean and b_mean are means over the vocabulary. It holds for a head whose logits are linear
in h: without a cap.
"""

import torch
from torch import Tensor

from llmmix.fused.statistics import check_inputs
from llmmix.fused.tiles import HeadScaling, mean_row


@torch.compiler.disable
def linear_above_mean(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: HeadScaling | None = None,
) -> Tensor:
    """(N,) scaled logit of each target minus the mean over the vocabulary.

    Args:
        hidden: (N, H).
        weight: (V, H).
        targets: (N,) token ids in [0, V).
        bias: (V,), or None.
        scaling: How the model scales its logits.

    Returns:
        In fp64 if `hidden` or `weight` is, else in fp32; differentiable in `hidden`, `weight` and
        `bias`.

    Raises:
        ValueError: The model caps its logits, the shapes do not fit, or a target is outside [0, V).
    """
    scaling = scaling or HeadScaling()
    if scaling.softcap is not None:
        raise ValueError(
            f"The model caps its logits (softcap {scaling.softcap}), so that their mean is no "
            "product with the hidden state. Use another loss than label smoothing, or a model "
            "without a cap."
        )
    if targets.dim() != 1:
        raise ValueError(f"`targets` must be (N,), got {tuple(targets.shape)}.")
    check_inputs(hidden, weight, targets, bias)
    return _AboveMean.apply(hidden, weight, bias, targets.long(), scaling.gain)


class _AboveMean(torch.autograd.Function):
    """`above_mean`; by hand, so that the weight gets one gradient of its size and not three."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, gain):
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        rows = weight[targets].to(dtype) - mean_row(weight, dtype)
        value = (hidden.to(dtype) * rows).sum(1)
        if bias is not None:
            value += bias[targets].to(dtype) - bias.to(dtype).mean()
        ctx.save_for_backward(
            hidden if weight.requires_grad else None,
            rows if hidden.requires_grad else None,
            targets,
        )
        ctx.gain, ctx.vocabulary = gain, weight.size(0)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return value.mul_(gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, rows, targets = ctx.saved_tensors
        g = ctx.gain * grad.unsqueeze(1)
        dh = dw = db = None
        if ctx.needs_input_grad[0]:
            dh = g * rows
        if ctx.needs_input_grad[1]:
            dw = _spread(g * hidden, targets, ctx.vocabulary)
        if ctx.needs_input_grad[2]:
            db = _spread(g, targets, ctx.vocabulary).squeeze(1)
        grads = zip((dh, dw, db), ctx.dtypes, strict=True)
        return *(None if d is None else d.to(dtype) for d, dtype in grads), None, None


def _spread(terms: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """(V, D) gradient of rows, from what each of N positions adds to that of its target (N, D)."""
    total = (terms.sum(0, keepdim=True) / -vocabulary).repeat(vocabulary, 1)
    return total.index_add_(0, targets, terms)
