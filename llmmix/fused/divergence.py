r"""The KL divergence of a model from a reference, without holding the (N, V) logits of either.

    KL(q || p) = sum_v q[v] (r[v] - z[v]) - lse(r) + lse(z),    p = softmax(z), q = softmax(r)

where z are the model's scaled logits and r those of the reference. The tiles of both are made side
by side. Each row keeps the running softmax of z and that of r, and sum_v exp(r - max r) (r - z).

With f = dz/d(h W^T) and upstream gradients g of the divergence and g_k of the targets' log p,

    dh    = sum_k g_k f[y_k] W[y_k] + (g - sum_k g_k) E_p[f W] - g E_q[f W]
    dW[v] = sum_(rows, k: y_k = v) g_k f[v] h + sum_rows ((g - sum_k g_k) p[v] - g q[v]) f[v] h

The forward accumulates both expectations of f W, so that a frozen head needs no product in its
backward. A trained head makes the tiles of both again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmmix.fused.device import arithmetic, operand_dtype
from llmmix.fused.gradients import target_gradients
from llmmix.fused.sharding import gathered
from llmmix.fused.statistics import HeadStatistics, check_inputs, statistics_of
from llmmix.fused.tiles import (
    HeadScaling,
    RunningSoftmax,
    TiledLogits,
    add_product,
    exp_below_zero,
    running_softmax,
    scale_,
    scaled,
)


class LinearHead(NamedTuple):
    """A head, and the hidden states that it is applied to.

    Attributes:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,), or None.
        scaling: How its model scales its logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scaling: HeadScaling = HeadScaling()


class RunningReference(NamedTuple):
    """Sums over the part of the vocabulary seen so far, each (n, 1), updated in place.

    With e = exp(r - max): `sum` adds up e, and `cross` e (r - z).
    """

    max: Tensor
    sum: Tensor
    cross: Tensor


@torch.compiler.disable
def statistics_and_kl(
    model: LinearHead,
    targets: Tensor,
    reference: LinearHead,
    outputs: tuple[str, ...] = ("log_probs",),
    top_k: int = 20,
) -> tuple[HeadStatistics, Tensor]:
    """Statistics of a model's rows, and KL(reference || model) of each, from the same logits.

    Where both heads have one weight (a LoRA model and itself without the adapter), it is read once.

    Args:
        model: The head and its hidden states (N, H).
        targets: (N,) or (N, K) token ids in [0, V).
        reference: Another head of the same vocabulary, its hidden states (N, any width).
        outputs: Names among `llmmix.logprobs.STATISTICS`; `log_probs` is always computed.
        top_k: The most likely tokens that `top_k_entropy` is over.

    Returns:
        The statistics, of which `log_probs` alone has a gradient here, and (N,) divergences in
        nats. Both are differentiable in the model's hidden states, weight and bias; nothing flows
        to the reference. In fp64 if an input is, else in fp32. A row of NaN or an infinity in the
        hidden states of the model or of the reference comes out as NaN.

    Raises:
        ValueError: The shapes do not fit, the two vocabularies differ in size, a target is outside
            [0, V), an output is unknown, or `top_k` is below 1.
    """
    check_inputs(model.hidden, model.weight, targets, model.bias, outputs, top_k)
    _check_reference(model, reference)
    columns = targets if targets.dim() == 2 else targets.unsqueeze(1)
    operand = torch.promote_types(*(operand_dtype(x.hidden, x.weight) for x in (model, reference)))
    with torch.autocast(model.hidden.device.type, enabled=False):
        kl, log_probs, *rest = _TiledDivergence.apply(
            *model[:3],
            *reference[:3],
            columns.long().contiguous(),
            (model.scaling, reference.scaling),
            tuple(outputs),
            top_k if "top_k_entropy" in outputs else 0,
            operand,
            torch.is_grad_enabled() and model.hidden.requires_grad,
        )
    return HeadStatistics(log_probs.view(targets.shape), *rest), kl


def _check_reference(model: LinearHead, reference: LinearHead) -> None:
    n, vocabulary = model.hidden.size(0), model.weight.size(0)
    hidden, weight, bias, _ = reference
    if hidden.shape != (n, weight.size(-1)):
        raise ValueError(
            f"The reference's hidden states must be ({n}, {weight.size(-1)}), one for each of the "
            f"model's and as wide as the reference's weight, got {tuple(hidden.shape)}."
        )
    if weight.size(0) != vocabulary or (bias is not None and bias.shape != (vocabulary,)):
        raise ValueError(
            f"The reference's vocabulary has {weight.size(0)} tokens and the model's {vocabulary}. "
            "Pass a reference with the model's own vocabulary."
        )


class _TiledDivergence(torch.autograd.Function):
    """`statistics_and_kl`; the equations stand at the top of the file."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, hidden_r, weight_r, bias_r, targets, scalings, *options):
        outputs, top_k, operand, need_q = options
        ctx.set_materialize_grads(False)
        logits = TiledLogits(hidden, weight, operand)
        pair = _PairedTiles(logits, weight, bias, (hidden_r, weight_r, bias_r), scalings)
        mean_p, mean_q = (torch.zeros_like(logits.hidden) if need_q else None for _ in range(2))
        states, references = [], []
        for rows in logits.row_blocks:
            state = running_softmax(targets[rows], logits.dtype, top_k)
            reference = RunningReference(state.max.clone(), *(state.sum.clone() for _ in range(2)))
            for columns, w, b, z, r in pair.tiles(rows):
                z_scaled, slope = scaled(z, b, scalings[0])
                shrink = _fold_reference(reference, r, z_scaled, pair.difference(z))
                if mean_q is not None:
                    q = r if slope is None else r.mul_(slope)
                    add_product(mean_q[rows].mul_(shrink), q.to(operand), w)
                e = logits.spare(z)
                part = (z, b, scalings[0], targets[rows], columns.start, outputs)
                shrink = arithmetic(z).fold(state, *part, out=e)
                if mean_p is not None:
                    add_product(mean_p[rows].mul_(shrink), e, w)
            states.append(state)
            references.append(reference)
        state = RunningSoftmax(*map(torch.cat, zip(*states, strict=True)))
        reference = RunningReference(*map(torch.cat, zip(*references, strict=True)))
        # NaN for a row that holds NaN or an infinity, which the cap of a logit would hide
        state.sum.add_((logits.hidden * 0).sum(1, keepdim=True))
        reference.sum.add_((pair.reference.hidden * 0).sum(1, keepdim=True))
        if mean_p is not None and mean_q is not None:
            mean_p /= state.sum
            mean_q /= reference.sum
        statistics = statistics_of(state, weight.size(0), outputs)
        ctx.mark_non_differentiable(*(x for x in statistics[1:] if x is not None))
        trained = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(
            *(hidden, weight, bias, targets, state.target_slope, mean_p, mean_q),
            *((hidden_r, weight_r, bias_r) if trained else ()),
            *((state.max, state.sum, *reference[:2]) if trained else ()),
        )
        ctx.scalings, ctx.operand = scalings, operand
        return _divergence(state, reference).squeeze(1), *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl, grad_log_probs, *_):
        hidden, weight, bias, targets, slope, mean_p, mean_q, *of_tiles = ctx.saved_tensors
        gain = ctx.scalings[0].gain
        g = torch.zeros_like(slope) if grad_log_probs is None else gain * grad_log_probs
        g_q = torch.zeros_like(g[:, :1]) if grad_kl is None else gain * grad_kl.unsqueeze(1)
        g_p = g_q - g.sum(1, keepdim=True)
        needed = ctx.needs_input_grad[:3]
        with (
            torch.autocast(hidden.device.type, enabled=False),
            gathered(weight, bias, *of_tiles[1:3]),
        ):
            logits = TiledLogits(hidden, weight, ctx.operand)
            dh, dw, db = target_gradients(needed, logits, weight, bias, targets, g * slope)
            if dh is not None:
                dh.addcmul_(mean_p, g_p).addcmul_(mean_q, g_q, value=-1)
            if dw is not None or db is not None:
                top, total, top_r, total_r = of_tiles[3:]
                pair = _PairedTiles(logits, weight, bias, of_tiles[:3], ctx.scalings)
                for rows, columns, d in pair.gradients(top, g_p / total, top_r, g_q / total_r):
                    if dw is not None:
                        h = logits.hidden[rows].to(ctx.operand)
                        add_product(dw[columns], d.T.to(ctx.operand), h)
                    if db is not None:
                        db[columns] += d.sum(0)
        grads = zip((dh, dw, db), (hidden, weight, bias), strict=True)
        return *(None if d is None else d.to(x.dtype) for d, x in grads), *(None,) * 9


class _PairedTiles:
    """The tiles of two heads side by side."""

    def __init__(self, logits, weight, bias, reference, scalings):
        self.logits = logits
        hidden_r, weight_r, bias_r = reference
        self.reference = TiledLogits(hidden_r, weight_r, logits.operand_dtype)
        self._biases, self._scalings = (bias, bias_r), scalings
        self._shared = (
            weight.data_ptr() == weight_r.data_ptr()
            and weight.shape == weight_r.shape
            and weight.stride() == weight_r.stride()
        )
        self._difference: Tensor | None = None

    def tiles(self, rows):
        """Yield columns, the model's weight, bias and raw logits, the reference's scaled logits."""
        for columns, w, z in self.logits.tiles(rows):
            b, b_r = (None if bias is None else bias[columns] for bias in self._biases)
            r = self.reference.product(rows, w if self._shared else self.reference.weights(columns))
            yield columns, w, b, z, scale_(r, b_r, self._scalings[1])[0]

    def difference(self, z):
        """A buffer in the shape and the precision of the tile `z`, the same each time."""
        if self.logits.operand_dtype == z.dtype:
            return self.logits.spare(z)
        if self._difference is None:
            self._difference = z.new_empty(z.numel())  # the first tile is the largest
        return self._difference[: z.numel()].view(z.shape)

    def gradients(self, top, factor, top_r, factor_r):
        """Yield rows, columns, and the gradient of their raw logits without the targets' part.

        It is (factor exp(z - top) - factor_r exp(r - top_r)) times the slope of the cap.
        """
        for rows in self.logits.row_blocks:
            for columns, _, b, z, r in self.tiles(rows):
                z, slope = scale_(z, b, self._scalings[0])
                d = exp_below_zero(z.sub_(top[rows])).mul_(factor[rows])
                d -= exp_below_zero(r.sub_(top_r[rows])).mul_(factor_r[rows])
                yield rows, columns, d if slope is None else d.mul_(slope)


def _fold_reference(state: RunningReference, r: Tensor, z: Tensor, difference: Tensor) -> Tensor:
    """Fold a tile of scaled logits (n, columns) into `state`; `r` becomes exp(r - max).

    Returns:
        (n, 1), the factor by which sums over earlier tiles shrink, as the maximum rises.
    """
    torch.sub(r, z, out=difference)
    highest = torch.maximum(state.max, r.amax(1, keepdim=True))
    shrink = (state.max - highest).exp_()
    state.max.copy_(highest)
    e = exp_below_zero(r.sub_(highest))
    state.sum.mul_(shrink).add_(e.sum(1, keepdim=True))
    state.cross.mul_(shrink).add_(difference.mul_(e).sum(1, keepdim=True))
    return shrink


def _divergence(model: RunningSoftmax, reference: RunningReference) -> Tensor:
    """(N, 1) KL(reference || model); small terms are subtracted, not logits of any size."""
    between = (model.max - reference.max) + (model.sum.log() - reference.sum.log())
    return reference.cross / reference.sum + between
