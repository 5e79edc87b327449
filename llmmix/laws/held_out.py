"""Cross-validation: runs predicted by a law that was fitted to runs of other mixtures.

llmmix/laws/judge.py makes scores of the predictions.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.model_selection import KFold

from llmmix.laws.law import Law
from llmmix.laws.mean import MeanLaw
from llmmix.laws.objective import Objective
from llmmix.laws.simplex import same_mixture

Fold = tuple[np.ndarray, np.ndarray]  # indices of the runs to fit to, and of those to predict


class JudgedRuns(NamedTuple):
    """Runs and an objective; the tables stay as they came, since a law may use their names."""

    tables: tuple
    checked: MeanLaw  # fitted to all runs: has them checked, with their names
    weights: np.ndarray  # (m,) of the objective
    mixture: np.ndarray  # (n,) number of each run's mixture


def judged_runs(mixtures: ArrayLike, losses: ArrayLike, objective: Objective) -> JudgedRuns:
    """Runs, checked, with the objective's weights and the number of each run's mixture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # domains that never vary are counted fold by fold
        checked = MeanLaw().fit(mixtures, losses)
    given = ((mixtures, checked.mixtures_), (losses, checked.losses_))
    tables = tuple(table if hasattr(table, "columns") else values for table, values in given)
    weights = checked.target_weights(objective)
    return JudgedRuns(tables, checked, weights, same_mixture(checked.mixtures_))


def folds_of(mixtures: ArrayLike, holdout: float, seed: int) -> list[Fold]:
    """Indices of the runs to fit to and of those to predict, by fold.

    Runs of the same mixture share a fold. Folds depend on the set of runs, not on their order.

    Args:
        mixtures: (n, k).
        holdout: Fraction of the mixtures in each fold, in (0, 0.5].
        seed: Seed of the folds.

    Raises:
        ValueError: `holdout` is outside (0, 0.5], or there are fewer than 3 mixtures.
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
    return [
        (np.flatnonzero(np.isin(mixture, fitted)), np.flatnonzero(np.isin(mixture, held)))
        for fitted, held in parts
    ]


def predict_held_out(
    law: Law, runs: JudgedRuns, folds: Sequence[Fold], with_std: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Predictions, standard deviations and training means, all (n, m), and a list of problems.

    Raises:
        ValueError: The law cannot be fitted to a fold, or predicts losses that are not finite.
    """
    X, Y = runs.tables
    found: Counter[str] = Counter()
    targets = runs.checked.targets_
    predictions, stds, means = (np.full_like(runs.checked.losses_, np.nan) for _ in range(3))
    for train, test in folds:
        known = ~np.isnan(runs.checked.losses_[train]).all(0)
        found.update(f"no run fitted to has a loss of {targets[i]}" for i in np.flatnonzero(~known))
        if not known.any():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the law's warnings are counted below
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


def _part(table: Any, rows: np.ndarray, columns: np.ndarray | None = None) -> Any:
    part = table.iloc[rows] if hasattr(table, "iloc") else table[rows]
    if columns is None or columns.all():
        return part
    columns = np.flatnonzero(columns)
    return part.iloc[:, columns] if hasattr(part, "iloc") else part[:, columns]
