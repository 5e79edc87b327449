"""How well a law predicts runs that it was not fitted to: against other laws, and the mean.

    judged = compare({"effective": EffectiveDataLaw(), "linear": LinearLaw()}, mixtures, losses)
    best_of(judged), paired_difference(judged["effective"], judged["linear"])

Every run is predicted by a law fitted to other mixtures. Runs of one mixture stay together: another
seed of it would give the answer away. Scores and their intervals are those of `scores`. All this is
of one scale: what bends best to small runs need not carry over to large ones best (`transfer`).
"""

import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import KFold, ShuffleSplit

from llmmix.laws.law import Law
from llmmix.laws.scores import (
    RESAMPLES,
    Interval,
    bootstrap,
    coverage_of,
    r2,
    regret_of,
    same_mixture,
    spearman,
    weighted,
)

BASELINE = "mean"  # the name of `MeanLaw` in a comparison
HELD_OUT = 0.2  # part of the mixtures that a learning curve is judged on
SCORES = ("error", "spearman", "mae")  # of a learning curve


class MeanLaw(Law):
    """Every mixture gets the mean loss: what a law has to beat."""

    def _fit(self, X, Y):
        self._mean, noise = np.nanmean(Y, 0), np.nanstd(Y, 0)
        self._error = noise / np.sqrt((~np.isnan(Y)).sum(0))
        return noise

    def _predict(self, X):
        return np.tile(self._mean, (len(X), 1))

    def _spread(self, X):
        return np.tile(self._error, (len(X), 1))

    def _gradient(self, X):
        return np.zeros((len(X), len(self._mean), X.shape[1]))


@dataclass(frozen=True, eq=False)
class Judgement:
    """A law against n runs that it was not fitted to, of m targets; NaN for what is unknown.

    Attributes:
        targets: Their m names.
        observed: (n, m) losses.
        predictions: (n, m), each by the law fitted without the run's mixture.
        stds: (n, m) standard deviation of a new run's loss about them, as the law has it.
        standardized: (n, m) errors over the target's standard deviation among all runs.
        mixture: (n,) number of each run's mixture, the same for runs of the same one.
        mae, rmse: (m,) in nats. Like all scores by target, NaN for one that never varied.
        r2: (m,) against the mean of the runs that the law was fitted to.
        spearman: (m,) rank correlation.
        objective_mae, objective_r2, objective_spearman: Of the targets' weighted sum.
        regret: Observed objective of the run predicted best, less that of the best run, in nats.
        coverage: By level, the part of all losses that lies within the law's interval.
        error: Mean over targets of rmse over standard deviation, about 1 for the mean: ranks laws.
        seconds: For all fits and predictions.
        problems: How many folds did not converge, or left the law without knowledge of a domain.
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


class _Runs(NamedTuple):
    """Runs, and the objective asked for; tables as they came, as a law may go by names."""

    tables: tuple
    checked: MeanLaw  # fitted to them all: holds them checked, and their names
    weights: np.ndarray  # (m,) of the objective
    mixture: np.ndarray  # (n,)


def _runs(mixtures, losses, objective) -> _Runs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # domains that never vary: counted, fold by fold
        checked = MeanLaw().fit(mixtures, losses)
    given = ((mixtures, checked.mixtures_), (losses, checked.losses_))
    tables = tuple(table if hasattr(table, "columns") else values for table, values in given)
    weights = checked.target_weights(objective)
    return _Runs(tables, checked, weights, same_mixture(checked.mixtures_))


def folds_of(mixtures, holdout: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices of the runs to fit to and of those to predict, by fold.

    Runs of the same mixture share a fold. Folds depend on the set of runs, not on their order.

    Args:
        mixtures: (n, k).
        holdout: Part of the mixtures in each fold, in (0, 0.5].
        seed: Of the division.

    Raises:
        ValueError: Another `holdout`, or fewer than 3 mixtures.
    """
    if not 0 < holdout <= 0.5:
        raise ValueError(f"`holdout` must lie above 0 and at most at 0.5, got {holdout}.")
    mixture = same_mixture(mixtures)
    count = mixture.max() + 1
    if count < 3:
        raise ValueError(
            f"`mixtures`: cross-validation takes 3 different ones, got {count} in "
            f"{len(mixture)} runs. Add runs of other mixtures."
        )
    folds = KFold(int(np.clip(round(1 / holdout), 2, count)), shuffle=True, random_state=seed)
    parts = folds.split(np.arange(count))
    return [tuple(np.flatnonzero(np.isin(mixture, half)) for half in halves) for halves in parts]


def cross_validate(
    law: Law, mixtures, losses, *, objective=None, holdout=0.2, seed=0, levels=(0.5, 0.9)
) -> Judgement:
    """A law judged on every run, by its fits to runs of other mixtures.

    Args:
        law: Cloned; what it was fitted to plays no part.
        mixtures: (n, k).
        losses: (n, m), NaN where a run has none: left out of that target's scores.
        objective: As in `Law.propose`.
        holdout: Part of the mixtures left out at a time.
        seed: Of the folds.
        levels: Of the intervals whose coverage is counted. Without any, the law is not asked for
            standard deviations, for which some refit themselves many times.

    Raises:
        ValueError: As `folds_of`, or what the law raises.
    """
    runs = _runs(mixtures, losses, objective)
    return _judge(law, runs, folds_of(runs.checked.mixtures_, holdout, seed), levels)


def compare(
    laws: dict[str, Law],
    mixtures,
    losses,
    *,
    objective=None,
    holdout=0.2,
    seed=0,
    levels=(0.5, 0.9),
) -> dict[str, Judgement | str]:
    """Laws judged on the same folds, by name, and the mean beside them as "mean".

    Arguments and errors are those of `cross_validate`, but a law that cannot be fitted has its
    message for a judgement. The mean has no Spearman, and the regret of a random choice.
    """
    if BASELINE in laws:
        raise ValueError(f"`laws`: {BASELINE!r} names the baseline; call the law otherwise.")
    runs = _runs(mixtures, losses, objective)
    folds = folds_of(runs.checked.mixtures_, holdout, seed)
    judged: dict[str, Judgement | str] = {}
    for name, law in laws.items():
        try:
            judged[name] = _judge(law, runs, folds, levels)
        except ValueError as error:
            judged[name] = str(error)
    mean = _judge(MeanLaw(), runs, folds, levels, 0)
    # A fold's mean is low where its held-out runs are high: a rank correlation, of nothing
    judged[BASELINE] = replace(
        mean,
        spearman=np.full(len(runs.weights), np.nan),
        objective_spearman=Interval(np.nan, np.nan, np.nan),
        regret=regret_of(weighted(mean.observed, runs.weights), np.zeros(len(mean.observed))),
    )
    return judged


def best_of(judged: dict[str, Judgement | str]) -> str:
    """Name of the law of the lowest error; whether it really is better: `paired_difference`.

    Raises:
        ValueError: No law was judged.
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
    return min(errors, key=errors.get)


def paired_difference(a: Judgement, b: Judgement) -> Interval:
    """Mean squared standardised error of `a` less that of `b`: below 0 where `a` is better.

    Raises:
        ValueError: Judgements of other runs.
    """
    if not np.array_equal(a.observed, b.observed, equal_nan=True):
        raise ValueError("`a` and `b` judge other runs: take both from one `compare`.")
    difference = a.standardized**2 - b.standardized**2
    known = ~np.isnan(difference)

    def mean(counts):
        total = counts @ known.sum(1)
        return counts @ np.nansum(difference, 1) / np.where(total > 0, total, np.nan)

    return bootstrap(mean, a.mixture)


def _judge(law: Law, runs: _Runs, folds, levels, resamples: int = RESAMPLES) -> Judgement:
    start = time.perf_counter()
    predictions, stds, means, problems = _held_out(law, runs, folds, bool(levels))
    seconds, observed = time.perf_counter() - start, runs.checked.losses_
    moving = ~np.isin(runs.checked.targets_, runs.checked.constant_)
    scored = np.where(moving, predictions, np.nan)
    errors, deviation = scored - observed, np.nanstd(observed, 0)
    seen, foretold, mean = (weighted(each, runs.weights) for each in (observed, predictions, means))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means over nothing: of a target that never varied
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


def _held_out(law: Law, runs: _Runs, folds, with_std: bool):
    """Predictions, standard deviations and training means, all (n, m), and problems in words."""
    X, Y = runs.tables
    found, targets = Counter(), runs.checked.targets_
    predictions, stds, means = (np.full_like(runs.checked.losses_, np.nan) for _ in range(3))
    for train, test in folds:
        known = ~np.isnan(runs.checked.losses_[train]).all(0)
        found.update(f"no run fitted to has a loss of {targets[i]}" for i in np.flatnonzero(~known))
        if not known.any():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the law's: counted here
            twin = clone(law).fit(_part(X, train), _part(Y, train, known))
            foretold = twin.predict(_part(X, test), return_std=with_std)
        cells = np.ix_(test, known)
        predictions[cells], stds[cells] = foretold if with_std else (foretold, np.nan)
        means[cells] = np.nanmean(runs.checked.losses_[np.ix_(train, known)], 0)
        if not np.isfinite(predictions[cells]).all():
            raise ValueError(f"{type(law).__name__} predicts losses that are not finite.")
        found.update(["the fit did not converge"] * (not twin.converged_))
        found.update(f"no run fitted to varies {domain}" for domain in twin.unidentified_)
        found.update(["the law set runs aside"] * bool(twin.outliers_))
    problems = [f"in {count} of {len(folds)} folds {what}" for what, count in found.items()]
    return predictions, stds, means, problems


def _part(table, rows: np.ndarray, columns=None):
    part = table.iloc[rows] if hasattr(table, "iloc") else table[rows]
    if columns is None or columns.all():
        return part
    columns = np.flatnonzero(columns)
    return part.iloc[:, columns] if hasattr(part, "iloc") else part[:, columns]


def learning_curve(
    law: Law, mixtures, losses, *, objective=None, sizes=None, repeats: int = 3, seed: int = 0
) -> list[dict]:
    """How well a law predicts when it is fitted to fewer runs.

    In every repeat a fifth of the mixtures is held out, and the law is fitted to n runs of the
    others, each of another mixture; the runs of a smaller n are among those of a larger one.

    Args:
        law: Cloned.
        mixtures: (n, k).
        losses: (n, m).
        objective: As in `Law.propose`.
        sizes: Numbers of runs. Default: 8, 16, 32, ... and four fifths of the mixtures.
        repeats: Draws of the runs.
        seed: Of the draws.

    Returns:
        By size a dict of runs; error (as in `Judgement`), spearman and mae of the objective: means
        over the repeats, and each one's standard deviation over them as error_sd and so on; and
        `reason`: why the law could not be fitted in some or all of the repeats, else "".

    Raises:
        ValueError: Fewer than 5 mixtures, or a size that the held-out fifth does not leave.
    """
    runs = _runs(mixtures, losses, objective)
    count = runs.mixture.max() + 1
    held = int(np.ceil(HELD_OUT * count))
    most = count - held
    if count < 5:
        raise ValueError(f"`mixtures`: a learning curve takes 5 different ones, got {count}.")
    if sizes is None:
        sizes = [n for n in 8 * 2 ** np.arange(20) if n < most] + [most]
    if min(sizes) < 1 or max(sizes) > most:
        raise ValueError(
            f"`sizes` must lie between 1 and {most}, which is what {count} mixtures leave when "
            f"{held} are held out; got {list(sizes)}."
        )
    trials: dict[int, list] = {int(n): [] for n in sorted(sizes)}
    rng = np.random.default_rng(seed)
    split = ShuffleSplit(repeats, test_size=held, random_state=seed).split(np.arange(count))
    for others, apart in split:
        test = np.flatnonzero(np.isin(runs.mixture, apart))
        pool = [rng.choice(np.flatnonzero(runs.mixture == group)) for group in others]
        for n, results in trials.items():
            results.append(_trial(law, runs, np.sort(pool[:n]), test))
    return [_point(n, results) for n, results in trials.items()]


def _trial(law: Law, runs: _Runs, train: np.ndarray, test: np.ndarray) -> tuple | str:
    try:
        judged = _judge(law, runs, [(train, test)], (), 0)
    except ValueError as error:
        return str(error)
    return judged.error, judged.objective_spearman.estimate, judged.objective_mae


def _point(n: int, results: list) -> dict:
    reasons = [result for result in results if isinstance(result, str)]
    numbers = [result for result in results if not isinstance(result, str)] or [[np.nan] * 3]
    point: dict = {"runs": n}
    for name, values in zip(SCORES, np.transpose(numbers), strict=True):
        point |= {name: float(values.mean()), f"{name}_sd": float(values.std())}
    partly = f"{len(reasons)} of {len(results)} draws: " if len(reasons) < len(results) else ""
    return point | {"reason": partly + reasons[0] if reasons else ""}


def runs_needed(curve: list[dict], within: float = 0.1) -> int:
    """Fewest runs whose error is at most `within` (a part) above that of the most runs.

    Raises:
        ValueError: A curve without an error.
    """
    known = [point for point in curve if np.isfinite(point["error"])]
    if not known:
        raise ValueError("`curve` has no error: the law could be fitted at none of its sizes.")
    bar = (1 + within) * max(known, key=lambda point: point["runs"])["error"]
    return min(point["runs"] for point in known if point["error"] <= bar)
