"""What all mixture laws share: checked input, names, an order of their own, and the best mixture.

    fit(mixtures (n, k), losses (n, m));  predict(mixtures) -> (n, m);  best_mixture() -> (k,)

Domains that all runs gave the same share are set aside: the runs say nothing about them. So are
targets whose loss never changes. A law is fitted to what is left, in an order that does not depend
on how the runs came (`inputs.canonical_order`).
"""

import warnings
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from sklearn.base import BaseEstimator, clone

from llmmix.laws.inputs import by_name, canonical_order, check_losses, check_mixtures
from llmmix.laws.search import Found, minimize_mixture, sample_mixture
from llmmix.laws.simplex import bounds_of

MEMBERS = 20  # refits of a law that has no uncertainty of its own


class Problem(NamedTuple):
    """What is fitted: shares of the domains that vary, losses of the targets that do."""

    mixtures: np.ndarray  # (n, k)
    losses: np.ndarray  # (n, m), NaN where missing


class Law(BaseEstimator):
    """A law of the loss as a function of the mixture, with scikit-learn's manners.

    After `fit`:
        domains_, targets_: Names, those of a data frame's columns, else 0, 1, ...
        mixtures_: (n, k) of the runs behind the law, losses_: (n, m).
        unidentified_: Domains whose share never varied; the law does not know them.
        constant_: Targets whose loss never varied; predicted as it was.
        outliers_: Indices of runs that the law set aside.
        noise_: (m,) standard deviation of a run's loss about the law.
        converged_: Whether the fit did.
    """

    smooth = True  # whether `gradient` exists
    converged_ = True

    def fit(self, mixtures, losses) -> "Law":
        """Fit to finished runs.

        Args:
            mixtures: (n, k) shares, rows of sum 1.
            losses: (n, m), or (n,) of a single target; NaN where a run has none.

        Raises:
            ValueError: Shares or losses that are none, or too few runs for this law.
        """
        self.__dict__.pop("_fitted", None)  # should this one fail, no earlier one answers
        self.domains_, self.targets_ = _names(mixtures), _names(losses)
        X = check_mixtures(mixtures, self.domains_)
        self._flat = np.ndim(losses) == 1
        Y = check_losses(losses, len(X), self.targets_)
        self.domains_ = self.domains_ or list(range(X.shape[1]))
        self.targets_ = self.targets_ or list(range(Y.shape[1]))
        self.mixtures_, self.losses_ = X, Y
        varied = np.ptp(X, 0) > 1e-9
        if not varied.any():
            why = "there is one domain" if X.shape[1] == 1 else f"all {len(X)} have the same"
            raise ValueError(f"`mixtures`: no two runs differ in their mixture: {why}. Add runs.")
        self.unidentified_ = [self.domains_[j] for j in np.flatnonzero(~varied)]
        if self.unidentified_:
            warnings.warn(
                f"No run varied {_listed(self.unidentified_)}: the law cannot know what "
                f"{'it does' if len(self.unidentified_) == 1 else 'they do'}.",
                stacklevel=2,
            )
        moving = np.nanmax(Y, 0) - np.nanmin(Y, 0) > 1e-12 * np.abs(np.nanmax(Y, 0))
        self.constant_ = [self.targets_[i] for i in np.flatnonzero(~moving)]
        domains, targets = np.flatnonzero(varied), np.flatnonzero(moving)
        runs, inner, outer = canonical_order(X[:, domains], Y[:, targets])
        self._domains, self._targets = domains[inner], targets[outer]
        self.noise_, self._aside = np.zeros(Y.shape[1]), np.zeros(len(X), dtype=bool)
        if len(targets):
            ordered = np.ix_(runs, self._domains), np.ix_(runs, self._targets)
            self._problem = Problem(X[ordered[0]], Y[ordered[1]])
            self.noise_[self._targets] = self._fit(*self._problem)
        self.outliers_ = sorted(runs[self._aside].tolist())
        if self.outliers_:
            warnings.warn(
                f"Set aside as far from any law: runs {_listed(self.outliers_)} (from 0).",
                stacklevel=2,
            )
        self._fitted = True
        return self

    def _fit(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Fit to (n, k) and (n, m); return the noise (m,)."""
        raise NotImplementedError

    def _predict(self, X: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def predict(self, mixtures, return_std: bool = False):
        """Losses of mixtures.

        Args:
            mixtures: (n, k), domains as in `fit`.
            return_std: Also return the standard deviation of a new run's loss about them: what the
                runs leave open, and the runs' own noise.

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

    def interval(self, mixtures, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Bounds, each as `predict` returns, between which a new run's loss lies at this `level`.

        Raises:
            ValueError: A level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
        losses, std = self.predict(mixtures, return_std=True)
        return losses - norm.ppf(0.5 + level / 2) * std, losses + norm.ppf(0.5 + level / 2) * std

    def draws(self, mixtures, count: int = 100, seed: int = 0) -> np.ndarray:
        """(count, n, m) losses under laws that the runs leave open, without the runs' noise."""
        X = self._check(mixtures)
        drawn = np.repeat(self._losses(X)[None], count, 0)
        if len(self._targets):
            rng = np.random.default_rng(seed)
            drawn[:, :, self._targets] = self._draws(X[:, self._domains], count, rng)
        return drawn

    def gradient(self, mixtures) -> np.ndarray:
        """(n, m, k) slope of each loss in each share; 0 for domains that the law does not know.

        Raises:
            TypeError: A law without slopes.
        """
        if not self.smooth:
            raise TypeError(f"{type(self).__name__} has no gradient: it is piecewise constant.")
        return self._slopes(self._check(mixtures))

    def effects(self, mixture, moved: float = 0.05) -> np.ndarray:
        """(m, k) change of each loss if a part of the mixture goes to each domain.

        All others shrink in proportion. NaN for domains that the law does not know.

        Args:
            mixture: (k,) to move away from.
            moved: The part.

        Raises:
            ValueError: A part outside (0, 1].
        """
        if not 0 < moved <= 1:
            raise ValueError(f"`moved` must lie above 0 and at most at 1, got {moved}.")
        here = self._check(mixture)
        if len(here) != 1:
            raise ValueError(f"`mixture` must be one, (k,), got {len(here)}.")
        there = (1 - moved) * here + moved * np.eye(here.shape[1])
        changes = (self._losses(there) - self._losses(here)).T
        changes[:, ~np.isin(np.arange(here.shape[1]), self._domains)] = np.nan
        return changes

    def _losses(self, X: np.ndarray) -> np.ndarray:
        """(n, m) of mixtures that are known to be some."""
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

    def best_mixture(self, objective=None, **options) -> np.ndarray:
        """(k,) the mixture at which the law is best. Arguments: those of `propose`."""
        return self.propose(objective, **options).mixture

    def propose(
        self,
        objective=None,
        *,
        lower=None,
        upper=None,
        available=None,
        tokens: float | None = None,
        max_epochs: float | None = None,
        prior=None,
        closeness: float = 0.0,
        method: str = "auto",
        seed: int = 0,
    ) -> Found:
        """The mixture at which the law is best, and how it was found.

        Args:
            objective: None: the mean over targets. A target's name. Or weights: m numbers, or by
                name.
            lower: Smallest shares: a number, k, or by name. Domains that no run varied keep their
                share, whatever the bounds.
            upper: Largest shares, likewise.
            available: Tokens of each domain, likewise, and with it:
            tokens: Of the run that is planned.
            max_epochs: Times that no domain may be repeated more often than.
            prior: (k,) mixture, or by name, to stay close to. Default: the mean of the runs'.
            closeness: Nats of loss that a KL divergence of 1 from the prior is worth.
            method: gradient, sample (RegMix's: the mean of the best 128 of 100,000 Dirichlet draws
                about the prior), or auto: gradient where the law has one.
            seed: Of the draws.

        Raises:
            ValueError: An unknown name or method, weights or bounds that nothing meets.
        """
        u = self.target_weights(objective)
        limits = {"available": available, "tokens": tokens, "max_epochs": max_epochs}
        low, high = self.bounds(lower=lower, upper=upper, **limits)
        if closeness < 0 or not np.isfinite(closeness):
            raise ValueError(f"`closeness` must be 0 or more, got {closeness}.")
        prior = self.prior_shares(prior)
        return _search(self, u, low, high, prior, closeness, self._method(method), seed)

    def bounds(self, **limits) -> tuple[np.ndarray, np.ndarray]:
        """(k,) smallest and (k,) largest shares; those that no run varied stay as they were.

        Args:
            **limits: As `propose` takes them: lower, upper, available, tokens, max_epochs.

        Raises:
            ValueError: A bound that is no share, or bounds that no mixture meets.
        """
        k, names = self.mixtures_.shape[1], [str(name) for name in self.domains_]
        low, high = bounds_of(k, **limits, names=names)
        fixed = ~np.isin(np.arange(k), self._domains)
        low[fixed] = high[fixed] = self.mixtures_[0, fixed]
        if low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
            raise ValueError(
                f"`lower` and `upper` leave no mixture beside {_listed(self.unidentified_)}, whose "
                f"share no run varied: widen them."
            )
        return low, high

    def target_weights(self, objective=None) -> np.ndarray:
        """(m,) weights of sum 1: of the mean, of a single target, or as given.

        Raises:
            ValueError: An unknown name, or weights that are negative or all zero.
        """
        self._check_fitted()
        m = len(self.targets_)
        if objective is None:
            return np.full(m, 1 / m)
        objective = by_name({objective: 1.0} if isinstance(objective, str) else objective)
        if isinstance(objective, dict):
            names = [str(name) for name in self.targets_]
            unknown = [name for name in objective if name not in names]
            if unknown:
                raise ValueError(
                    f"`objective`: no target {_listed(unknown)}; there are {self.targets_}."
                )
            objective = [objective.get(name, 0.0) for name in names]
        weights = np.asarray(objective, dtype=np.float64)
        if weights.shape != (m,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"`objective` must be {m} weights of at least 0, got {objective}.")
        if not weights.sum():
            raise ValueError("`objective`: the weights are all 0; give one of them a weight.")
        return weights / weights.sum()

    def prior_shares(self, prior=None) -> np.ndarray:
        """(k,) shares of a prior; without one, the mean of the runs' mixtures.

        Args:
            prior: (k,) shares, or by name, where those left out are 0.

        Raises:
            ValueError: An unknown name, another number of shares, or shares that are no mixture.
        """
        if prior is None:
            return self.mixtures_.mean(0)
        prior = by_name(prior)
        if isinstance(prior, dict):
            names = [str(name) for name in self.domains_]
            unknown = [name for name in prior if name not in names]
            if unknown:
                raise ValueError(f"`prior`: no domain {_listed(unknown)} among {self.domains_}.")
            prior = [prior.get(name, 0.0) for name in names]
        if len(prior) != len(self.domains_):
            raise ValueError(f"`prior` must be {len(self.domains_)} shares, got {len(prior)}.")
        return check_mixtures(prior, self.domains_, "prior")[0]

    def _method(self, method: str) -> str:
        if method == "auto":
            return "gradient" if self.smooth else "sample"
        if method not in ("gradient", "sample") or (method == "gradient" and not self.smooth):
            raise ValueError(
                f"`method` must be auto, gradient or sample, got {method!r} for "
                f"{type(self).__name__}{'' if self.smooth else ', which has no gradient'}."
            )
        return method

    def _check_fitted(self) -> None:
        if not hasattr(self, "_fitted"):
            raise ValueError(f"{type(self).__name__} is not fitted: call `fit` first.")

    def _check(self, mixtures) -> np.ndarray:
        self._check_fitted()
        X = check_mixtures(mixtures)
        k = self.mixtures_.shape[1]
        if X.shape[1] != k:
            raise ValueError(f"`mixtures` must have {k} domains, got {X.shape[1]}.")
        names = _names(mixtures)
        if names and names != [str(name) for name in self.domains_]:
            raise ValueError(
                f"`mixtures` has the domains {names}, the law was fitted to {self.domains_}."
            )
        unknown = ~np.isin(np.arange(k), self._domains)
        if (np.abs(X - self.mixtures_[0])[:, unknown] > 1e-6).any():
            warnings.warn(
                f"`mixtures` vary {_listed(self.unidentified_)}, which no run behind this law did: "
                f"it takes no account of that.",
                stacklevel=3,
            )
        return X

    def _shaped(self, losses: np.ndarray) -> np.ndarray:
        return losses[:, 0] if self._flat else losses

    def _draws(self, X: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, n, m): by default of laws refitted to runs drawn with replacement."""
        members = np.array([member._predict(X) for member in self._members()])
        return members[rng.integers(len(members), size=count)]

    def _spread(self, X: np.ndarray) -> np.ndarray:
        return np.std([member._predict(X) for member in self._members()], 0)

    def _members(self) -> list["Law"]:
        """Refits, made when first asked for."""
        if getattr(self, "_made", (None,))[0] is not self._problem:
            rng, members = np.random.default_rng(0), []
            X, Y = self._problem
            while len(members) < MEMBERS:
                rows = rng.integers(len(X), size=len(X))
                # Of a draw without a loss of some target, nothing can be fitted
                if np.isnan(Y[rows]).all(0).any() or not np.ptp(X[rows], 0).any():
                    continue
                members.append(clone(self))
                members[-1]._fit(X[rows], Y[rows])
            self._made = (self._problem, members)
        return self._made[1]


def _search(law: Law, u, low, high, prior, closeness: float, method: str, seed: int) -> Found:
    tiny = 1e-12  # a prior of 0 is a large, finite, distance
    anchor = np.log(np.maximum(prior, tiny))

    def value(p):
        found = law._losses(p) @ u
        if closeness:
            found = found + closeness * (p * (np.log(np.maximum(p, tiny)) - anchor)).sum(1)
        return found

    def slope(p):
        found = np.einsum("nmk,m->nk", law._slopes(p), u)
        if closeness:
            found = found + closeness * (np.log(np.maximum(p, tiny)) - anchor + 1)
        return found

    if method == "sample":
        # Drawn in an order that does not depend on how the domains came
        order = canonical_order(law.mixtures_, law.losses_)[1]
        back = np.argsort(order)
        bounds = low[order], high[order], prior[order]
        found = sample_mixture(lambda p: value(p[:, back]), *bounds, seed=seed)
        at = tuple(sorted(order[list(found.at_bounds)].tolist()))
        return replace(found, mixture=found.mixture[back], at_bounds=at)
    observed = np.nan_to_num(law.losses_[:, u > 0], nan=np.inf) @ u[u > 0]
    best = law.mixtures_[np.argsort(observed, kind="stable")[:5]]
    starts = np.vstack([prior, np.full(len(prior), 1 / len(prior)), best])
    return minimize_mixture(value, slope, low, high, starts)


def _names(table) -> list | None:
    columns = getattr(table, "columns", None)
    if columns is None:
        return None
    names = [str(name) for name in columns]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"A table has two columns {_listed(twice)}: name each once.")
    return names


def _listed(names) -> str:
    shown = ", ".join(str(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
