"""Laws that are planes, and runs of one, to judge."""

import numpy as np

from llmmix.laws.law import Law


class PlaneLaw(Law):
    """Least squares on the shares, with a deviation that is the noise alone."""

    def __init__(self, fewest: int = 0, stuck: bool = False):
        self.fewest = fewest
        self.stuck = stuck

    def _fit(self, X, Y):
        if len(X) < self.fewest:
            raise ValueError(f"PlaneLaw takes {self.fewest} runs, got {len(X)}.")
        self.converged_ = not self.stuck
        self._slopes = []
        for y in Y.T:
            kept = ~np.isnan(y)
            self._slopes.append(np.linalg.lstsq(X[kept], y[kept], rcond=None)[0])
        self._plane = np.array(self._slopes).T
        return np.sqrt(np.nanmean((X @ self._plane - Y) ** 2, 0))

    def _predict(self, X):
        return X @ self._plane

    def _spread(self, X):
        return np.zeros((len(X), self._plane.shape[1]))


class NanLaw(PlaneLaw):
    def _predict(self, X):
        return super()._predict(X) * np.nan


class Nearest(PlaneLaw):
    """What the nearest run had: perfect where a seed of the mixture was fitted to."""

    def _fit(self, X, Y):
        self._X, self._Y = X, Y
        return np.ones(Y.shape[1])

    def _predict(self, X):
        return self._Y[np.abs(X[:, None] - self._X).sum(2).argmin(1)]

    def _spread(self, X):
        return np.zeros((len(X), self._Y.shape[1]))


SLOPES = np.array([[1.0, 3.0], [2.0, 2.5], [4.0, 1.0]])


def plane(n=60, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.dirichlet(np.ones(3), n)
    return X, X @ SLOPES + noise * rng.normal(size=(n, 2))
