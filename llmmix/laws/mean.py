"""`MeanLaw`, the baseline: it predicts the mean loss for every mixture."""

import numpy as np

from llmmix.laws.law import Law


class MeanLaw(Law):
    """Predicts the mean loss for every mixture: the baseline that a law must beat."""

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
