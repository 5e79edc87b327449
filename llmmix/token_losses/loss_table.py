"""The table of token losses: a row each. To add a loss, add a function and a row.

The arithmetic is in llmmix/token_losses/losses.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmmix.token_losses.losses import (
    asft_loss,
    deft_loss,
    dft_loss,
    eaft_loss,
    focal_loss,
    gce_loss,
    gem_loss,
    label_smoothing_loss,
    nll_loss,
    psft_loss,
    select_loss,
    select_mask,
    threshold_loss,
)

# What a forward found, by name: fields of the head's output, what its objective and the reference
# gave, `mask`, and `vocabulary`, the number of tokens in it
Found = Mapping[str, Any]


def _log_probs(found: Found) -> dict[str, Any]:
    return {"log_probs": found["log_probs"]}


def _gce(found: Found, gce_q: float) -> dict[str, Any]:
    return _log_probs(found) | {"q": gce_q}


def _threshold(
    found: Found, threshold_p: float, threshold_keep: str, gce_q: float
) -> dict[str, Any]:
    return _log_probs(found) | {"p": threshold_p, "keep": threshold_keep, "q": gce_q}


def _deft(found: Found) -> dict[str, Any]:
    return _log_probs(found) | {"log_sum_sq_probs": found["log_sum_sq_probs"]}


def _eaft(found: Found, eaft_alpha: float, eaft_top_k: int) -> dict[str, Any]:
    entropy = found["top_k_entropy" if eaft_top_k else "entropy"]
    over = min(eaft_top_k or found["vocabulary"], found["vocabulary"])
    return _log_probs(found) | {"entropy": entropy, "alpha": eaft_alpha, "top_k": over}


def _asft(found: Found, asft_alpha: float) -> dict[str, Any]:
    kl = found["kl"] if asft_alpha else torch.zeros_like(found["log_probs"])
    return _log_probs(found) | {"kl": kl, "alpha": asft_alpha}


def _psft(found: Found, psft_clip: list[float], psft_snapshot_steps: int) -> dict[str, Any]:
    low, high = psft_clip
    old = {"old_log_probs": found["old_log_probs"]}
    return _log_probs(found) | old | {"clip_low": low, "clip_high": high}


def _focal(found: Found, focal_gamma: float) -> dict[str, Any]:
    return _log_probs(found) | {"gamma": focal_gamma}


def _label_smoothing(found: Found, label_smoothing_factor: float) -> dict[str, Any]:
    return _log_probs(found) | {
        "above_mean": found["above_mean"],
        "factor": label_smoothing_factor,
    }


def _gem(found: Found, gem_beta: float) -> dict[str, Any]:
    return {"log_probs": found["tempered_log_probs"], "beta": gem_beta}


def _select(found: Found, select_share: float) -> dict[str, Any]:
    scores = found["ref_log_probs"] - found["log_probs"]
    share = found.get("share", select_share)  # all, while the model still is its reference
    return _log_probs(found) | {"selected": select_mask(scores, found["mask"], share)}


@dataclass(frozen=True)
class TokenLoss:
    """What a loss needs.

    Attributes:
        loss: Its function, (log_probs, ...) -> a loss of each.
        paper: Title and arXiv id, for the model's card; None for one that is in every textbook.
        arguments: The function's arguments, from what a forward found and the settings.
        settings: Its settings and their defaults.
        outputs: More outputs of the head.
        found_by_head: What a head objective finds for it, besides the outputs.
        reference: Whether it needs another model.
        weighs: Whether its weights differ from 1, so that its gradient has another scale.
    """

    loss: Callable[..., Tensor]
    paper: tuple[str, str] | None = None
    arguments: Callable[..., dict[str, Any]] = _log_probs
    settings: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    found_by_head: str | None = None
    reference: bool = False
    weighs: bool = True


BEYOND = (
    "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the "
    "Model Capability Continuum"
)

LOSSES = {
    "nll": TokenLoss(nll_loss, weighs=False),
    "dft": TokenLoss(
        dft_loss,
        (
            "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward "
            "Rectification",
            "2508.05629",
        ),
    ),
    "gce": TokenLoss(
        gce_loss,
        (
            "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
            "1805.07836",
        ),
        _gce,
        {"gce_q": 0.7},
    ),
    "threshold": TokenLoss(
        threshold_loss,
        (BEYOND, "2510.00526"),
        _threshold,
        {"threshold_p": 0.1, "threshold_keep": "top", "gce_q": 0.0},
    ),
    "deft": TokenLoss(
        deft_loss,
        (
            "Gradients Must Earn Their Influence: Unifying SFT with Generalized Entropic "
            "Objectives",
            "2602.11424",
        ),
        _deft,
        outputs=("log_sum_sq_probs",),
    ),
    "eaft": TokenLoss(
        eaft_loss,
        (
            "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
            "2601.02151",
        ),
        _eaft,
        {"eaft_alpha": 1.0, "eaft_top_k": 20},
    ),
    "asft": TokenLoss(
        asft_loss,
        ("Anchored Supervised Fine-Tuning", "2509.23753"),
        _asft,
        {"asft_alpha": 0.05},
        reference=True,
    ),
    "psft": TokenLoss(
        psft_loss,
        ("Proximal Supervised Fine-Tuning", "2508.17784"),
        _psft,
        {"psft_clip": (0.2, 0.28), "psft_snapshot_steps": 8},
        reference=True,
        weighs=False,
    ),
    "focal": TokenLoss(
        focal_loss,
        ("Focal Loss for Dense Object Detection", "1708.02002"),
        _focal,
        {"focal_gamma": 2.0},
    ),
    "label_smoothing": TokenLoss(
        label_smoothing_loss,
        arguments=_label_smoothing,
        settings={"label_smoothing_factor": 0.1},
        found_by_head="above_mean",
        weighs=False,
    ),
    "gem": TokenLoss(
        gem_loss,
        (
            "Preserving Diversity in Supervised Fine-Tuning of Large Language Models",
            "2408.16673",
        ),
        _gem,
        {"gem_beta": 0.7},
        found_by_head="tempered_log_probs",
        weighs=False,
    ),
    "select": TokenLoss(
        select_loss,
        ("Rho-1: Not All Tokens Are What You Need", "2404.07965"),
        _select,
        {"select_share": 0.6},
        reference=True,
        weighs=False,
    ),
}
