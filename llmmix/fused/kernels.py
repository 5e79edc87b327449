"""`fold` and `softmax_gradient` of `llmmix.fused.tiles` on a GPU, with the same arguments.

Each is a Triton kernel. One program handles one row of a tile, or a block of a row. It reads each
logit from memory once or twice and writes the result once, in the precision of the matrix product
that follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmmix.fused.largest import merge_largest
from llmmix.fused.tiles import HeadScaling, RunningSoftmax, scaled

BLOCK = 1024


@triton.jit
def _scaled(z, logit_scale, softcap, temperature, HAS_CAP: tl.constexpr):
    """The scaled logits, and the slope of the cap (meaningless without a cap)."""
    z = z * logit_scale
    slope = z
    if HAS_CAP:
        tanh = 2 * tl.sigmoid(2 * z / softcap) - 1
        slope = 1 - tanh * tanh
        z = tanh * softcap
    return z / temperature, slope


@triton.jit
def _load(logits_ptr, bias_ptr, columns, mask, HAS_BIAS: tl.constexpr):
    """Raw logits of some columns of a row, with their bias."""
    raw = tl.load(logits_ptr + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return raw


@triton.jit
def _fold_kernel(  # noqa: C901  the branches are resolved at compile time
    logits_ptr,
    out_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    sum_ez_ptr,
    sum_ee_ptr,
    sum_z_ptr,
    target_z_ptr,
    target_slope_ptr,
    is_top1_ptr,
    shrink_ptr,
    start,
    n_columns,
    logit_scale,
    softcap,
    temperature,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold one row of a tile into its running softmax: the maximum first, then the sums."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * n_columns
    out_ptr += row * n_columns
    lanes = tl.arange(0, BLOCK)
    first = tl.load(targets_ptr + row * K) - start

    tile_max = float("-inf")
    max_before_first = float("-inf")
    sum_z = 0.0
    for begin in range(0, n_columns, BLOCK):
        columns = begin + lanes
        mask = columns < n_columns
        raw = _load(logits_ptr, bias_ptr, columns, mask, HAS_BIAS)
        z, _ = _scaled(raw, logit_scale, softcap, temperature, HAS_CAP)
        if MEAN:
            sum_z += tl.sum(tl.where(mask, z, 0.0), axis=0)
        z = tl.where(mask, z, float("-inf"))
        tile_max = tl.maximum(tile_max, tl.max(z, axis=0))
        if TOP1:
            before = tl.where(columns < first, z, float("-inf"))
            max_before_first = tl.maximum(max_before_first, tl.max(before, axis=0))

    old_max = tl.load(max_ptr + row)
    new_max = tl.maximum(old_max, tile_max)
    shrink = tl.exp(old_max - new_max)
    sum_e = 0.0
    sum_ez = 0.0
    sum_ee = 0.0
    for begin in range(0, n_columns, BLOCK):
        columns = begin + lanes
        mask = columns < n_columns
        raw = _load(logits_ptr, bias_ptr, columns, mask, HAS_BIAS)
        z, slope = _scaled(raw, logit_scale, softcap, temperature, HAS_CAP)
        e = tl.where(mask, tl.exp(z - new_max), 0.0)
        sum_e += tl.sum(e, axis=0)
        if ENTROPY:
            sum_ez += tl.sum(e * z, axis=0)
        if SUM_SQ:
            sum_ee += tl.sum(e * e, axis=0)
        if HAS_CAP:
            e *= slope
        tl.store(out_ptr + columns, e.to(out_ptr.dtype.element_ty), mask=mask)

    tl.store(max_ptr + row, new_max)
    tl.store(shrink_ptr + row, shrink)
    tl.store(sum_ptr + row, tl.load(sum_ptr + row) * shrink + sum_e)
    if ENTROPY:
        tl.store(sum_ez_ptr + row, tl.load(sum_ez_ptr + row) * shrink + sum_ez)
    if SUM_SQ:
        tl.store(sum_ee_ptr + row, tl.load(sum_ee_ptr + row) * shrink * shrink + sum_ee)
    if MEAN:
        tl.store(sum_z_ptr + row, tl.load(sum_z_ptr + row) + sum_z)
    if TOP1:
        if tile_max > old_max:  # an earlier tile's equal maximum comes first
            tl.store(is_top1_ptr + row, 0)

    for k in range(K):
        local = tl.load(targets_ptr + row * K + k) - start
        if (local >= 0) & (local < n_columns):
            raw = tl.load(logits_ptr + local)
            if HAS_BIAS:
                raw += tl.load(bias_ptr + local).to(tl.float32)
            z, slope = _scaled(raw, logit_scale, softcap, temperature, HAS_CAP)
            tl.store(target_z_ptr + row * K + k, z)
            if HAS_CAP:
                tl.store(target_slope_ptr + row * K + k, slope)
            if TOP1:
                if k == 0:
                    best = (z == tile_max) & (tile_max > old_max) & (max_before_first < z)
                    if best:
                        tl.store(is_top1_ptr + row, 1)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    out_ptr,
    bias_ptr,
    max_ptr,
    g_ptr,
    s_ptr,
    offset_ptr,
    n_columns,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute u of `softmax_gradient` for one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n_columns
    raw = _load(logits_ptr + row * n_columns, bias_ptr, columns, mask, HAS_BIAS)
    z, slope = _scaled(raw, logit_scale, softcap, temperature, HAS_CAP)
    z -= tl.load(max_ptr + row)
    u = tl.exp(z)
    if HAS_CAP:
        u *= slope
    if ENTROPY:
        u *= tl.load(g_ptr + row) + tl.load(s_ptr + row) * (z + tl.load(offset_ptr + row))
    out = out_ptr + row * n_columns + columns
    tl.store(out, u.to(out_ptr.dtype.element_ty), mask=mask)


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
    """Do what `llmmix.fused.tiles.fold` does, but leave the raw logits unchanged."""
    n, n_columns = logits.shape
    shrink = torch.empty_like(state.max)
    if n == 0:
        return shrink
    if "top_k_entropy" in outputs:
        merge_largest(state.largest, scaled(logits, bias, scaling)[0], first=start == 0)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _fold_kernel[(n,)](
            logits,
            out,
            bias,
            targets,
            *state[:-1],  # without the largest logits
            shrink,
            start,
            n_columns,
            *_scaling_arguments(scaling),
            K=targets.size(1),
            HAS_BIAS=bias is not None,
            HAS_CAP=scaling.softcap is not None,
            ENTROPY="entropy" in outputs,
            SUM_SQ="log_sum_sq_probs" in outputs,
            MEAN="mean_logits" in outputs,
            TOP1="is_top1" in outputs,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return shrink


def softmax_gradient(
    logits: Tensor,
    bias: Tensor | None,
    scaling: HeadScaling,
    max: Tensor,
    entropy_terms: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
) -> Tensor:
    """Do what `llmmix.fused.tiles.softmax_gradient` does, but leave the raw logits unchanged."""
    n, n_columns = logits.shape
    if n == 0:
        return out
    with torch.cuda.device_of(logits):
        _gradient_kernel[(n, triton.cdiv(n_columns, BLOCK))](
            logits,
            out,
            bias,
            max,
            *(entropy_terms or (max, max, max)),
            n_columns,
            *_scaling_arguments(scaling),
            HAS_BIAS=bias is not None,
            HAS_CAP=scaling.softcap is not None,
            ENTROPY=entropy_terms is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return out


def _scaling_arguments(scaling: HeadScaling) -> tuple[float, float, float]:
    """Scale, cap and temperature as the kernels take them; without a cap, its value is not read."""
    return scaling.logit_scale, scaling.softcap or 1.0, scaling.temperature
