r"""Losses of a token, for SFT: each is cross-entropy with a weight of its own for every token.

With p the probability of a token, lp its log, w = -dl/dlp, and sg a stopped gradient:

    nll              -lp                                            w = 1
    dft              -sg(p) lp                                      w = p              2508.05629
    gce              (1 - p^q) / q,   -lp for q = 0                 w = p^q            2304.07288
    threshold        gce where p >= c, or where p <= c; else 0      w = p^q or 0       2510.00526
    deft             gce with q = sg(sum_v p_v^2)                   w = p^q            2602.11424
    eaft             -sg(H / ln K)^alpha lp                         w = (H / ln K)^alpha  2601.02151
    asft             dft + lambda KL(reference || model)            w = p              2509.23753
    psft             -min(r, clip(r, 1-e_l, 1+e_h)), r = p / p_old  w = r [r <= 1+e_h] 2508.17784
    focal            -(1 - p)^gamma lp                              see `token_weight` 1708.02002
    label_smoothing  -lp + e (z_y - mean_v z_v)                     w = 1
    gem              -beta lp at temperature beta                   w = beta           2408.16673
    select           -lp where the score is among a row's highest   w = 1 or 0         2404.07965

Three of them have one gradient: dft, 1 - p, and gce with q = 1. Only dft's value is not monotone in
p: it rises while p grows to 1/e.

Every function takes log-probabilities of any shape and returns a loss of each, in fp32 or better.
The gradient is -w even where autograd through the value would give NaN or infinity. Nothing here
reduces or masks: at a position that is not scored, drop the result.

    symbol   argument
    lp       log_probs   in nats; above 0, where rounding took it, it counts as 0
    H        entropy     of the model's distribution, in nats; over its K most likely tokens
    z        logits; above_mean is z_y minus the mean over the vocabulary

Trainer: llmmix/token_losses/trainer.py. Recipe: recipes/token_losses.py.
"""

import math

import torch
from torch import Tensor

from llmmix.precision import at_least_fp32
from llmmix.token_losses.weights import (
    clamped,
    on_kept_side,
    ratio_to,
    sum_of_squares,
    token_weight,
)


def nll_loss(log_probs: Tensor) -> Tensor:
    """-lp: cross-entropy.

    Args:
        log_probs: In nats, of any shape.
    """
    return -at_least_fp32(log_probs)


def dft_loss(log_probs: Tensor) -> Tensor:
    """-sg(p) lp: Dynamic Fine-Tuning.

    Args:
        log_probs: In nats, of any shape.
    """
    weight = token_weight("dft", log_probs)
    return _with_weight(log_probs, weight * -at_least_fp32(log_probs.detach()), weight)


def gce_loss(log_probs: Tensor, q: float | Tensor) -> Tensor:
    """(1 - p^q) / q: generalized cross-entropy; -lp for q = 0, 1 - p for q = 1.

    It is comp-sum's loss with tau = q + 1: q = -1 is 1/p - 1.

    Args:
        log_probs: In nats, of any shape.
        q: At least -1; a number, or one for each token. Below 0 the weight p^q is unbounded.

    Raises:
        ValueError: The number `q` is below -1.
    """
    lp, weight = clamped(log_probs), token_weight("gce", log_probs, q=q)
    if isinstance(q, Tensor):
        q = at_least_fp32(q.detach())
        safe = torch.where(q == 0, 1.0, q)
        loss = torch.where(q == 0, -lp, -torch.expm1(q * lp) / safe)
    else:
        loss = -torch.expm1(q * lp) / q if q else -lp
    return _with_weight(log_probs, loss, weight)


def threshold_loss(log_probs: Tensor, p: float, keep: str = "top", q: float = 0.0) -> Tensor:
    """The loss `gce_loss` of the tokens on one side of a probability, zero for the others.

    Args:
        log_probs: In nats, of any shape.
        p: c, the probability at the border, which both sides keep.
        keep: `"top"`: the tokens with p >= c; `"bottom"`: those with p <= c.
        q: 0 for -lp, 1 for 1 - p.

    Raises:
        ValueError: `keep` is neither, or `q` is below -1.
    """
    return torch.where(on_kept_side(log_probs, p, keep), gce_loss(log_probs, q), 0.0)


def deft_loss(log_probs: Tensor, log_sum_sq_probs: Tensor) -> Tensor:
    """`gce_loss` with q = sum_v p_v^2 of the model's own distribution: DEFT.

    A sure model (q near 1) learns as under dft, an unsure one as under nll.

    Args:
        log_probs: In nats, of any shape.
        log_sum_sq_probs: Log of the sum of squared probabilities, in the same shape.
    """
    return gce_loss(log_probs, sum_of_squares(log_sum_sq_probs))


def eaft_loss(log_probs: Tensor, entropy: Tensor, alpha: float, top_k: int) -> Tensor:
    """-sg(H / ln K)^alpha lp: entropy-adaptive fine-tuning.

    Args:
        log_probs: In nats, of any shape.
        entropy: H in nats, in the same shape, over `top_k` tokens.
        alpha: Power of the gate; 0 is nll.
        top_k: K, the number of tokens that H is over: the size of the vocabulary for the full one.

    Raises:
        ValueError: `top_k` is below 2.
    """
    weight = token_weight("eaft", log_probs, entropy=entropy, alpha=alpha, top_k=top_k)
    return _with_weight(log_probs, weight * -at_least_fp32(log_probs.detach()), weight)


def asft_loss(log_probs: Tensor, kl: Tensor, alpha: float) -> Tensor:
    """`dft_loss` + lambda KL(reference || model): anchored fine-tuning.

    Args:
        log_probs: In nats, of any shape.
        kl: The divergence at each token, in the same shape; differentiable.
        alpha: lambda.
    """
    return dft_loss(log_probs) + alpha * at_least_fp32(kl)


def psft_loss(
    log_probs: Tensor, old_log_probs: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-min(r, clip(r, 1-e_l, 1+e_h)) with r = p / p_old: proximal SFT, PPO's at advantage 1.

    A token whose probability has risen by more than 1 + e_h stops. `clip_low` never acts, for the
    minimum is then r itself: it is here for the method's own form.

    Args:
        log_probs: In nats, of any shape.
        old_log_probs: Those of an earlier copy of the model, in the same shape.
        clip_low: e_l.
        clip_high: e_h.
    """
    ratio = ratio_to(log_probs, old_log_probs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    weight = token_weight(
        "psft",
        log_probs,
        old_log_probs=old_log_probs,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return _with_weight(log_probs, -torch.minimum(ratio, clipped), weight)


def focal_loss(log_probs: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma lp: the focal loss, which turns to the tokens that are not learned yet.

    Args:
        log_probs: In nats, of any shape.
        gamma: At least 0; 0 is nll.

    Raises:
        ValueError: `gamma` is negative.
    """
    lp = clamped(log_probs)
    loss = (-torch.expm1(lp)) ** gamma * -lp
    return _with_weight(log_probs, loss, token_weight("focal", log_probs, gamma=gamma))


def label_smoothing_loss(log_probs: Tensor, above_mean: Tensor, factor: float) -> Tensor:
    """(1 - e)(-lp) + e mean_v(-log p_v) = -lp + e (z_y - mean_v z_v): label smoothing.

    Args:
        log_probs: In nats, of any shape.
        above_mean: z_y minus the mean logit, in the same shape; differentiable.
        factor: e.
    """
    return -at_least_fp32(log_probs) + factor * at_least_fp32(above_mean)


def gem_loss(log_probs: Tensor, beta: float) -> Tensor:
    """-beta lp at temperature beta: GEM with a linear h, which keeps the model's diversity.

    Its gradient in the logits is softmax(z / beta) - onehot(y), that of the method's own form,
    -sum_v sg(q_v)(log p_y - log p_v) with q = softmax(z / beta).

    Args:
        log_probs: Log-probabilities under softmax(z / beta), in nats, of any shape.
        beta: Temperature; 1 is nll.
    """
    return beta * nll_loss(log_probs)


def select_loss(log_probs: Tensor, selected: Tensor) -> Tensor:
    """-lp of the selected tokens, zero for the others.

    Args:
        log_probs: In nats, of any shape.
        selected: Bool, in the same shape; see `select_mask`.
    """
    return torch.where(selected, nll_loss(log_probs), 0.0)


def select_mask(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """The tokens whose score is among the highest of their row: ceil(share * n) of its n.

    A row's threshold is its own quantile, whatever else is in the batch. Of tokens that tie at the
    threshold the first are kept, so that the number kept goes by a row's length alone.

    Args:
        scores: (B, T); higher is kept.
        mask: (B, T), true where scored.
        share: In (0, 1].

    Returns:
        (B, T) bool, within `mask`.
    """
    scores = at_least_fp32(scores.detach()).masked_fill(~mask, -math.inf)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    place = torch.arange(scores.size(1), device=scores.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    return mask & (rank < selected_counts(mask.sum(1, keepdim=True), share))


def selected_counts(lengths: Tensor, share: float) -> Tensor:
    """How many tokens `select_mask` keeps of rows of so many, in the shape of `lengths`."""
    return (lengths.double() * share - 1e-9).ceil().long()


class _Weighted(torch.autograd.Function):
    """A loss whose backward is -weight * upstream, with no slope of its value to take."""

    @staticmethod
    def forward(ctx, log_probs, loss, weight):
        ctx.save_for_backward(weight)
        ctx.dtype = log_probs.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return (-weight * grad).to(ctx.dtype), None, None


def _with_weight(log_probs: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    return _Weighted.apply(log_probs, loss, weight)
