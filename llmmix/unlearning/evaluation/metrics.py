"""What forgetting is judged by, from per-item numbers: likelihood, memorisation, membership.

Nothing here runs a model. Likelihoods arrive as mean negative log-likelihoods in nats per token
(NLL), token by token as natural log-probabilities. An item on which a measure is not defined
gives NaN or None, and whoever averages says how many such items there were. The metrics are
those of TOFU (arXiv 2401.06121), MUSE (arXiv 2407.06460) and OpenUnlearning (arXiv 2506.12618).
"""

import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp

logger = logging.getLogger(__name__)

TRUTH_RATIOS = ("closer_to_1_better", "true_better", "prob_mean")
WRONG_MEANS = ("geometric", "arithmetic")
COLLAPSED_BELOW = 0.01  # a component of the model utility that says nothing is left
LEAST_P = 1e-300  # which log10_p stops at: the test of some 500 items a side can underflow
MAX_LOG_RATIO = 700.0  # exp of it and of its negative are normal floats
TAIL = 0.025  # of a 95% interval


@dataclass(frozen=True, eq=False)
class TruthRatio:
    """Truth ratios of n items: `ratios` and `scores` are (n,), NaN at the `dropped` items.

    `value` is the mean score over the other items, None if there are none.
    """

    definition: str
    ratios: np.ndarray
    scores: np.ndarray
    value: float | None
    dropped: int
    wrong_mean: str = "geometric"


@dataclass(frozen=True)
class ForgetQuality:
    """A Kolmogorov-Smirnov test; without a result its numbers are None and `reason` says why."""

    p_value: float | None
    log10_p: float | None
    statistic: float | None
    n: int
    n_retain: int
    reason: str | None = None


@dataclass(frozen=True)
class ModelUtility:
    """A harmonic mean, its `components`, the `least` one, and those below 0.01: `collapsed`."""

    value: float
    collapsed: tuple[str, ...]
    least: str
    components: dict[str, float]


@dataclass(frozen=True)
class MembershipAUC:
    """An AUC and its 95% interval; `reason` says why either is None."""

    value: float | None
    interval: tuple[float, float] | None
    n_forget: int
    n_holdout: int
    reason: str | None = None


def truth_ratio(
    correct_nlls, wrong_nlls, definition: str = "closer_to_1_better", *, wrong_mean="geometric"
) -> TruthRatio:
    """How probable wrong answers are beside the right one, per item and on average.

        s = P_wrong / P_correct,    ln s = NLL_correct - mean NLL_wrong
        closer_to_1_better: min(s, 1/s)    true_better: max(0, 1 - s)    prob_mean: 1 / (1 + s)

    The first is for forget sets, where the aim is the value of a model that never saw them, and
    the others, larger for a better model, for what should be kept. ln s is held within +-700.

    Args:
        correct_nlls: (n,) mean NLL of the right answer, or of its paraphrase.
        wrong_nlls: n sequences, of any lengths, of the mean NLLs of wrong answers.
        definition: One of `TRUTH_RATIOS`.
        wrong_mean: Of the wrong answers' probabilities. TOFU's own code takes the arithmetic mean
            on the sets that should be kept.

    Raises:
        ValueError: Unknown definition or mean, other numbers of items, or negative NLLs.
    """
    _one_of("definition", definition, TRUTH_RATIOS)
    _one_of("wrong_mean", wrong_mean, WRONG_MEANS)
    correct = _nlls("correct_nlls", correct_nlls)
    if len(wrong_nlls) != len(correct):
        raise ValueError(
            f"`wrong_nlls` must hold one sequence for each of the {len(correct)} items of "
            f"`correct_nlls`, got {len(wrong_nlls)}; give an empty one where there is none."
        )
    rows = (_nlls(f"wrong_nlls[{i}]", w) for i, w in enumerate(wrong_nlls))
    wrong = np.array([_mean_nll(row, wrong_mean) for row in rows])
    with np.errstate(invalid="ignore"):  # inf - inf: neither answer is possible
        log_ratios = np.clip(correct - wrong, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratios = np.exp(log_ratios)
    if definition == "closer_to_1_better":
        scores = np.exp(-np.abs(log_ratios))
    elif definition == "true_better":
        scores = np.maximum(0.0, -np.expm1(log_ratios))
    else:
        scores = 1 / (1 + ratios)
    value, dropped = mean_of(scores)
    return TruthRatio(definition, ratios, scores, value, dropped, wrong_mean)


def forget_quality(unlearned, retrained) -> ForgetQuality:
    """Can the truth ratios be told from those of a model trained without the forget set?

        p of the two-sided two-sample Kolmogorov-Smirnov test of the ratios s; 1 is best

    Each side is a `TruthRatio` or the ratios s themselves, (n,); with fewer than 2, or one that is
    not finite, there is no result. log10_p is held at -300 and above, where p underflows.

    Raises:
        ValueError: Truth ratios of two definitions, which are not comparable.
    """
    if isinstance(unlearned, TruthRatio) and isinstance(retrained, TruthRatio):
        kinds = [(side.definition, side.wrong_mean) for side in (unlearned, retrained)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "`unlearned` and `retrained` must be truth ratios of one definition, got "
                f"{' with '.join(kinds[0])} and {' with '.join(kinds[1])}; compute both alike."
            )
    sides = {}
    for name, side in (("unlearned", unlearned), ("retrained", retrained)):
        sides[name] = _vector(name, side.ratios if isinstance(side, TruthRatio) else side)
    n, m = map(len, sides.values())
    if reason := _why_not(sides, least=2):
        return ForgetQuality(None, None, None, n, m, reason)
    test = ks_2samp(*sides.values())
    p, statistic = float(test.pvalue), float(test.statistic)
    return ForgetQuality(p, math.log10(max(p, LEAST_P)), statistic, n, m)


def model_utility(components) -> ModelUtility:
    """What a model is still good for: the harmonic mean of n measures that are 0 at worst.

        n / (1/x_1 + ... + 1/x_n),    0 if one of them is

    Raises:
        ValueError: No `components`, a mapping or a sequence, or one that is negative or missing.
    """
    if not isinstance(components, Mapping):
        components = {str(i): value for i, value in enumerate(components)}
    if not components:
        raise ValueError("`components` must hold at least one value, got none.")
    for name, value in components.items():
        if value is None or not 0 <= value < math.inf:
            raise ValueError(
                f"Component `{name}` must be a number of at least 0, got {value}; measure it "
                "again, or leave it out and say so."
            )
    components = {str(name): float(value) for name, value in components.items()}
    least = min(components, key=components.get)
    collapsed = tuple(name for name, value in components.items() if value < COLLAPSED_BELOW)
    zero = components[least] == 0
    value = 0.0 if zero else len(components) / sum(1 / x for x in components.values())
    return ModelUtility(value, collapsed, least, components)


def option_probability(correct_nll: float, wrong_nlls) -> float:
    """Probability of the right answer among the options of one item.

        P_correct / (P_correct + sum P_wrong),    P = exp(-NLL)

    NaN without `wrong_nlls`, (k,), and where an NLL is NaN.

    Raises:
        ValueError: Negative NLLs.
    """
    wrong = _nlls("wrong_nlls", wrong_nlls)
    correct = _nlls("correct_nll", [correct_nll])
    if not len(wrong):
        return math.nan
    log_probs = -np.concatenate([correct, wrong])
    with np.errstate(invalid="ignore"):  # -inf - -inf: no option is possible
        probs = np.exp(log_probs - log_probs.max())
    return float(probs[0] / probs.sum())


def extraction_strength(labels, predictions, *, eos_token_id=None) -> float | None:
    """Share of one answer that greedy decoding completes, given what comes before.

        1 - k/n,    k the least with prediction = label at all positions from k on (0 if none is)

    `labels` are the answer's token ids, (n,), `predictions` the most probable ones under teacher
    forcing. The last token is not counted if it is `eos_token_id`, or one of them. None for an
    answer of no tokens.

    Raises:
        ValueError: Shapes that differ, or labels that are masked.
    """
    right = _matches(labels, predictions, eos_token_id)
    if not len(right):
        return None
    wrong = np.flatnonzero(~right)
    return 1 - (int(wrong[-1]) + 1) / len(right) if len(wrong) else 1.0


def exact_memorization(labels, predictions, *, eos_token_id=None) -> float | None:
    """Share of one answer's tokens that are the most probable ones under teacher forcing.

    Arguments, result and errors are those of `extraction_strength`.
    """
    right = _matches(labels, predictions, eos_token_id)
    return float(right.mean()) if len(right) else None


def mean_of(values) -> tuple[float | None, int]:
    """Mean of the values that are finite numbers, and how many None, NaN or inf were left out."""
    values = _vector("values", values)
    kept = values[np.isfinite(values)]
    return (float(kept.mean()) if len(kept) else None), len(values) - len(kept)


def min_k(token_logps, k: float = 0.4) -> float | None:
    """Minus the mean log-probability of the least probable tokens, the share k of them.

    Higher for texts less like the training data; None for no tokens, NaN if one is NaN. Of n tokens
    max(1, floor(k n)) count (arXiv 2310.16789).

    Raises:
        ValueError: k outside (0, 1], or log-probabilities above 0.
    """
    return _least_share(-_nlls("token_logps", token_logps, sign=-1), k)


def min_k_plus_plus(token_logps, means, variances, k: float = 0.4) -> float | None:
    """`min_k` of the log-probabilities standardised over the vocabulary (arXiv 2404.02936).

        z = (ln p - mean) / sqrt(max(variance, 1e-6))

    `means` and `variances`, (n,), are those of `log_prob_moments`; the rest is as in `min_k`.

    Raises:
        ValueError: Also numbers of tokens that differ.
    """
    logps = -_nlls("token_logps", token_logps, sign=-1)
    means, variances = _vector("means", means), _vector("variances", variances)
    if not len(logps) == len(means) == len(variances):
        raise ValueError(
            "`token_logps`, `means` and `variances` must hold the same tokens, got "
            f"{len(logps)}, {len(means)} and {len(variances)}."
        )
    return _least_share((logps - means) / np.sqrt(np.maximum(variances, 1e-6)), k)


def log_prob_moments(logits) -> tuple[np.ndarray, np.ndarray]:
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
    forget_scores, holdout_scores, *, seed: int = 0, resamples: int = 2000
) -> MembershipAUC:
    """How well a score tells forgotten texts from texts that were never seen.

        AUC = P(holdout > forget) + P(holdout = forget) / 2

    1 is memorised, 1/2 chance, 0 suppressed. The 95% interval is the bootstrap's percentiles, both
    classes drawn with replacement. At an AUC of 1, or 0, the bootstrap says nothing: the bound is
    then the AUC at which min(n_forget, n_holdout) pairs are all in order with a chance of 0.025.

    Scores, (n_forget,) and (n_holdout,), are higher for what is less like a member. There is no
    value for an empty class or where one is not finite, and no interval for a class of one.

    Raises:
        ValueError: Fewer than 1 resample.
    """
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, got {resamples}.")
    given = {"forget_scores": forget_scores, "holdout_scores": holdout_scores}
    sides = {name: _vector(name, scores) for name, scores in given.items()}
    n, m = map(len, sides.values())
    if reason := _why_not(sides, least=1):
        return MembershipAUC(None, None, n, m, reason)
    levels, rank = np.unique(np.concatenate(list(sides.values())), return_inverse=True)
    at_forget = np.bincount(rank[:n], minlength=len(levels))
    at_holdout = np.bincount(rank[n:], minlength=len(levels))
    value = float(_auc(at_forget, at_holdout))
    if min(n, m) < 2:
        return MembershipAUC(value, None, n, m, "a class of one item has no bootstrap interval")
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, 500):  # bounds the memory of many items
        size = min(500, resamples - start)
        counts = (rng.multinomial(c.sum(), c / c.sum(), size) for c in (at_forget, at_holdout))
        drawn.append(_auc(*counts))
    low, high = map(float, np.quantile(np.concatenate(drawn), [TAIL, 1 - TAIL]))
    bound = TAIL ** (1 / min(n, m))
    interval = (bound if value == 1 else low, 1 - bound if value == 0 else high)
    return MembershipAUC(value, interval, n, m)


def privacy_leakage(auc: float, reference_auc: float = 0.5) -> float:
    """MUSE's privacy leakage: 0 is best, below it too much is left, above it too much was done.

        100 ((1 - A) - (1 - A_ref)) / (1 - A_ref)

    A is of the unlearned model, A_ref of one trained without the forget set. NaN, with a logged
    warning, if 1 - A_ref < 1e-3: such a reference has seen the forget set.

    Raises:
        ValueError: An AUC outside [0, 1].
    """
    return _percent(auc, reference_auc, from_one=True)


def relative_auc_difference(auc: float, reference_auc: float = 0.5) -> float:
    """Membership AUC against the reference's, in percent: 100 (A - A_ref) / A_ref.

    Arguments and errors are those of `privacy_leakage`; NaN, logged, if A_ref < 1e-3.
    """
    return _percent(auc, reference_auc, from_one=False)


def _percent(auc: float, reference_auc: float, *, from_one: bool) -> float:
    for name, value in (("auc", auc), ("reference_auc", reference_auc)):
        if value is None or not 0 <= value <= 1:
            raise ValueError(
                f"`{name}` must lie in [0, 1], got {value}; without that AUC there is nothing to "
                "compare."
            )
    change, scale = auc - reference_auc, reference_auc
    if from_one:
        change, scale = reference_auc - auc, 1 - reference_auc
    if scale < 1e-3:
        logger.warning("A reference AUC of %g leaves nothing to divide by: NaN.", reference_auc)
        return math.nan
    return float(100 * change / scale)


def _why_not(sides: dict[str, np.ndarray], least: int) -> str | None:
    for name, values in sides.items():
        if len(values) < least:
            return f"`{name}` has {len(values)} values, and at least {least} are needed"
        if bad := int((~np.isfinite(values)).sum()):
            return f"{bad} of the {len(values)} values of `{name}` are not finite"
    return None


def _auc(forget: np.ndarray, holdout: np.ndarray) -> np.ndarray:
    # From counts (..., levels) of the distinct scores, ascending
    below = np.cumsum(forget, -1) - forget / 2
    return (below * holdout).sum(-1) / (forget.sum(-1) * holdout.sum(-1))


def _mean_nll(nlls: np.ndarray, mean: str) -> float:
    if not len(nlls):
        return math.nan
    if mean == "geometric":
        return float(nlls.mean())
    return float(math.log(len(nlls)) - np.logaddexp.reduce(-nlls))


def _least_share(scores: np.ndarray, k: float) -> float | None:
    if not 0 < k <= 1:
        raise ValueError(f"`k` must lie in (0, 1], got {k}.")
    if not len(scores):
        return None
    if np.isnan(scores).any():
        return math.nan
    kept = max(1, math.floor(k * len(scores) + 1e-9))  # 0.29 * 100 is 28.999...
    return float(-np.sort(scores)[:kept].mean())


def _matches(labels, predictions, eos_token_id) -> np.ndarray:
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            "`labels` and `predictions` must be two sequences of one length, got shapes "
            f"{labels.shape} and {predictions.shape}; give one answer at a time."
        )
    if (labels < 0).any():
        raise ValueError(
            f"`labels` must hold the answer's ids alone, got {labels.min()}; select the scored "
            "positions of both first."
        )
    right = labels == predictions
    ends = len(labels) and eos_token_id is not None and np.isin(labels[-1], eos_token_id)
    return right[:-1] if ends else right


def _vector(name: str, values) -> np.ndarray:
    try:
        vector = np.atleast_1d(np.asarray(values, dtype=float))  # None is NaN
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must hold one number an item: {error}.") from error
    if vector.ndim != 1:
        raise ValueError(f"`{name}` must hold one number an item, got shape {vector.shape}.")
    return vector


def _nlls(name: str, values, sign: int = 1) -> np.ndarray:
    nlls = sign * _vector(name, values)
    if (nlls < -1e-3).any():  # more than the rounding of a certain token
        kind = "log-probabilities" if sign < 0 else "negative log-likelihoods"
        raise ValueError(f"`{name}` must hold {kind}, got {sign * np.nanmin(nlls)}; negate them.")
    return nlls


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
