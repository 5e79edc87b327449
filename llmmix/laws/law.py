"""`Law`, the base class of all mixture laws: checked inputs, prediction, uncertainty, best mixture.

    fit(mixtures (n, k), losses (n, m));  predict(mixtures) -> (n, m);  best_mixture() -> (k,)

Domains that have the same share in all runs are set aside, since the runs say nothing about them;
so are targets whose loss never changes. A law is fitted to the rest, in an order that does not
depend on the order of the runs (`inputs.canonical_order`). `MixtureProposer`
(llmmix/laws/optimum.py) finds the best mixture.
"""

import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm
from sklearn.base import BaseEstimator, clone

from llmmix.laws.inputs import Problem, check_inputs, listed
from llmmix.laws.optimum import MixtureProposer

MEMBERS = 20  # refits of a law that estimates no uncertainty itself


class Law(MixtureProposer, BaseEstimator):
    """A law of the loss as a function of the mixture, with scikit-learn's interface.

    A subclass defines `_fit` and `_predict`, `_gradient` if it is smooth, and `_spread` and
    `_draws` if it estimates its own uncertainty.

    After `fit`:
        domains_, targets_: Names: the columns of a data frame, else 0, 1, ...
        mixtures_, losses_: (n, k) and (n, m) of the runs behind the law.
        inputs_: These runs as `Inputs`.
        unidentified_: Domains whose share never varied; the law does not know their effect.
        constant_: Targets whose loss never varied; the law predicts that loss.
        outliers_: Indices of runs that the law set aside.
        noise_: (m,) standard deviation of a run's loss around the law.
        converged_: Whether the fit converged.
    """

    smooth = True  # whether `gradient` exists
    converged_ = True

    def fit(self, mixtures: ArrayLike, losses: ArrayLike) -> Self:
        """Fit to finished runs.

        Args:
            mixtures: (n, k) shares, rows of sum 1.
            losses: (n, m), or (n,) of a single target; NaN where a run has none.

        Raises:
            ValueError: Shares or losses are not valid, or the runs are too few for this law.
        """
        self.__dict__.pop("_fitted", None)  # if this fit fails, no earlier one is used
        runs = self.inputs_ = check_inputs(mixtures, losses)
        self.domains_, self.targets_ = runs.domains, runs.targets
        self.mixtures_, self.losses_ = runs.mixtures, runs.losses
        self.unidentified_, self.constant_ = runs.unidentified, runs.constant
        if self.unidentified_:
            warnings.warn(
                f"No run varied {listed(self.unidentified_)}: the law cannot know what "
                f"{'it does' if len(self.unidentified_) == 1 else 'they do'}.",
                stacklevel=2,
            )
        self._domains, self._targets = runs.varied, runs.moving
        self.noise_ = np.zeros(len(self.targets_))
        self._aside = np.zeros(len(self.mixtures_), dtype=bool)
        if len(self._targets):
            self._problem = runs.problem
            self.noise_[self._targets] = self._fit(*self._problem)
        self.outliers_ = sorted(runs.runs[self._aside].tolist())
        if self.outliers_:
            warnings.warn(
                f"Set aside as far from any law: runs {listed(self.outliers_)} (from 0).",
                stacklevel=2,
            )
        self._fitted = True
        return self

    def _fit(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Fit to (n, k) and (n, m); return the noise (m,)."""
        raise NotImplementedError

    def _predict(self, X: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _gradient(self, X: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _spread(self, X: np.ndarray) -> np.ndarray:
        return np.std([member._predict(X) for member in self._members()], 0)

    def _draws(self, X: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, n, m) losses; by default of laws refitted to runs drawn with replacement."""
        members = np.array([member._predict(X) for member in self._members()])
        return members[rng.integers(len(members), size=count)]

    def _members(self) -> list["Law"]:
        """Refits, made when first asked for."""
        made: tuple[Problem | None, list[Law]] = getattr(self, "_made", (None, []))
        if made[0] is not self._problem:
            made = self._made = (self._problem, _refits(self, self._problem))
        return made[1]

    def predict(self, mixtures: ArrayLike, return_std: bool = False) -> Any:
        """Losses of mixtures.

        Args:
            mixtures: (n, k), domains as in `fit`.
            return_std: Also return the standard deviation of a new run's loss around them: that of
                the fit and the noise of a run together.

        Returns:
            (n, m), or (n,) if `fit` was given (n,); with `return_std` a pair of them.
        """
        X = self._check(mixtures)
        losses = self._losses(X)
        if not return_std:
            return self._shaped(losses)
        spread = np.zeros_like(losses)
        if len(self._targets):
            spread[:, self._targets] = self._spread(X[:, self._domains])
        return self._shaped(losses), self._shaped(np.hypot(spread, self.noise_))

    def interval(self, mixtures: ArrayLike, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds of a new run's loss at this `level`, each shaped as `predict`'s.

        Raises:
            ValueError: `level` is outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
        losses, std = self.predict(mixtures, return_std=True)
        return losses - norm.ppf(0.5 + level / 2) * std, losses + norm.ppf(0.5 + level / 2) * std

    def draws(self, mixtures: ArrayLike, count: int = 100, seed: int = 0) -> np.ndarray:
        """(count, n, m) losses under laws drawn from those that fit the runs, without noise."""
        X = self._check(mixtures)
        drawn = np.repeat(self._losses(X)[None], count, 0)
        if len(self._targets):
            rng = np.random.default_rng(seed)
            drawn[:, :, self._targets] = self._draws(X[:, self._domains], count, rng)
        return drawn

    def gradient(self, mixtures: ArrayLike) -> np.ndarray:
        """(n, m, k) slope of each loss in each share; 0 for domains that the law does not know.

        Raises:
            TypeError: The law is piecewise constant and has no slopes.
        """
        if not self.smooth:
            raise TypeError(f"{type(self).__name__} has no gradient: it is piecewise constant.")
        return self._slopes(self._check(mixtures))

    def effects(self, mixture: ArrayLike, moved: float = 0.05) -> np.ndarray:
        """(m, k) change of each loss if a part of the mixture goes to each domain.

        The other domains shrink in proportion. NaN for domains whose effect the law does not know.

        Args:
            mixture: (k,) mixture to start from.
            moved: The part of the mixture that is moved.

        Raises:
            ValueError: `moved` is outside (0, 1], or `mixture` is not a single mixture.
        """
        if not 0 < moved <= 1:
            raise ValueError(f"`moved` must lie above 0 and at most at 1, got {moved}.")
        here = self._check(mixture)
        if len(here) != 1:
            raise ValueError(f"`mixture` must be one, (k,), got {len(here)}.")
        there = (1 - moved) * here + moved * np.eye(here.shape[1])
        changes = (self._losses(there) - self._losses(here)).T
        changes[:, self.inputs_.fixed] = np.nan
        return changes

    def _losses(self, X: np.ndarray) -> np.ndarray:
        """(n, m) losses of checked mixtures."""
        losses = np.tile(np.nanmean(self.losses_, 0), (len(X), 1))
        if len(self._targets):
            losses[:, self._targets] = self._predict(X[:, self._domains])
        return losses

    def _slopes(self, X: np.ndarray) -> np.ndarray:
        slopes = np.zeros((len(X), len(self.targets_), X.shape[1]))
        if len(self._targets):
            inner = self._gradient(X[:, self._domains])
            slopes[:, self._targets[:, None], self._domains[None]] = inner
        return slopes

    def _check(self, mixtures: ArrayLike) -> np.ndarray:
        self._check_fitted()
        X = self.inputs_.check(mixtures)
        if (np.abs(X - self.mixtures_[0])[:, self.inputs_.fixed] > 1e-6).any():
            warnings.warn(
                f"`mixtures` vary {listed(self.unidentified_)}, which no run behind this law did: "
                f"the prediction takes no account of that.",
                stacklevel=3,
            )
        return X

    def _shaped(self, losses: np.ndarray) -> np.ndarray:
        return losses[:, 0] if self.inputs_.flat else losses


def require_runs(law: Law, Y: np.ndarray, needed: int, reason: str) -> None:
    """Refuse a target with fewer runs than a law needs.

    Args:
        law: The law, for the message.
        Y: (n, m) losses as fitted, NaN where missing.
        needed: Number of runs.
        reason: Why the law needs them, as "has 3 parameters for each target".

    Raises:
        ValueError: A target has fewer runs than `needed`.
    """
    runs = np.isfinite(Y).sum(0)
    short = int(runs.argmin())
    if runs[short] < needed:
        raise ValueError(
            f"{type(law).__name__} {reason} and needs {needed} runs or more; target "
            f"{law.targets_[law.inputs_.moving[short]]} has {runs[short]}. Add runs, or use "
            f"EffectiveDataLaw, which needs few."
        )


def _refits(law: Law, problem: Problem) -> list[Law]:
    """Laws fitted to runs drawn with replacement."""
    rng = np.random.default_rng(0)
    members: list[Law] = []
    X, Y = problem
    while len(members) < MEMBERS:
        rows = rng.integers(len(X), size=len(X))
        # A draw without any loss of a target, or of a single mixture, cannot be fitted
        if np.isnan(Y[rows]).all(0).any() or not np.ptp(X[rows], 0).any():
            continue
        members.append(clone(law))
        members[-1]._fit(X[rows], Y[rows])
    return members
