"""Membership attacks: scores that tell whether a text was trained on, and their AUC.

A score is higher for what is less like the training data. Token log-probabilities are natural.
The attacks are Min-K (arXiv 2310.16789), Min-K++ (arXiv 2404.02936) and zlib; the privacy leakage
is MUSE's (arXiv 2407.06460). Nothing here runs a model.
"""

import logging
import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llmmix.unlearning.evaluation.vectors import Numbers, as_logps, as_vector, why_not_comparable

logger = logging.getLogger(__name__)

TAIL = 0.025  # of a 95% interval


@dataclass(frozen=True)
class MembershipAUC:
    """An AUC and its 95% interval; `reason` says why either is None."""

    value: float | None
    interval: tuple[float, float] | None
    n_forget: int
    n_holdout: int
    reason: str | None = None


def min_k(token_logps: Numbers, k: float = 0.4) -> float | None:
    """Minus the mean log-probability of the least probable tokens, the share k of them.

    Higher for texts less like the training data; None for no tokens, NaN if one is NaN. Of n tokens
    max(1, floor(k n)) count (arXiv 2310.16789).

    Raises:
        ValueError: `k` lies outside (0, 1], or a log-probability is above 0.
    """
    return _least_share(as_logps("token_logps", token_logps), k)


def min_k_plus_plus(
    token_logps: Numbers, means: Numbers, variances: Numbers, k: float = 0.4
) -> float | None:
    """`min_k` of the log-probabilities standardized over the vocabulary (arXiv 2404.02936).

        z = (ln p - mean) / sqrt(max(variance, 1e-6))

    `means` and `variances`, (n,), are those of `log_prob_moments`; the rest is as in `min_k`.

    Raises:
        ValueError: `k` lies outside (0, 1], a log-probability is above 0, or the arguments hold
            different numbers of tokens.
    """
    logps = as_logps("token_logps", token_logps)
    mean, variance = as_vector("means", means), as_vector("variances", variances)
    if not len(logps) == len(mean) == len(variance):
        raise ValueError(
            "`token_logps`, `means` and `variances` must hold the same tokens, got "
            f"{len(logps)}, {len(mean)} and {len(variance)}."
        )
    return _least_share((logps - mean) / np.sqrt(np.maximum(variance, 1e-6)), k)


def log_prob_moments(logits: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of ln p over the vocabulary, under p itself; p = 0 contributes 0.

        mean = sum_v p_v ln p_v,    variance = sum_v p_v (ln p_v - mean)^2

    Logits (..., V), -inf for entries that cannot occur, give two arrays (...): NaN where none can.
    """
    logits = np.asarray(logits, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = logits - logits.max(-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    probs = np.exp(log_probs)
    finite = np.where(probs == 0, 0.0, log_probs)
    mean = (probs * finite).sum(-1)
    return mean, (probs * (finite - mean[..., None]) ** 2).sum(-1)


def zlib_score(mean_nll: float, text: str) -> float:
    """Mean NLL per byte that zlib, at its default level, packs the UTF-8 text into."""
    return float(mean_nll) / len(zlib.compress(text.encode()))


def membership_auc(
    forget_scores: Numbers, holdout_scores: Numbers, *, seed: int = 0, resamples: int = 2000
) -> MembershipAUC:
    """How well a score tells forgotten texts from texts that were never seen.

        AUC = P(holdout > forget) + P(holdout = forget) / 2

    1 stands for memorized, 1/2 for chance, 0 for suppressed. The 95% interval is the bootstrap's
    percentiles, both classes drawn with replacement. At an AUC of 1, or 0, the bootstrap says
    nothing: the bound is then the AUC at which min(n_forget, n_holdout) pairs are all in order with
    a chance of 0.025.

    Scores, (n_forget,) and (n_holdout,), are higher for what is less like a member. There is no
    value for an empty class or where one is not finite, and no interval for a class of one.

    Raises:
        ValueError: `resamples` is below 1.
    """
    from sklearn.metrics import roc_auc_score  # a second, which --help need not wait for

    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, got {resamples}.")
    given = {"forget_scores": forget_scores, "holdout_scores": holdout_scores}
    sides = {name: as_vector(name, scores) for name, scores in given.items()}
    n, m = map(len, sides.values())
    if reason := why_not_comparable(sides, least=1):
        return MembershipAUC(None, None, n, m, reason)
    scores = np.concatenate(list(sides.values()))
    value = float(roc_auc_score(np.arange(n + m) >= n, scores))
    if min(n, m) < 2:
        return MembershipAUC(value, None, n, m, "a class of one item has no bootstrap interval")
    low, high = _percentiles(scores, n, seed, resamples)
    bound = TAIL ** (1 / min(n, m))
    interval = (bound if value == 1 else low, 1 - bound if value == 0 else high)
    return MembershipAUC(value, interval, n, m)


def privacy_leakage(auc: float | None, reference_auc: float | None = 0.5) -> float:
    """MUSE's privacy leakage: 0 is best, below it too much is left, above it too much was done.

        100 ((1 - A) - (1 - A_ref)) / (1 - A_ref)

    A is of the unlearned model, A_ref of one trained without the forget set. NaN, with a logged
    warning, if 1 - A_ref < 1e-3: such a reference has seen the forget set.

    Raises:
        ValueError: An AUC is None or lies outside [0, 1].
    """
    auc, reference_auc = _share("auc", auc), _share("reference_auc", reference_auc)
    return _percent(reference_auc - auc, 1 - reference_auc, reference_auc)


def relative_auc_difference(auc: float | None, reference_auc: float | None = 0.5) -> float:
    """Membership AUC against the reference's, in percent: 100 (A - A_ref) / A_ref.

    Arguments are those of `privacy_leakage`; NaN, with a logged warning, if A_ref < 1e-3.

    Raises:
        ValueError: An AUC is None or lies outside [0, 1].
    """
    auc, reference_auc = _share("auc", auc), _share("reference_auc", reference_auc)
    return _percent(auc - reference_auc, reference_auc, reference_auc)


def _least_share(scores: np.ndarray, k: float) -> float | None:
    if not 0 < k <= 1:
        raise ValueError(f"`k` must lie in (0, 1], got {k}.")
    if not len(scores):
        return None
    if np.isnan(scores).any():
        return math.nan
    kept = max(1, math.floor(k * len(scores) + 1e-9))  # 0.29 * 100 is 28.999...
    return float(-np.sort(scores)[:kept].mean())


def _percentiles(scores: np.ndarray, n: int, seed: int, resamples: int) -> tuple[float, float]:
    """Bounds of the AUC, by drawing anew from each class; the first `n` scores are one class.

    Draws are counts of the distinct scores, hundreds of AUCs at once: `roc_auc_score` takes one.
    """
    levels, rank = np.unique(scores, return_inverse=True)
    sides = [np.bincount(side, minlength=len(levels)) for side in (rank[:n], rank[n:])]
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, 500):  # bounds the memory of many items
        size = min(500, resamples - start)
        forget, holdout = (rng.multinomial(c.sum(), c / c.sum(), size) for c in sides)
        below = np.cumsum(forget, -1) - forget / 2
        drawn.append((below * holdout).sum(-1) / (forget.sum(-1) * holdout.sum(-1)))
    low, high = np.quantile(np.concatenate(drawn), [TAIL, 1 - TAIL])
    return float(low), float(high)


def _share(name: str, value: float | None) -> float:
    if value is None or not 0 <= value <= 1:
        raise ValueError(
            f"`{name}` must lie in [0, 1], got {value}; without that AUC there is nothing to "
            "compare."
        )
    return value


def _percent(change: float, scale: float, reference_auc: float) -> float:
    if scale < 1e-3:
        logger.warning("A reference AUC of %g leaves nothing to divide by: NaN.", reference_auc)
        return math.nan
    return float(100 * change / scale)
