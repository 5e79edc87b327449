"""Truth ratios: how a model tells right answers from wrong ones, beside one never taught them.

Likelihoods arrive as mean negative log-likelihoods in nats a token (NLL). The metrics are those of
TOFU (arXiv 2401.06121) and OpenUnlearning (arXiv 2506.12618). Nothing here runs a model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp

from llmmix.unlearning.evaluation.vectors import (
    Numbers,
    as_nlls,
    as_vector,
    mean_of,
    why_not_comparable,
)

TRUTH_RATIOS = ("closer_to_1_better", "true_better", "prob_mean")
WRONG_MEANS = ("geometric", "arithmetic")
LEAST_P = 1e-300  # lower limit of log10_p: p of some 500 items a side can underflow
MAX_LOG_RATIO = 700.0  # exp of it and of its negative are normal floats


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


def truth_ratio(
    correct_nlls: Numbers,
    wrong_nlls: np.ndarray | Sequence[Numbers | None],
    definition: str = "closer_to_1_better",
    *,
    wrong_mean: str = "geometric",
) -> TruthRatio:
    """How probable wrong answers are beside the right one, per item and on average.

        s = P_wrong / P_correct,    ln s = NLL_correct - mean NLL_wrong
        closer_to_1_better: min(s, 1/s)    true_better: max(0, 1 - s)    prob_mean: 1 / (1 + s)

    The first is for forget sets, where the aim is the value of a model that never saw them, and
    the others, larger for a better model, for what should be kept. ln s is clipped to +-700.

    Args:
        correct_nlls: (n,) mean NLL of the right answer, or of its paraphrase.
        wrong_nlls: n sequences, of any lengths, of the mean NLLs of wrong answers.
        definition: One of `TRUTH_RATIOS`.
        wrong_mean: How the wrong answers' probabilities are averaged, one of `WRONG_MEANS`. TOFU's
            own code takes the arithmetic mean on the sets that should be kept.

    Raises:
        ValueError: `definition` or `wrong_mean` is unknown, the two arguments hold different
            numbers of items, or an NLL is negative.
    """
    _check_choice("definition", definition, TRUTH_RATIOS)
    _check_choice("wrong_mean", wrong_mean, WRONG_MEANS)
    correct = as_nlls("correct_nlls", correct_nlls)
    if len(wrong_nlls) != len(correct):
        raise ValueError(
            f"`wrong_nlls` must hold one sequence for each of the {len(correct)} items of "
            f"`correct_nlls`, got {len(wrong_nlls)}; give an empty one where there is none."
        )
    rows = (as_nlls(f"wrong_nlls[{i}]", w) for i, w in enumerate(wrong_nlls))
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


def forget_quality(
    unlearned: TruthRatio | Numbers, retrained: TruthRatio | Numbers
) -> ForgetQuality:
    """Whether truth ratios differ from those of a model trained without the forget set.

        p of the two-sided two-sample Kolmogorov-Smirnov test of the ratios s; 1 is best

    Each side is a `TruthRatio` or the ratios s themselves, (n,); with fewer than 2, or one that is
    not finite, there is no result. log10_p stops at -300, below which p underflows.

    Raises:
        ValueError: The truth ratios follow two definitions, which are not comparable.
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
        sides[name] = as_vector(name, side.ratios if isinstance(side, TruthRatio) else side)
    n, m = map(len, sides.values())
    if reason := why_not_comparable(sides, least=2):
        return ForgetQuality(None, None, None, n, m, reason)
    test = ks_2samp(*sides.values())
    p, statistic = float(test.pvalue), float(test.statistic)
    return ForgetQuality(p, math.log10(max(p, LEAST_P)), statistic, n, m)


def option_probability(correct_nll: float | None, wrong_nlls: Numbers) -> float:
    """Probability of the right answer among the options of one item.

        P_correct / (P_correct + sum P_wrong),    P = exp(-NLL)

    NaN without `wrong_nlls`, (k,), and where an NLL is NaN.

    Raises:
        ValueError: An NLL is negative.
    """
    wrong = as_nlls("wrong_nlls", wrong_nlls)
    correct = as_nlls("correct_nll", [correct_nll])
    if not len(wrong):
        return math.nan
    log_probs = -np.concatenate([correct, wrong])
    with np.errstate(invalid="ignore"):  # -inf - -inf: no option is possible
        probs = np.exp(log_probs - log_probs.max())
    return float(probs[0] / probs.sum())


def _mean_nll(nlls: np.ndarray, mean: str) -> float:
    if not len(nlls):
        return math.nan
    if mean == "geometric":
        return float(nlls.mean())
    return float(math.log(len(nlls)) - np.logaddexp.reduce(-nlls))


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
