"""`GradientBoostedLaw`: boosted trees, as RegMix (Liu et al., 2025) fits them to many small runs.

RegMix uses LightGBM; scikit-learn's histogram-based booster is the same algorithm and needs no
other package. Trees are piecewise constant: they have no gradient, and no trend beyond the runs.

The uncertainty comes from members that leave out a fifth of the runs each, with fewer and larger
boosting steps. The errors of members at the runs they left out give the noise, and the differences
between members (the jackknife over groups) the spread. Training residuals are of no use, since
boosting drives them towards zero.
"""

from collections.abc import Sequence

import numpy as np
from joblib import Parallel, delayed
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from llmmix.laws.law import Law, require_runs

FOLDS = 5
MEMBER_RATE = 0.2  # smallest learning rate of a member
LEAST_LEAF, LEAF_SHARE = 2, 10  # a leaf needs a tenth of the runs, and two at least
LEAST_NOISE = 0.25  # smallest fraction of the squared error at runs left out that is noise


class GradientBoostedLaw(Law):
    """Gradient-boosted regression trees for each target, squared error.

    Args:
        n_estimators: Number of trees.
        learning_rate: Weight of each tree.
        max_leaf_nodes: Largest number of leaves of a tree.
        min_samples_leaf: Smallest number of runs in a leaf. With fewer than 10 times as many runs,
            it is a tenth of the runs, at least 2; otherwise no tree could split 32 runs.
        seed: Seed of the groups of runs that are left out.
        n_jobs: Number of processes over which the targets are spread; -1 for one a core. A second
            thread within a tree makes hundreds of runs slower.

    There is no early stopping, so no test runs are looked at.

    Source: Liu et al., RegMix: data mixture as regression for language model pre-training,
    ICLR 2025.
    """

    smooth = False

    def __init__(
        self,
        n_estimators: int = 1000,
        learning_rate: float = 0.01,
        max_leaf_nodes: int = 31,
        min_samples_leaf: int = 20,
        seed: int = 0,
        n_jobs: int | None = None,
    ):
        self.n_estimators = n_estimators
        self.learning_rate = learning_rate
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.seed = seed
        self.n_jobs = n_jobs

    def _fit(self, X, Y):
        require_runs(self, Y, 2 * LEAST_LEAF, f"splits runs into leaves of {LEAST_LEAF} at least")
        fold = self._folds(X)
        with threadpool_limits(1):
            jobs = (delayed(self._target)(X, y, fold) for y in Y.T)
            trees, members = zip(*Parallel(self.n_jobs)(jobs), strict=True)
        self._trees, self._left = list(trees), list(zip(*members, strict=True))
        left_out = np.full(Y.shape, np.nan)
        for f, member in enumerate(self._left):
            left_out[fold == f] = _values(member, X[fold == f])
        squares = np.nanmean((left_out - Y) ** 2, 0)
        # A target with losses in one group alone has no error at runs left out
        squares = np.where(np.isnan(squares), np.nanvar(Y, 0), squares)
        # These errors include the members' own uncertainty, which the spread counts already
        unknown = np.mean(self._spread(X) ** 2, 0)
        return np.sqrt(np.maximum(squares - unknown, LEAST_NOISE * squares))

    def _target(self, X, y, fold) -> tuple:
        """The trees of a target, and the members without each group of runs."""
        rate = max(self.learning_rate, MEMBER_RATE)
        count = max(1, round(self.n_estimators * self.learning_rate / rate))
        groups = [fold != f for f in range(fold.max() + 1)]
        members = [self._boosted(X[kept], y[kept], count, rate) for kept in groups]
        return self._boosted(X, y, self.n_estimators, self.learning_rate), members

    def _folds(self, X: np.ndarray) -> np.ndarray:
        """(n,) group of each run; runs of the same mixture are left out together."""
        _, mixture = np.unique(X, axis=0, return_inverse=True)
        count = mixture.max() + 1
        rng = np.random.default_rng(self.seed)
        return (rng.permutation(count) % min(FOLDS, count))[mixture.reshape(-1)]

    def _boosted(self, X, y, count: int, rate: float):
        known = np.isfinite(y)
        n = int(known.sum())
        if not n or not np.ptp(y[known]):
            return float(y[known].mean()) if n else np.nan
        leaf = min(self.min_samples_leaf, max(LEAST_LEAF, n // LEAF_SHARE))
        trees = HistGradientBoostingRegressor(
            max_iter=count,
            learning_rate=rate,
            max_leaf_nodes=self.max_leaf_nodes,
            min_samples_leaf=leaf,
            early_stopping=False,
            random_state=self.seed,
        )
        return trees.fit(X[known], y[known])

    def _predict(self, X):
        return _values(self._trees, X)

    def _deviations(self, X: np.ndarray) -> np.ndarray:
        """(FOLDS, n, m) deviations from the mean of the members, times the jackknife's factor."""
        values = np.array([_values(member, X) for member in self._left])
        return np.sqrt(1 - 1 / len(values)) * (values - np.nanmean(values, 0))

    def _spread(self, X):
        return np.sqrt(np.nansum(self._deviations(X) ** 2, 0))

    def _draws(self, X, count, rng):
        apart = np.nan_to_num(self._deviations(X))
        steps = rng.standard_normal((count, len(apart)))
        return self._predict(X) + np.einsum("cf,fnm->cnm", steps, apart)


def _values(members: Sequence, X: np.ndarray) -> np.ndarray:
    """(n, m) predictions of a regressor, or a constant, for each target."""
    columns = [
        np.full(len(X), one) if isinstance(one, float) else one.predict(X) for one in members
    ]
    return np.column_stack(columns)
