"""The logits of a language-model head, tile by tile: the arithmetic of `llmmix.logprobs`.

A tile holds the logits of some rows for some columns of the vocabulary. `fold` adds a tile to the
running softmax of its rows. In the backward, `softmax_gradient` computes what the softmax subtracts
from the gradient. Both are plain torch here; `llmmix.fused.kernels` has a GPU kernel for each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmmix.fused.largest import merge_largest

TILE_ROWS = {"cpu": 1024, "gpu": 4096}
# Logits held at once: 8 MiB in fp32 on a CPU, whose cache holds them, and 128 MiB on a GPU
TILE_ELEMENTS = {"cpu": 2**21, "gpu": 2**25}


class HeadScaling(NamedTuple):
    """What a model does to its logits between the head and the softmax."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def gain(self) -> float:
        """Slope of the scaled logits in the head's output, the cap left out."""
        return self.logit_scale / self.temperature


class RunningSoftmax(NamedTuple):
    """Sums over the part of the vocabulary folded in so far, updated in place by `fold`.

    With z the scaled logits and e = exp(z - max): `sum` adds up e, `sum_ez` e z, `sum_ee` e^2 and
    `sum_z` z. Each is (n, 1). `target_z` and `target_slope`, the logits of the targets and the
    slope of the cap there, are (n, K); `is_top1` concerns the first target. `largest` holds the k
    largest z in descending order, (n, k); k is 0 where no statistic needs them.
    """

    max: Tensor
    sum: Tensor
    sum_ez: Tensor
    sum_ee: Tensor
    sum_z: Tensor
    target_z: Tensor
    target_slope: Tensor
    is_top1: Tensor
    largest: Tensor


def running_softmax(targets: Tensor, dtype: torch.dtype, top_k: int = 0) -> RunningSoftmax:
    """The running softmax before any tile is folded in, for `targets` (n, K)."""
    column = torch.zeros_like(targets[:, :1], dtype=dtype)
    return RunningSoftmax(
        # Finite, so that a tile of logits that are all minus infinity adds nothing
        max=torch.full_like(column, torch.finfo(dtype).min),
        sum=column.clone(),
        sum_ez=column.clone(),
        sum_ee=column.clone(),
        sum_z=column.clone(),
        target_z=targets.new_zeros(targets.shape, dtype=dtype),
        target_slope=targets.new_ones(targets.shape, dtype=dtype),
        is_top1=torch.zeros_like(targets[:, :1], dtype=torch.bool),
        largest=column.new_full((column.size(0), top_k), torch.finfo(dtype).min),
    )


def fold(
    state: RunningSoftmax,
    logits: Tensor,
    bias: Tensor | None,
    scaling: HeadScaling,
    targets: Tensor,
    start: int,
    outputs: tuple[str, ...],
    out: Tensor,
) -> Tensor:
    """Fold a tile of raw logits (n, columns) into `state`; the tile is overwritten.

    Args:
        state: The running softmax of these n rows.
        logits: h W^T for the columns of the tile.
        bias: (columns,), or None.
        scaling: How the model scales its logits.
        targets: (n, K) token ids.
        start: The token that the tile's first column stands for.
        outputs: The statistics to keep.
        out: (n, columns), receives e times the slope of the cap.

    Returns:
        (n, 1), the factor by which sums over earlier tiles shrink, as the maximum rises.
    """
    z, slope = scale_(logits, bias, scaling)
    if "top_k_entropy" in outputs:
        merge_largest(state.largest, z, first=start == 0)
    local = targets - start
    inside = (local >= 0) & (local < z.size(1))
    column = local.clamp(0, z.size(1) - 1)
    chosen = z.gather(1, column)
    state.target_z.copy_(torch.where(inside, chosen, state.target_z))
    tile_max = z.amax(1, keepdim=True)
    if "is_top1" in outputs:
        _update_top1(state, z, tile_max, local[:, :1], (inside & (chosen == tile_max))[:, :1])
    highest = torch.maximum(state.max, tile_max)
    shrink = (state.max - highest).exp_()
    state.max.copy_(highest)
    e = exp_below_zero(torch.sub(z, highest, out=out))
    state.sum.mul_(shrink).add_(e.sum(1, keepdim=True))
    if "mean_logits" in outputs:
        state.sum_z.add_(z.sum(1, keepdim=True))
    # From here on `z` is scratch space
    if "entropy" in outputs:
        state.sum_ez.mul_(shrink).add_(z.mul_(e).sum(1, keepdim=True))
    if "log_sum_sq_probs" in outputs:
        state.sum_ee.mul_(shrink**2).add_(torch.mul(e, e, out=z).sum(1, keepdim=True))
    if slope is not None:
        e *= slope
        state.target_slope.copy_(torch.where(inside, slope.gather(1, column), state.target_slope))
    return shrink


def _update_top1(state, z, tile_max, local, is_max) -> None:
    higher = tile_max > state.max
    state.is_top1.copy_(torch.where(higher, is_max, state.is_top1))
    rows = (higher & is_max).squeeze(1).nonzero().squeeze(1)  # of equal maxima, the first counts
    state.is_top1[rows] = z[rows].argmax(1, keepdim=True) == local[rows]


def softmax_gradient(
    logits: Tensor,
    bias: Tensor | None,
    scaling: HeadScaling,
    max: Tensor,
    entropy_terms: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
) -> Tensor:
    """Compute u, what the softmax subtracts from dz, of a tile of raw logits (n, columns).

    u = exp(z - max) = sum * p, times the slope of the cap. Where the entropy H has an upstream
    gradient s, u is also multiplied by g + s (log p + H), where g is the summed upstream gradient
    of the log-probabilities. (max and log(sum) stay two numbers: their sum would round away digits
    of every p of a row.)

    Args:
        logits: h W^T for the columns of the tile.
        bias: (columns,), or None.
        scaling: How the model scales its logits.
        max: (n, 1), maximum of the scaled logits of each row.
        entropy_terms: (g, s, H - log(sum)), each (n, 1); None without a gradient of the entropy.
        out: (n, columns), receives u.

    Returns:
        `out`.
    """
    z, slope = scale_(logits, bias, scaling)
    z = torch.sub(z, max, out=out)
    if entropy_terms is None:
        u = exp_below_zero(z)
    else:
        g, s, offset = entropy_terms
        factor = (z + offset).mul_(s).add_(g)
        u = z.exp_().mul_(factor)
    return u if slope is None else u.mul_(slope)


def scaled(
    logits: Tensor, bias: Tensor | None, scaling: HeadScaling
) -> tuple[Tensor, Tensor | None]:
    """The scaled logits of raw ones, which stay as they are, and the slope of the cap if any."""
    if bias is None and scaling == HeadScaling():
        return logits, None
    return scale_(logits.clone(), bias, scaling)


def scale_(
    logits: Tensor, bias: Tensor | None, scaling: HeadScaling
) -> tuple[Tensor, Tensor | None]:
    """The scaled logits in place of the raw ones, and the slope of the cap where there is one."""
    slope = None
    if bias is not None:
        logits += bias
    if scaling.logit_scale != 1.0:
        logits *= scaling.logit_scale
    if scaling.softcap is not None:
        logits.div_(scaling.softcap).tanh_()
        slope = 1 - logits**2
        logits *= scaling.softcap
    if scaling.temperature != 1.0:
        logits /= scaling.temperature
    return logits, slope


def exp_below_zero(x: Tensor) -> Tensor:
    """The exponential of `x` <= 0 in place, clipped below so that no result is subnormal.

    What is clipped is too small to change a sum. Subnormal numbers make the exponential and a
    matrix product a hundred times slower.
    """
    return x.clamp_(min=-60 if x.dtype == torch.float32 else -600).exp_()


class TiledLogits:
    """The raw logits h W^T of a head, one tile at a time.

    Args:
        hidden: (N, H).
        weight: (V, H).
        operand_dtype: Precision of what enters the matrix products.

    Attributes:
        operand_dtype: As given.
        dtype: Precision of logits and sums.
        hidden: (N, H) in `dtype`.
        row_blocks: The rows of each tile.
        column_blocks: The columns of each tile.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, operand_dtype: torch.dtype):
        device = "cpu" if hidden.device.type == "cpu" else "gpu"
        self.operand_dtype = operand_dtype
        self.dtype = torch.promote_types(operand_dtype, torch.float32)
        self.hidden = hidden.to(self.dtype)
        self._operand, self._weight = hidden.to(operand_dtype), weight
        height = max(1, min(hidden.size(0), TILE_ROWS[device]))
        width = max(1, TILE_ELEMENTS[device] // height)
        if width > 128:  # whole cache lines and tensor-core fragments
            width -= width % 128
        width = min(weight.size(0), width)
        self.row_blocks = _slices(hidden.size(0), height)
        self.column_blocks = _slices(weight.size(0), width)
        self._size = height * width
        self._tile: Tensor | None = None
        self._spare: Tensor | None = None

    def tiles(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield columns, their weights, and raw logits, which the next tile overwrites."""
        for columns in self.column_blocks:
            w = self.weights(columns)
            yield columns, w, self.product(rows, w)

    def weights(self, columns: slice) -> Tensor:
        """The weights of some columns, as they enter the matrix products."""
        return self._weight[columns].to(self._operand.dtype)

    def product(self, rows: slice, w: Tensor) -> Tensor:
        """Raw logits of some rows for the columns of `w`, which the next product overwrites."""
        hidden = self._operand[rows]
        if self._tile is None:
            self._tile = self.hidden.new_empty(self._size)
        z = self._tile[: hidden.size(0) * w.size(0)].view(hidden.size(0), w.size(0))
        return add_product(z, hidden, w.T, beta=0)

    def spare(self, z: Tensor) -> Tensor:
        """A buffer in the operands' precision and the shape of the tile `z`, the same each time."""
        if self._spare is None:
            self._spare = self._operand.new_empty(self._size)
        return self._spare[: z.numel()].view(z.shape)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: int = 1, alpha: int = 1) -> Tensor:
    """Add alpha a b to beta `total`, in the precision of `total` whatever a and b are in."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b, beta=beta, alpha=alpha)
    if total.is_cuda:
        return torch.addmm(total, a, b, beta=beta, alpha=alpha, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=alpha)


def mean_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(H,) mean of the rows of a weight (V, H), without a copy of all of it in `dtype`."""
    height = max(1, TILE_ELEMENTS["cpu"] // max(1, weight.size(1)))
    blocks = weight.split(height)
    return torch.stack([block.to(dtype).sum(0) for block in blocks]).sum(0) / weight.size(0)


def _slices(total: int, size: int) -> list[slice]:
    """Slices that cover range(total); one empty slice if `total` is 0."""
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]
