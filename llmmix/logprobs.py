r"""Log-probabilities of a language-model head, without holding the (N, V) logits.

    z      = logit_scale * (h W^T + b)
    z      = softcap * tanh(z / softcap)         where the model caps its logits
    log p  = log_softmax(z / temperature)

The logits are made tile by tile, folded into a running softmax, and dropped. With f = dz/d(h W^T)
up to a constant (1 unless the logits are capped), and targets y_k with upstream gradients g_k,

    dh = sum_k g_k f[y_k] W[y_k] - (sum_k g_k) q,      q = sum_v p[v] f[v] W[v]

where q depends neither on the targets nor on g: the forward accumulates it tile by tile, and a
frozen head needs no third matrix product. A trained head also needs

    dW[v] = sum_(rows, k: y_k = v) g_k f[v] h - sum_rows (sum_k g_k) p[v] f[v] h

for which the backward computes each tile of p again, unless N x V probabilities fit in a memory
budget and were kept. The gradient of the entropy, which no loss of ours takes, computes the tiles
again too.

    symbol   argument       shape
    h        hidden         (N, H)   hidden states after the final norm
    W, b     weight, bias   (V, H), (V,)
    y        targets        (N,) or (N, K)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmmix.fused.device import arithmetic, operand_dtype
from llmmix.fused.gradients import target_gradients
from llmmix.fused.sharding import gathered
from llmmix.fused.statistics import STATISTICS as STATISTICS
from llmmix.fused.statistics import HeadStatistics, check_inputs, statistics_of
from llmmix.fused.tiles import (
    HeadScaling,
    RunningSoftmax,
    TiledLogits,
    add_product,
    running_softmax,
)

MEMORY_BUDGET = 2**28  # bytes of probabilities that a trained head may keep for its backward


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
        Log-probabilities in nats, in the shape of `targets`; fp64 if `hidden` or `weight` is, else
        fp32. Differentiable in `hidden`, `weight` and `bias`. A row of `hidden` that holds NaN or
        an infinity comes out as NaN.

    Raises:
        ValueError: The shapes do not fit, or a target is outside [0, V).
    """
    scaling = HeadScaling(logit_scale, softcap, temperature)
    return linear_statistics(hidden, weight, targets, bias=bias, scaling=scaling).log_probs


@torch.compiler.disable
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: HeadScaling | None = None,
    outputs: tuple[str, ...] = ("log_probs",),
    top_k: int = 20,
    memory_budget: int | None = None,
) -> HeadStatistics:
    """The log-probabilities of `linear_logprobs`, and more of `STATISTICS` from the same logits.

    Args:
        hidden: (N, H).
        weight: (V, H).
        targets: (N,) or (N, K) token ids in [0, V).
        bias: (V,), or None.
        scaling: How the model scales its logits.
        outputs: Names among `STATISTICS`; `log_probs` is always computed.
        top_k: The most likely tokens that `top_k_entropy` is over.
        memory_budget: Bytes of probabilities that this call of a trained head may keep for the
            backward, which then need not compute them again; see `keeps_probabilities`. None for
            `MEMORY_BUDGET`.

    Raises:
        ValueError: The shapes do not fit, a target is outside [0, V), an output is unknown, or
            `top_k` is below 1.
    """
    check_inputs(hidden, weight, targets, bias, outputs, top_k)
    columns = targets if targets.dim() == 2 else targets.unsqueeze(1)
    gradients = torch.is_grad_enabled()
    # Both depend on autocast, which is then switched off: both passes use one precision
    operand = operand_dtype(hidden, weight)
    keep = gradients and keeps_probabilities(hidden, weight, memory_budget)
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs, *rest = _TiledHead.apply(
            hidden,
            weight,
            None if bias is None else bias.contiguous(),
            columns.long().contiguous(),
            scaling or HeadScaling(),
            tuple(outputs),
            top_k if "top_k_entropy" in outputs else 0,
            operand,
            gradients and hidden.requires_grad,
            keep,
        )
    return HeadStatistics(log_probs.view(targets.shape), *rest)


def keeps_probabilities(hidden: Tensor, weight: Tensor, memory_budget: int | None = None) -> bool:
    """Whether a head keeps its probabilities for the backward, instead of computing them again.

    It does when the head is trained and all N x V of them fit in `memory_budget` bytes.
    """
    budget = MEMORY_BUDGET if memory_budget is None else memory_budget
    size = hidden.size(0) * weight.size(0) * operand_dtype(hidden, weight).itemsize
    return weight.requires_grad and size <= budget


class _TiledHead(torch.autograd.Function):
    """`linear_statistics`; the equations stand at the top of the file."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scaling, outputs, top_k, operand, need_q, keep):
        ctx.set_materialize_grads(False)  # most callers only log the entropy
        logits = TiledLogits(hidden, weight, operand)
        q = torch.zeros_like(logits.hidden) if need_q else None
        kept, states = [], []
        for rows in logits.row_blocks:
            state = running_softmax(targets[rows], logits.dtype, top_k)
            for columns, w, z in logits.tiles(rows):
                e = torch.empty_like(z, dtype=operand) if keep else logits.spare(z)
                shrink = arithmetic(z).fold(
                    state,
                    z,
                    None if bias is None else bias[columns],
                    scaling,
                    targets[rows],
                    columns.start,
                    outputs,
                    out=e,
                )
                if q is not None:
                    add_product(q[rows].mul_(shrink), e, w)
                if keep:
                    kept += [e, state.max.clone()]
            states.append(state)
        state = RunningSoftmax(*map(torch.cat, zip(*states, strict=True)))
        # NaN for a row that holds NaN or an infinity, which the cap of a logit would hide
        state.sum.add_((logits.hidden * 0).sum(1, keepdim=True))
        if q is not None:
            q /= state.sum
        statistics = statistics_of(state, weight.size(0), outputs)
        _, entropy, *others = statistics
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        ctx.save_for_backward(
            *(hidden, weight, bias, targets),
            *(state.max, state.sum, state.target_slope, entropy, q),
            *kept,
        )
        ctx.scaling, ctx.operand = scaling, operand
        return tuple(statistics)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, *_):
        hidden, weight, bias, targets, top, total, slope, entropy, q, *kept = ctx.saved_tensors
        gain = ctx.scaling.gain
        g = torch.zeros_like(slope) if grad_log_probs is None else gain * grad_log_probs
        sum_g, entropy_terms = g.sum(1, keepdim=True), None
        if grad_entropy is not None:
            offset = entropy.unsqueeze(1) - total.log()
            entropy_terms = (sum_g, gain * grad_entropy.unsqueeze(1), offset)
        with torch.autocast(hidden.device.type, enabled=False), gathered(weight, bias):
            logits = TiledLogits(hidden, weight, ctx.operand)
            needed = ctx.needs_input_grad
            dh, dw, db = target_gradients(needed, logits, weight, bias, targets, g * slope)
            if dh is not None and entropy_terms is None:
                dh.addcmul_(q, sum_g, value=-1)
            if dw is not None or db is not None or entropy_terms is not None:
                parts = _softmax_part(logits, bias, ctx.scaling, top, sum_g, entropy_terms, kept)
                for rows, columns, w, u, r in parts:
                    r = r / total[rows]
                    if dh is not None and entropy_terms is not None:
                        add_product(dh[rows], (r * u).to(u.dtype), w, alpha=-1)
                    if dw is not None:
                        weighted = (r * logits.hidden[rows]).to(u.dtype)
                        add_product(dw[columns], u.T, weighted, alpha=-1)
                    if db is not None:
                        db[columns] -= (u.T.to(r.dtype) @ r).squeeze(1)
        grads = zip((dh, dw, db), (hidden, weight, bias), strict=True)
        return *(None if d is None else d.to(x.dtype) for d, x in grads), *(None,) * 7


def _softmax_part(logits, bias, scaling, top, sum_g, entropy_terms, kept) -> Iterator[tuple]:
    """Yield tiles u and row factors r: the softmax subtracts r (u W) from dh, u^T (r h) from dW."""
    tiles_kept = zip(kept[0::2], kept[1::2], strict=True)  # exp(z - max), and that max
    for rows in logits.row_blocks:
        if kept and entropy_terms is None:
            for columns in logits.column_blocks:
                e, top_then = next(tiles_kept)
                yield rows, columns, None, e, sum_g[rows] * (top_then - top[rows]).exp()
            continue
        r, part = sum_g[rows], None
        if entropy_terms is not None:
            r, part = torch.ones_like(r), tuple(x[rows] for x in entropy_terms)
        for columns, w, z in logits.tiles(rows):
            b = None if bias is None else bias[columns]
            out = z if w.dtype == z.dtype else logits.spare(z)
            u = arithmetic(z).softmax_gradient(z, b, scaling, top[rows], part, out)
            yield rows, columns, w, u, r
