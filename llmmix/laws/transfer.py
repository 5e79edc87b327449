"""Judge a law of small models on runs of large ones, and calibrate it on a few of these.

    transfer = judge_transfer(law, large_mixtures, large_losses, objective="code")
    calibrator = TransferCalibrator().fit(law.predict(few), their_losses)
    calibrator.predict(law.predict(others))

As models grow, losses fall by some nats and mixtures differ less: an offset and a slope for each
target. A few large runs are enough to fit these two numbers, and not enough for more.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import kendalltau
from sklearn.base import BaseEstimator

from llmmix.laws.accuracy import bootstrap, regret_of, spearman, weighted
from llmmix.laws.inputs import canonical_order, check_losses
from llmmix.laws.law import Law
from llmmix.laws.objective import Objective
from llmmix.laws.simplex import same_mixture


class TransferCalibrator(BaseEstimator):
    """observed = intercept + slope * predicted, by target, by least squares.

    It uses plain least squares, not the median of slopes (Theil-Sen): 2 to 16 runs are too few for
    robustness, and where no run diverged the median costs accuracy.

    A single run, or runs with equal predictions, determine only an offset: the slope is then 1. So
    it is where the fitted slope is 0 or below. Such a slope reverses the law's ranking, which means
    that the law does not carry over or that the runs are too few; it would not predict other runs.

    After `fit`: slope_ and intercept_ (m,), and monotone_ (m,), False where the fitted slope was
    not positive.
    """

    def fit(self, predicted: ArrayLike, observed: ArrayLike) -> Self:
        """Fit to runs of the size that is to be predicted.

        Args:
            predicted: (n, m) predictions of the law, or (n,) for a single target.
            observed: (n, m) losses; NaN where a run has none.

        Raises:
            ValueError: The shapes differ, a number is not finite, or a target has no loss.
        """
        self._flat = np.ndim(predicted) == 1
        x = _columns(predicted)
        y = check_losses(observed, len(x))
        if x.shape != y.shape:
            raise ValueError(
                f"`predicted` and `observed` must be runs by targets, both; got {x.shape} and "
                f"{y.shape}."
            )
        x = np.where(np.isnan(y), np.nan, x)
        x_mean, y_mean = np.nanmean(x, 0), np.nanmean(y, 0)
        spread = np.nansum((x - x_mean) ** 2, 0)
        known = spread > 1e-18 * np.nansum(x**2, 0)
        slope = np.nansum((x - x_mean) * (y - y_mean), 0) / np.where(known, spread, 1)
        self.monotone_ = ~known | (slope > 0)
        self.slope_ = np.where(known & self.monotone_, slope, 1.0)
        self.intercept_ = y_mean - self.slope_ * x_mean
        if not self.monotone_.all():
            warnings.warn(
                f"{(~self.monotone_).sum()} of {len(slope)} targets fall where the law has them "
                f"rise, in {len(x)} runs: only an offset was fitted there (`monotone_`).",
                stacklevel=2,
            )
        return self

    def predict(self, predicted: ArrayLike) -> np.ndarray:
        """Losses on the scale of `observed`, (n, m), or (n,) if `fit` was given (n,).

        Raises:
            ValueError: `fit` was not called, or had another number of targets.
        """
        if not hasattr(self, "slope_"):
            raise ValueError("TransferCalibrator is not fitted: call `fit` first.")
        x = _columns(predicted)
        if x.shape[1] != len(self.slope_):
            raise ValueError(f"`predicted` must have {len(self.slope_)} targets, got {x.shape[1]}.")
        found = self.intercept_ + self.slope_ * x
        return found[:, 0] if self._flat else found


def _columns(predicted: ArrayLike) -> np.ndarray:
    x = np.asarray(predicted, dtype=np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"`predicted` must be finite, runs by targets; got shape {x.shape}.")
    return x


Number = TypeVar("Number", np.ndarray, float)


class Agreement(NamedTuple, Generic[Number]):
    """Scores of predictions against observations: by target (m,), or of the objective."""

    spearman: Number
    spearman_low: Number  # bounds of the 95 % interval
    spearman_high: Number
    kendall: Number
    mae: Number  # as predicted, at the small models' scale
    mae_in_sample: Number  # after calibration to the same runs


class Calibrated(NamedTuple):
    """Scores on large runs after calibration on some of the others: medians over draws."""

    mae: np.ndarray  # (m,)
    mean_mae: float  # mean over targets
    objective_mae: float
    regret: float  # observed objective of the run predicted best minus that of the best run
    overlap: float  # fraction of the best `top` runs that are among the `top` predicted best
    top: int
    not_monotone: float  # fraction of fits, over targets and draws, with a slope not positive


@dataclass(frozen=True, eq=False)
class Transfer:
    """A law of small models judged on runs of large ones.

    Attributes:
        targets: The m names that both have.
        runs: Number of large runs.
        by_target: Scores by target, each field (m,).
        objective: Scores of the objective.
        regret: Observed objective of the run predicted best minus that of the best run.
        overlap: Fraction of the best `top` runs that are among the `top` predicted best.
        top: Number of runs of the overlap: 10, or half of the runs where there are fewer than 20.
        calibrated: Scores after calibration, by the number of runs calibrated on.
        notes: What was left out, and why.
    """

    targets: list
    runs: int
    by_target: Agreement[np.ndarray]
    objective: Agreement[float]
    regret: float
    overlap: float
    top: int
    calibrated: dict[int, Calibrated]
    notes: list[str]


def judge_transfer(
    law: Law,
    mixtures: ArrayLike,
    losses: ArrayLike,
    *,
    targets: Sequence | None = None,
    objective: Objective = None,
    counts: Sequence[int] = (2, 4, 8, 16),
    draws: int = 200,
    seed: int = 0,
) -> Transfer:
    """Judge a law fitted to small models on runs of large ones.

    Args:
        law: A fitted law.
        mixtures: (n, k) of the large runs.
        losses: (n, m'), NaN where a run has none.
        targets: Names of the columns of `losses`, matched with `law.targets_`. Default: the columns
            of a data frame, else the targets of the law, of which there must be as many.
        objective: As in `Law.propose`; the weight of targets that the large runs lack is spread
            over those in common.
        counts: Numbers of large runs to calibrate on; at least 2 others must be left to judge.
        draws: Number of times that these runs are chosen.
        seed: Seed of the choices.

    Raises:
        ValueError: There is no target in common, there are fewer than 3 runs, or the objective
            weighs none of the targets.
    """
    names = _names_of(law, losses, targets)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        predicted = _columns(law.predict(mixtures))
    notes = [str(warning.message) for warning in said]
    observed = check_losses(losses, len(predicted), names)
    common = _common(law, names, notes)
    weights = _weights(law, common, objective, notes)
    predicted = predicted[:, [law.targets_.index(name) for name in common]]
    observed = observed[:, [names.index(name) for name in common]]
    if len(observed) < 3:
        raise ValueError(f"`mixtures`: 3 large runs can be ranked, {len(observed)} cannot.")
    X = np.array(mixtures, dtype=np.float64)
    order = canonical_order(X, observed)[0]  # draws that do not depend on the order of runs
    X, predicted, observed = X[order], predicted[order], observed[order]
    agreement = _agreement(predicted, observed, weights, same_mixture(X))
    whole = ~np.isnan(observed).any(1)
    if not whole.all():
        notes.append(f"{(~whole).sum()} runs without all losses take no part in calibration.")
    feasible = _feasible(counts, whole.sum(), notes)
    few = predicted[whole], observed[whole], weights
    calibrated = {count: _calibrated(*few, count, draws, seed) for count in feasible}
    regret, overlap, top = _best(weighted(observed, weights), predicted @ weights)
    return Transfer(common, len(X), *agreement, regret, overlap, top, calibrated, notes)


def calibrated_objective(
    law: Law, transfer: Transfer, mixtures: pd.DataFrame, losses: pd.DataFrame, objective: Objective
) -> tuple[TransferCalibrator, np.ndarray, np.ndarray]:
    """Calibrate a law to all large runs, and predict their objective.

    Args:
        law: A fitted law.
        transfer: Result of `judge_transfer` for the law and these runs.
        mixtures: (n, k) of the large runs.
        losses: (n, m) with the names of the targets.
        objective: As in `Law.propose`.

    Returns:
        The calibrator of the targets in common, the predicted objective (n,) after calibration, and
        the observed objective (n,).
    """
    columns = [law.targets_.index(target) for target in transfer.targets]
    weights = law.target_weights(objective)[columns]
    predicted, observed = law.predict(mixtures)[:, columns], losses[transfer.targets].to_numpy()
    fitted = TransferCalibrator().fit(predicted, observed)
    shares = weights / weights.sum()
    return fitted, weighted(fitted.predict(predicted), shares), weighted(observed, shares)


def _feasible(counts, runs: int, notes: list[str]) -> list[int]:
    feasible = [count for count in sorted(counts) if 1 <= count <= runs - 2]
    for count in sorted(set(counts) - set(feasible)):
        notes.append(
            f"{count} of {runs} runs cannot calibrate: it takes 1 or more, and 2 must be left."
        )
    return feasible


def _names_of(law: Law, losses: Any, targets: Sequence | None) -> list:
    columns = getattr(losses, "columns", None)
    if targets is not None or columns is not None:
        names = [str(name) for name in losses.columns] if targets is None else list(targets)
        if len(set(names)) < len(names):
            raise ValueError(f"`targets` has a name twice: {names}.")
        return names
    count = 1 if np.ndim(losses) == 1 else np.shape(losses)[-1]
    if count != len(law.targets_):
        raise ValueError(
            f"`losses` has {count} targets and the law {len(law.targets_)}: name them in `targets`."
        )
    return list(law.targets_)


def _common(law: Law, names: list, notes: list[str]) -> list:
    common = [name for name in law.targets_ if name in names]
    if not common:
        raise ValueError(
            f"`losses` has no target of the law: it has {names}, the law {law.targets_}."
        )
    for name in law.targets_:
        if name not in names:
            notes.append(f"The large runs have no loss of {name}: it is not judged.")
    for name in names:
        if name not in common:
            notes.append(f"The law has no target {name}: it is not judged.")
    return common


def _weights(law: Law, common: list, objective, notes: list[str]) -> np.ndarray:
    by_name = dict(zip(law.targets_, law.target_weights(objective), strict=True))
    weights = np.array([by_name[name] for name in common])
    if not weights.sum():
        raise ValueError(f"`objective`: the large runs have none of its targets, only {common}.")
    if weights.sum() < 1 - 1e-9:
        notes.append(f"The targets in common are {weights.sum():.0%} of the objective's weight.")
    return weights / weights.sum()


def _agreement(
    predicted, observed, weights, mixture
) -> tuple[Agreement[np.ndarray], Agreement[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # slopes that are not positive; Spearman shows them
        fitted = TransferCalibrator().fit(predicted, observed).predict(predicted)
        predicted, observed, fitted = (
            np.column_stack([losses, weighted(losses, weights)])
            for losses in (predicted, observed, fitted)
        )
        rows = [
            [
                *bootstrap(partial(spearman, y, x), mixture),
                kendalltau(x, y, nan_policy="omit").statistic,
                np.nanmean(np.abs(x - y)),
                np.nanmean(np.abs(z - y)),
            ]
            for x, y, z in zip(predicted.T, observed.T, fitted.T, strict=True)
        ]
    scores = np.array(rows, dtype=np.float64).T
    return Agreement(*scores[:, :-1]), Agreement(*scores[:, -1].tolist())


def _calibrated(predicted, observed, weights, count: int, draws: int, seed: int) -> Calibrated:
    rng, results, monotone = np.random.default_rng(seed), [], []
    for _ in range(draws):
        rows = rng.permutation(len(observed))
        few, others = rows[:count], rows[count:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `not_monotone` counts slopes that are not positive
            calibrator = TransferCalibrator().fit(predicted[few], observed[few])
        found, true = calibrator.predict(predicted[others]), observed[others]
        mae = np.abs(found - true).mean(0)
        regret, overlap, top = _best(true @ weights, found @ weights)
        total = np.abs((found - true) @ weights).mean()
        results.append([*mae, mae.mean(), total, regret, overlap])
        monotone.append(calibrator.monotone_.mean())
    medians = np.median(results, 0)
    mean_mae, objective_mae, regret, overlap = map(float, medians[-4:])
    return Calibrated(
        mae=medians[:-4],
        mean_mae=mean_mae,
        objective_mae=objective_mae,
        regret=regret,
        overlap=overlap,
        top=top,
        not_monotone=float(1 - np.mean(monotone)),
    )


def _best(observed: np.ndarray, predicted: np.ndarray, most: int = 10) -> tuple[float, float, int]:
    """Regret of the run predicted best, overlap of the best `top` runs, and `top`, at most half."""
    kept = ~np.isnan(observed)
    observed, predicted = observed[kept], predicted[kept]
    top = min(most, len(observed) // 2)
    best = [set(np.argsort(losses, kind="stable")[:top]) for losses in (observed, predicted)]
    return regret_of(observed, predicted), len(best[0] & best[1]) / max(top, 1), top
