r"""Log-probabilities of a language-model head, without holding the (N, V) logits.

    z      = logit_scale * (h W^T + b)
    z      = softcap * tanh(z / softcap)         where the model caps its logits
    log p  = log_softmax(z / temperature)

Rows are taken in tiles: a tile's logits are made, reduced and dropped, and the backward makes them
again from the saved log-normaliser. Peak memory is one tile (64 MiB in fp32), whatever N is.

    symbol   argument       shape
    h        hidden         (N, H)   hidden states after the final norm
    W, b     weight, bias   (V, H), (V,)
    y        targets        (N,) or (N, K)
"""

from typing import NamedTuple

import torch
from torch import Tensor

TILE_ELEMENTS = 2**24  # logits held at once: 64 MiB in fp32

STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class HeadScaling(NamedTuple):
    """What a model does to its logits between the head and the softmax."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class HeadStatistics(NamedTuple):
    """Statistics of the next-token distribution of each row; those not asked for are None.

    Attributes:
        log_probs: log p of each target, shape of `targets`; differentiable.
        entropy: (N,) in nats; differentiable.
        log_sum_sq_probs: (N,) log of the sum of squared probabilities; no gradient.
        mean_logits: (N,) mean over the vocabulary of the scaled logits; no gradient.
        is_top1: (N,) whether the (first) target is the most likely token.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each target under softmax of a linear head.

    Equals `log_softmax(hidden @ weight.T + bias).gather(-1, targets)`, in fp32 or better.

    Args:
        hidden: (N, H).
        weight: (V, H).
        targets: (N,) or (N, K) token ids in [0, V).
        bias: (V,), or None.
        logit_scale: Factor on the logits, applied before the cap.
        softcap: Cap c of `c * tanh(z / c)`, as in Gemma 2; None for none.
        temperature: Divisor of the logits, applied last.

    Returns:
        Log-probabilities in nats, in the shape of `targets`; fp64 if any input is fp64, else fp32.
        Differentiable in `hidden`, `weight` and `bias`.

    Raises:
        ValueError: Shapes that do not fit, or a target outside [0, V).
    """
    scaling = HeadScaling(logit_scale, softcap, temperature)
    return linear_statistics(hidden, weight, targets, bias=bias, scaling=scaling).log_probs


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: HeadScaling | None = None,
    outputs: tuple[str, ...] = ("log_probs",),
) -> HeadStatistics:
    """The log-probabilities of `linear_logprobs`, and more of `STATISTICS` from the same logits.

    Args:
        hidden: (N, H).
        weight: (V, H).
        targets: (N,) or (N, K) token ids in [0, V).
        bias: (V,), or None.
        scaling: How the model scales its logits.
        outputs: Names among `STATISTICS`; `log_probs` is always computed.

    Raises:
        ValueError: Shapes that do not fit, a target outside [0, V), or an unknown output.
    """
    _check(hidden, weight, targets, bias, outputs)
    # Autocast is left outside: a tile is computed in one precision in both passes.
    with torch.autocast(hidden.device.type, enabled=False):
        columns = targets if targets.dim() == 2 else targets.unsqueeze(1)
        log_probs, *rest = _TiledHead.apply(
            hidden, weight, bias, columns, scaling or HeadScaling(), tuple(outputs)
        )
    return HeadStatistics(log_probs.view(targets.shape), *rest)


def _check(hidden, weight, targets, bias, outputs) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(
            f"`hidden` must be (N, H) and `weight` (V, H) with the same H, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if targets.dim() not in (1, 2) or targets.size(0) != hidden.size(0):
        raise ValueError(
            f"`targets` must be (N,) or (N, K) with N = {hidden.size(0)}, "
            f"got {tuple(targets.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be ({weight.size(0)},), got {tuple(bias.shape)}.")
    if unknown := sorted(set(outputs) - set(STATISTICS)):
        raise ValueError(f"`outputs` has {unknown}; the names are {list(STATISTICS)}.")
    if targets.numel():
        low, high = targets.aminmax()
        if low < 0 or high >= weight.size(0):
            raise ValueError(
                f"`targets` must lie in [0, {weight.size(0)}), got values from {low.item()} to "
                f"{high.item()}. Remove ignored positions (label -100) before calling."
            )


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, scaling: HeadScaling) -> Tensor:
    z = rows @ weight.T
    if bias is not None:
        z += bias
    if scaling.logit_scale != 1.0:
        z *= scaling.logit_scale
    if scaling.softcap is not None:
        z = scaling.softcap * torch.tanh(z / scaling.softcap)
    if scaling.temperature != 1.0:
        z /= scaling.temperature
    return z


class _TiledHead(torch.autograd.Function):
    """`linear_statistics` tile by tile; the backward recomputes each tile's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scaling, outputs):
        dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
        weight_, bias_ = weight.to(dtype), None if bias is None else bias.to(dtype)
        n = hidden.size(0)
        log_probs = hidden.new_empty(targets.shape, dtype=dtype)
        normaliser = hidden.new_empty(n, dtype=dtype)
        entropy, sum_sq, mean = (
            hidden.new_empty(n, dtype=dtype) if name in outputs else None
            for name in ("entropy", "log_sum_sq_probs", "mean_logits")
        )
        top1 = hidden.new_empty(n, dtype=torch.bool) if "is_top1" in outputs else None
        for tile in _tiles(n, weight.size(0)):
            z = _logits(hidden[tile].to(dtype), weight_, bias_, scaling)
            lse = z.logsumexp(-1)
            normaliser[tile] = lse
            log_probs[tile] = z.gather(1, targets[tile]) - lse.unsqueeze(1)
            if top1 is not None:
                top1[tile] = z.argmax(-1) == targets[tile][:, 0]
            if mean is not None:
                mean[tile] = z.mean(-1)
            if sum_sq is not None:
                sum_sq[tile] = (2 * z).logsumexp(-1) - 2 * lse
            if entropy is not None:
                # 0 * inf never arises: a logit of minus infinity does not come out of a finite head
                p = (z - lse.unsqueeze(1)).exp_()
                entropy[tile] = lse - torch.linalg.vecdot(p, z)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.scaling, ctx.dtype = scaling, dtype
        ctx.mark_non_differentiable(*(x for x in (sum_sq, mean, top1) if x is not None))
        return log_probs, entropy, sum_sq, mean, top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, *_):
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        scaling, dtype = ctx.scaling, ctx.dtype
        weight_, bias_ = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight_) if need_weight else None
        grad_bias = torch.zeros_like(bias_) if need_bias else None
        for tile in _tiles(hidden.size(0), weight.size(0)):
            rows, g = hidden[tile].to(dtype), grad_log_probs[tile]
            z = _logits(rows, weight_, bias_, scaling)
            # d log p[y] / dz = onehot(y) - p, and dH / dz = -p (log p + H)
            log_p = z - normaliser[tile].unsqueeze(1)
            p = log_p.exp()
            grad_z = -g.sum(1, keepdim=True) * p
            if grad_entropy is not None and entropy is not None:
                slope = grad_entropy[tile].unsqueeze(1)
                grad_z -= slope * p * (log_p + entropy[tile].unsqueeze(1))
            grad_z.scatter_add_(1, targets[tile], g)
            grad_z = _through_scaling(grad_z, z, scaling)
            if need_hidden:
                grad_hidden[tile] = (grad_z @ weight_).to(hidden.dtype)
            if need_weight:
                grad_weight.addmm_(grad_z.T, rows)
            if need_bias:
                grad_bias += grad_z.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _through_scaling(grad_z: Tensor, z: Tensor, scaling: HeadScaling) -> Tensor:
    """Gradient with respect to the head's raw output, from that of the scaled logits `z`."""
    factor = scaling.logit_scale / scaling.temperature
    if scaling.softcap is not None:
        # z * temperature = c tanh(x / c), whose slope is 1 - tanh^2
        grad_z = grad_z * (1 - (z * (scaling.temperature / scaling.softcap)) ** 2)
    return grad_z if factor == 1.0 else grad_z * factor


def _tiles(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, TILE_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, rows, size)]
