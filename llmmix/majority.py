"""Losses of N draws: at least `votes` of N completions are the target (arXiv 2604.24957).

    B = P(Bin(N, p) >= k)
    majority_loss = -log B
    gradient      = w * gradient of (-log p),   w = k C(N,k) p^k (1-p)^(N-k) / B, in [0, k]

With k = 1 this is DCO: B = 1 - (1-p)^N and w = F. A plurality of the N draws wins a vote with fewer
than half of them; a fixed k stands in for it. As p falls, w rises to k: an unlikely row pulls up to
k times as much as under DCO.

    symbol   name
    log p    logps            summed over the completion's tokens
    N        n_samples        how many completions are drawn
    k        votes            how many of them must be the target
    w        majority_weight  detached

Recipe: recipes/dco.py, with `--votes`. Evaluation: eval/pass_at_n.py, with `--maj true`.
"""

import math
import operator

import torch
from torch import Tensor


def majority_loss(logps: Tensor, n_samples: int, votes: int) -> Tensor:
    """-log P(Bin(N, p) >= k), stable for every log p, with the gradient -w.

    Args:
        logps: (B,) summed completion log-probabilities, in nats; values above 0 count as 0.
        n_samples: N, at least 1.
        votes: k, from 1 (DCO) to N (N times cross-entropy).

    Returns:
        (B,) in fp64 for fp64 input, else fp32.

    Raises:
        ValueError: `n_samples` is below 1, or `votes` is not between 1 and `n_samples`.
    """
    return _MajorityLoss.apply(logps, *check_votes(n_samples, votes))


def majority_weight(logps: Tensor, n_samples: int, votes: int) -> Tensor:
    """The weight k C(N,k) p^k (1-p)^(N-k) / P(Bin(N, p) >= k), in [0, k] and detached.

    Args:
        logps: (B,) summed completion log-probabilities, in nats; values above 0 count as 0.
        n_samples: N, at least 1.
        votes: k, from 1 (DCO's F) to N (where w is N).

    Returns:
        (B,) in fp64 for fp64 input, else fp32.

    Raises:
        ValueError: `n_samples` is below 1, or `votes` is not between 1 and `n_samples`.
    """
    return _loss_and_weight(logps.detach(), *check_votes(n_samples, votes))[1]


def check_votes(n_samples: int, votes: int) -> tuple[int, int]:
    """N and k.

    Raises:
        ValueError: `n_samples` is below 1, or `votes` is not between 1 and `n_samples`.
    """
    n, k = operator.index(n_samples), operator.index(votes)
    if n < 1:
        raise ValueError(f"`n_samples` must be at least 1, got {n}; 1 is plain cross-entropy.")
    if not 1 <= k <= n:
        raise ValueError(
            f"`votes` must lie between 1 and `n_samples`, got {k} of {n}: it is how many of the "
            "drawn completions must be the target, and 1 is DCO."
        )
    return n, k


class _MajorityLoss(torch.autograd.Function):
    """The backward is -w * upstream: autograd through the forward gives NaN as p -> 1."""

    @staticmethod
    def forward(ctx, logps, n, k):
        loss, weight = _loss_and_weight(logps, n, k)
        ctx.save_for_backward(weight)
        ctx.dtype = logps.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return (-weight * grad).to(ctx.dtype), None, None


def _loss_and_weight(logps: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    lp = logps.to(torch.float64 if logps.dtype == torch.float64 else torch.float32).clamp(max=0)
    if k == n:  # all of them: B = p^N
        return -n * lp, torch.full_like(lp, n)
    return _at_least_one(lp, n) if k == 1 else _at_least(k, lp, n)


def _at_least_one(lp: Tensor, n: int) -> tuple[Tensor, Tensor]:
    # Below the cut, 1 - (1-p)^N = N p to the last digit
    cut = -36.0 if lp.dtype == torch.float64 else -25.0
    tiny = lp + math.log(n) < cut
    safe = torch.where(tiny, -1.0, lp)
    log_miss = _log1mexp(safe)  # log(1 - p)
    log_cover = _log1mexp(n * log_miss)  # log(1 - (1-p)^N)
    weight = torch.exp(math.log(n) + (n - 1) * log_miss + safe - log_cover)
    return (
        torch.where(tiny, -lp - math.log(n), -log_cover),
        torch.where(tiny, 1.0, weight),
    )


def _at_least(k: int, lp: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For 1 < k < N, from the tail whose terms fall: k or more where p < k/(N+1), else fewer."""
    log_miss = _log1mexp(lp)  # log(1 - p)
    at_k = _log_choose(n, k) + k * lp + (n - k) * log_miss  # log P(Bin = k)
    below = _log_choose(n, k - 1) + (k - 1) * lp + (n - k + 1) * log_miss
    j = torch.arange(n, dtype=lp.dtype, device=lp.device)
    # Terms of a tail, each over the one before; 1 + the sum of their products is the tail over
    # its first term
    up = _tail((n - j[k:]) / (j[k:] + 1) * torch.exp(lp - log_miss)[..., None])
    down = _tail(
        (k - 1 - j[: k - 1]) / (n - k + 2 + j[: k - 1]) * torch.exp(log_miss - lp)[..., None]
    )
    log_most = _log1mexp(below + down.log())
    likely = lp >= math.log(k / (n + 1))
    return (
        torch.where(likely, -log_most, -(at_k + up.log())),
        torch.where(likely, torch.exp(math.log(k) + at_k - log_most), k / up),
    )


def _tail(ratios: Tensor) -> Tensor:
    """1 + r_1 + r_1 r_2 + ...: (..., terms) -> (...)."""
    return 1 + ratios.cumprod(-1).sum(-1)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, by whichever form keeps the digits."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
