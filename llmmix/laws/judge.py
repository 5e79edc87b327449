"""How well a law predicts runs that it was not fitted to, compared with other laws and the mean.

    judged = compare({"effective": EffectiveDataLaw(), "linear": LinearLaw()}, mixtures, losses)
    best_of(judged), error_difference(judged["effective"], judged["linear"])

Every run is predicted by a law fitted to other mixtures. Runs of the same mixture stay together,
since another seed of it would give the answer away. The scores are in llmmix/laws/accuracy.py, the
folds in llmmix/laws/held_out.py. All runs are of one scale: the best law of small runs need not be
the best of large runs (llmmix/laws/transfer.py).
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from llmmix.laws.accuracy import (
    RESAMPLES,
    Interval,
    bootstrap,
    coverage_of,
    r2,
    regret_of,
    spearman,
    weighted,
)
from llmmix.laws.held_out import Fold, JudgedRuns, folds_of, judged_runs, predict_held_out
from llmmix.laws.law import Law
from llmmix.laws.mean import MeanLaw
from llmmix.laws.objective import Objective

BASELINE = "mean"  # the name of `MeanLaw` in a comparison


@dataclass(frozen=True, eq=False)
class Judgement:
    """A law judged on n runs that it was not fitted to, with m targets; NaN is unknown.

    Attributes:
        targets: m names.
        observed: (n, m) losses.
        predictions: (n, m), each by the law fitted without the run's mixture.
        stds: (n, m) predicted standard deviation of a new run's loss around the prediction.
        standardized: (n, m) errors divided by the target's standard deviation over all runs.
        mixture: (n,) number of each run's mixture; runs of the same mixture share it.
        mae, rmse: (m,) in nats. Like all scores by target, NaN for a target that never varied.
        r2: (m,) R2 against the mean of the runs that the law was fitted to.
        spearman: (m,) rank correlation.
        objective_mae, objective_r2, objective_spearman: The same scores of the objective.
        regret: Observed objective of the run predicted best minus that of the best run, in nats.
        coverage: By level, the fraction of all losses inside the law's interval.
        error: Mean over targets of rmse / standard deviation; about 1 for the mean. Ranks laws.
        seconds: Time of all fits and predictions.
        problems: Sentences on folds that did not converge, or whose runs did not vary a domain.
    """

    targets: list
    observed: np.ndarray
    predictions: np.ndarray
    stds: np.ndarray
    standardized: np.ndarray
    mixture: np.ndarray
    mae: np.ndarray
    rmse: np.ndarray
    r2: np.ndarray
    spearman: np.ndarray
    objective_mae: float
    objective_r2: float
    objective_spearman: Interval
    regret: float
    coverage: dict[float, float]
    error: float
    seconds: float
    problems: list[str]


def cross_validate(
    law: Law,
    mixtures: ArrayLike,
    losses: ArrayLike,
    *,
    objective: Objective = None,
    holdout: float = 0.2,
    seed: int = 0,
    levels: Sequence[float] = (0.5, 0.9),
) -> Judgement:
    """A law judged on every run, by fits to runs of other mixtures.

    Args:
        law: The law, fitted or not; it is cloned.
        mixtures: (n, k).
        losses: (n, m); NaN where a run has none, which that target's scores leave out.
        objective: As in `Law.propose`.
        holdout: Fraction of the mixtures left out at a time.
        seed: Seed of the folds.
        levels: Levels of the intervals whose coverage is counted. Without levels, the law is not
            asked for standard deviations, for which some laws need many refits.

    Raises:
        ValueError: `folds_of` cannot divide the runs, or the law cannot be fitted to them.
    """
    runs = judged_runs(mixtures, losses, objective)
    return judge_folds(law, runs, folds_of(runs.checked.mixtures_, holdout, seed), levels)


def compare(
    laws: Mapping[str, Law],
    mixtures: ArrayLike,
    losses: ArrayLike,
    *,
    objective: Objective = None,
    holdout: float = 0.2,
    seed: int = 0,
    levels: Sequence[float] = (0.5, 0.9),
) -> dict[str, Judgement | str]:
    """Laws judged on the same folds, by name, and the mean of the runs as "mean".

    The arguments and errors are those of `cross_validate`, except that a law that cannot be fitted
    gets the error message in place of a judgement. The mean has no rank correlation, and the regret
    of a random choice.

    Raises:
        ValueError: A law is named "mean", or `folds_of` cannot divide the runs.
    """
    if BASELINE in laws:
        raise ValueError(f"`laws`: {BASELINE!r} names the baseline; give the law another name.")
    runs = judged_runs(mixtures, losses, objective)
    folds = folds_of(runs.checked.mixtures_, holdout, seed)
    judged: dict[str, Judgement | str] = {}
    for name, law in laws.items():
        try:
            judged[name] = judge_folds(law, runs, folds, levels)
        except ValueError as error:
            judged[name] = str(error)
    mean = judge_folds(MeanLaw(), runs, folds, levels, 0)
    # The mean is low where the held-out runs are high: its rank correlation would say nothing
    judged[BASELINE] = replace(
        mean,
        spearman=np.full(len(runs.weights), np.nan),
        objective_spearman=Interval(np.nan, np.nan, np.nan),
        regret=regret_of(weighted(mean.observed, runs.weights), np.zeros(len(mean.observed))),
    )
    return judged


def best_of(judged: Mapping[str, Judgement | str]) -> str:
    """Name of the law with the lowest error. `error_difference` says how sure that is.

    Raises:
        ValueError: No law in `judged` has an error.
    """
    errors = {
        name: found.error
        for name, found in judged.items()
        if name != BASELINE and not isinstance(found, str) and np.isfinite(found.error)
    }
    if not errors:
        raise ValueError(
            f"`judged` has no law with an error ({', '.join(judged)}): did any target vary?"
        )
    return min(errors, key=lambda name: errors[name])


def as_good_as(best: str, judged: Mapping[str, Judgement | str]) -> list[str]:
    """Names of the other laws whose error is not significantly larger than that of `best`."""
    others = {name: one for name, one in judged.items() if name not in (best, BASELINE)}
    first = judged[best]
    return [
        name
        for name, one in others.items()
        if not isinstance(one, str)
        and not isinstance(first, str)
        and error_difference(first, one).high >= 0
    ]


def error_difference(a: Judgement, b: Judgement) -> Interval:
    """Mean squared standardized error of `a` minus that of `b`: below 0 where `a` is better.

    Raises:
        ValueError: `a` and `b` judge different runs.
    """
    if not np.array_equal(a.observed, b.observed, equal_nan=True):
        raise ValueError("`a` and `b` judge other runs: take both from the same `compare`.")
    difference = a.standardized**2 - b.standardized**2
    known = ~np.isnan(difference)

    def mean(counts: np.ndarray) -> np.ndarray:
        total = counts @ known.sum(1)
        return counts @ np.nansum(difference, 1) / np.where(total > 0, total, np.nan)

    return bootstrap(mean, a.mixture)


def judge_folds(
    law: Law,
    runs: JudgedRuns,
    folds: Sequence[Fold],
    levels: Sequence[float],
    resamples: int = RESAMPLES,
) -> Judgement:
    """A law judged on the runs that the folds hold out.

    Args:
        law: The law; it is cloned for every fold.
        runs: Runs, as from `held_out.judged_runs`.
        folds: Folds, as from `held_out.folds_of`; a run in no fold is not judged.
        levels: Levels of the intervals whose coverage is counted.
        resamples: Number of draws for the interval of the rank correlation.

    Raises:
        ValueError: The law cannot be fitted to a fold, or predicts losses that are not finite.
    """
    start = time.perf_counter()
    predictions, stds, means, problems = predict_held_out(law, runs, folds, bool(levels))
    seconds, observed = time.perf_counter() - start, runs.checked.losses_
    moving = ~np.isin(runs.checked.targets_, runs.checked.constant_)
    scored = np.where(moving, predictions, np.nan)
    errors, deviation = scored - observed, np.nanstd(observed, 0)
    seen, foretold, mean = (weighted(each, runs.weights) for each in (observed, predictions, means))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means over no values, for a target that never varied
        rmse = np.sqrt(np.nanmean(errors**2, 0))
        return Judgement(
            targets=runs.checked.targets_,
            observed=observed,
            predictions=predictions,
            stds=stds,
            standardized=errors / deviation,
            mixture=runs.mixture,
            mae=np.nanmean(np.abs(errors), 0),
            rmse=rmse,
            r2=r2(observed=observed, predicted=scored, baseline=means),
            spearman=np.array(
                [spearman(*pair)[0] for pair in zip(observed.T, scored.T, strict=True)]
            ),
            objective_mae=float(np.nanmean(np.abs(seen - foretold))),
            objective_r2=float(r2(observed=seen, predicted=foretold, baseline=mean)),
            objective_spearman=bootstrap(
                lambda counts: spearman(seen, foretold, counts), runs.mixture, resamples
            ),
            regret=regret_of(seen, foretold),
            coverage={level: coverage_of(errors, stds, level) for level in levels},
            error=float(np.nanmean(rmse / deviation)),
            seconds=seconds,
            problems=problems,
        )
