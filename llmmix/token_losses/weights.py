"""The weight of a token under each loss: w = -dl/dlp, detached.

The equations stand at the top of llmmix/token_losses/losses.py.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmmix.precision import at_least_fp32

KEEPS = ("top", "bottom")


def token_weight(loss_type: str, log_probs: Tensor, **needs: Any) -> Tensor:
    """The weight w of a loss by its name: what it multiplies the gradient of -lp by. Detached.

    For asft and label_smoothing it is that of the term in lp alone, for gem in lp at its
    temperature. With m = 1 - p, focal's is m^gamma - gamma m^(gamma-1) p lp.

    Args:
        loss_type: Name of a loss.
        log_probs: In nats, of any shape.
        **needs: The other arguments of its function; for select, `selected`.

    Raises:
        ValueError: There is no such loss.
    """
    if loss_type not in _WEIGHTS:
        raise ValueError(f"`loss_type` must be one of {', '.join(_WEIGHTS)}, got {loss_type!r}.")
    with torch.no_grad():
        return _WEIGHTS[loss_type](log_probs.detach(), **needs)


def _one(log_probs: Tensor, **_: Any) -> Tensor:
    return torch.ones_like(at_least_fp32(log_probs))


def _dft_weight(log_probs: Tensor, **_: Any) -> Tensor:
    return clamped(log_probs).exp()


def _gce_weight(log_probs: Tensor, q: float | Tensor) -> Tensor:
    if not isinstance(q, Tensor) and q < -1:
        raise ValueError(f"`q` must be -1 or more, got {q}.")
    return (q * clamped(log_probs)).exp()


def _threshold_weight(log_probs: Tensor, p: float, keep: str = "top", q: float = 0.0) -> Tensor:
    return _gce_weight(log_probs, q) * on_kept_side(log_probs, p, keep)


def _deft_weight(log_probs: Tensor, log_sum_sq_probs: Tensor) -> Tensor:
    return _gce_weight(log_probs, sum_of_squares(log_sum_sq_probs))


def _eaft_weight(log_probs: Tensor, entropy: Tensor, alpha: float, top_k: int) -> Tensor:
    if top_k < 2:
        raise ValueError(f"`top_k` must be at least 2, got {top_k}.")
    return (at_least_fp32(entropy).clamp(min=0) / math.log(top_k)) ** alpha


def _psft_weight(
    log_probs: Tensor, old_log_probs: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    ratio = ratio_to(log_probs, old_log_probs)
    return torch.where(ratio <= 1 + clip_high, ratio, 0.0)


def _focal_weight(log_probs: Tensor, gamma: float) -> Tensor:
    if gamma < 0:
        raise ValueError(f"`gamma` must be 0 or more, got {gamma}.")
    lp = clamped(log_probs)
    miss = -torch.expm1(lp)
    # -lp / (1 - p) goes to 1 as p does
    ratio = torch.where(miss == 0, 1.0, -lp / torch.where(miss == 0, 1.0, miss))
    return miss**gamma * (1 + gamma * lp.exp() * ratio)


def _gem_weight(log_probs: Tensor, beta: float) -> Tensor:
    return beta * _one(log_probs)


def _select_weight(log_probs: Tensor, selected: Tensor) -> Tensor:
    return _one(log_probs) * selected


_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "nll": _one,
    "dft": _dft_weight,
    "gce": _gce_weight,
    "threshold": _threshold_weight,
    "deft": _deft_weight,
    "eaft": _eaft_weight,
    "asft": _dft_weight,
    "psft": _psft_weight,
    "focal": _focal_weight,
    "label_smoothing": _one,
    "gem": _gem_weight,
    "select": _select_weight,
}


def ratio_to(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """The ratio p / p_old, within exp(-20) and exp(20)."""
    return (clamped(log_probs) - clamped(old_log_probs)).clamp(-20, 20).exp()


def on_kept_side(log_probs: Tensor, p: float, keep: str) -> Tensor:
    """Whether a probability is on the side of `p` that threshold keeps; `p` is on both.

    Raises:
        ValueError: `keep` is none of `KEEPS`.
    """
    if keep not in KEEPS:
        raise ValueError(f"`keep` must be 'top' or 'bottom', got {keep!r}.")
    probs = clamped(log_probs.detach()).exp()
    return probs >= p if keep == "top" else probs <= p


def sum_of_squares(log_sum_sq_probs: Tensor) -> Tensor:
    """The q of deft: the sum of squared probabilities, detached."""
    return clamped(log_sum_sq_probs.detach()).exp()


def clamped(log_probs: Tensor) -> Tensor:
    """Log-probabilities in fp32 or better, detached; above 0, where rounding took them, 0."""
    return at_least_fp32(log_probs.detach()).clamp(max=0)
