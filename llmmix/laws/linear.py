"""Linear laws: of the loss, of its logarithm, and of its change over a round.

    LinearLaw          L_i(r) = sum_j beta_ij r_j
    LogLinearLaw       log L_i(r) = sum_j beta_ij r_j
    LinearDynamicLaw   L_i^{t+1} - L_i^t = - sum_j A_ij p_j         (Chen et al., 2025, Aioli)

The shares of a mixture sum to one, so an intercept is the same as a number added to every beta_ij.
Where runs are collinear, the first two laws take the slopes of least norm around the mean mixture
of the runs, and the third those of least norm around A = 0.

In directions in which the runs do not differ, the slope is unknown: the predicted spread there is
as wide as the known slopes are large.
"""

from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from llmmix.laws.law import Law, require_runs

RANK = 1e-9  # singular values below this fraction of the largest are rounding errors


class _LeastSquares(Law):
    """Least squares per target on transformed losses, with the covariance in closed form.

        f_i(x) = level_i + slope_i (x - centre_i),      covariance of slope_i = root_i root_i'

    By target, in the order of the fit: centre (m, k), level (m,), slope (m, k) and root (m, k, k).
    """

    centred = True

    @property
    def penalty(self) -> float:
        """Penalty on the squares of the slopes, against the sum of squared residuals."""
        return 0.0

    def fit(self, mixtures: ArrayLike, losses: ArrayLike) -> Self:
        """Fit to finished runs; see `Law.fit`."""
        super().fit(mixtures, losses)
        self._publish()
        return self

    def _fit(self, X, Y):
        k, m = X.shape[1], Y.shape[1]
        if not self.penalty:
            require_runs(self, Y, k, f"has {k} parameters for each target")
        Z = self._transform(Y)
        self._centre, self._level, self._level_sd = np.zeros((m, k)), np.zeros(m), np.zeros(m)
        self._slope, self._root = np.zeros((m, k)), np.zeros((m, k, k))
        noise = np.zeros(m)
        for i in range(m):
            rows = np.isfinite(Z[:, i])
            x, z = X[rows], Z[rows, i]
            if self.centred:
                self._centre[i], self._level[i] = x.mean(0), z.mean()
            x, z = x - self._centre[i], z - self._level[i]
            spent = int(self.centred)
            self._slope[i], self._root[i], sigma, left = _solve(x, z, self.penalty, spent)
            self._level_sd[i] = spent * sigma / np.sqrt(len(x))
            fitted = self._back(self._level[i] + (x @ self._slope[i] if left else 0.0))
            noise[i] = np.sqrt(np.sum((Y[rows, i] - fitted) ** 2) / (left or len(x)))
        return noise

    def _transform(self, Y: np.ndarray) -> np.ndarray:
        return Y

    def _back(self, Z: np.ndarray) -> np.ndarray:
        return Z

    def _steepness(self, Z: np.ndarray) -> np.ndarray | float:
        """Derivative of `_back`."""
        return 1.0

    def _apart(self, X: np.ndarray) -> np.ndarray:
        """(m, n, k) steps from the centres."""
        return X - self._centre[:, None]

    def _value(self, X: np.ndarray) -> np.ndarray:
        """(n, m) transformed losses: the values before `_back`."""
        return self._level + np.einsum("mnk,mk->nm", self._apart(X), self._slope)

    def _predict(self, X):
        return self._back(self._value(X))

    def _gradient(self, X):
        steep = self._steepness(self._value(X)) * np.ones((len(X), len(self._slope)))
        return steep[:, :, None] * self._slope

    def _spread(self, X):
        squares = ((self._apart(X) @ self._root) ** 2).sum(2).T + self._level_sd**2
        return self._steepness(self._value(X)) * np.sqrt(squares)

    def _draws(self, X, count, rng):
        m, k = self._slope.shape
        steps = self._apart(X) @ self._root @ rng.standard_normal((m, k, count))
        levels = self._level_sd * rng.standard_normal((count, 1, m))
        return self._back(self._value(X) + levels + steps.transpose(2, 1, 0))

    def _at_vertices(self) -> tuple[np.ndarray, np.ndarray]:
        """(m, k) coefficients of L = sum_j beta_ij r_j and their errors, in the fit's order."""
        whole = self._problem.mixtures[0].sum()  # the sum that domains that never varied leave
        apart = np.eye(self._slope.shape[1])[None] - self._centre[:, None] / whole
        beta = self._level[:, None] / whole + (apart @ self._slope[:, :, None])[:, :, 0]
        squares = ((apart @ self._root) ** 2).sum(2) + (self._level_sd**2)[:, None] / whole**2
        return beta, np.sqrt(squares)

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """`_at_vertices` in the caller's order; a constant target has equal coefficients."""
        known = np.isin(np.arange(len(self.domains_)), self._domains)
        level = self._transform(np.nanmean(self.losses_, 0))
        whole = self.mixtures_[0, known].sum()
        table = np.where(known, level[:, None] / whole, np.nan)
        errors = np.where(known, np.zeros_like(table), np.nan)
        if len(self._targets):
            places = np.ix_(self._targets, self._domains)
            table[places], errors[places] = self._at_vertices()
        return table, errors

    def _publish(self) -> None:
        self.coefficients_, self.coefficient_errors_ = self._tables()


class LinearLaw(_LeastSquares):
    """L_i(r) = sum_j beta_ij r_j, by least squares for each target, on the runs that have it.

    After `fit`, besides what `Law` lists: coefficients_ (m, k), the beta, of which beta_ij is loss
    i on domain j alone, and coefficient_errors_ (m, k). NaN for domains that no run varied.
    """


class LogLinearLaw(_LeastSquares):
    """log L_i(r) = sum_j beta_ij r_j, by least squares of the logarithm.

    `fit` refuses losses that are not positive. After it, besides what `Law` lists: coefficients_
    and coefficient_errors_ (m, k) of log L.
    """

    def _fit(self, X, Y):
        low = np.flatnonzero(np.nanmin(Y, 0) <= 0)
        if len(low):
            names = [self.targets_[i] for i in self._targets[low]]
            raise ValueError(
                f"`losses` of {', '.join(map(str, names))} are as low as "
                f"{np.nanmin(Y[:, low]):.6g}, and LogLinearLaw takes their logarithm: leave them "
                f"out, or use LinearLaw."
            )
        return super()._fit(X, Y)

    def _transform(self, Y):
        with np.errstate(divide="ignore", invalid="ignore"):  # a constant target may be negative
            return np.log(Y)

    def _back(self, Z):
        return np.exp(Z)

    def _steepness(self, Z):
        return np.exp(Z)


class LinearDynamicLaw(_LeastSquares):
    """L_i^{t+1} - L_i^t = - sum_j A_ij p_j: how far a round on mixture p lowers each loss.

    Fit it to rounds that begin at about the same state; A changes as training goes on.

    Args:
        ridge: Penalty on the squares of A, added to the sum of squared residuals. With a ridge,
            fewer rounds than domains are enough, and what they leave open of A stays near 0.

    After `fit`, besides what `Law` lists: matrix_ (m, k), A by the caller's targets and domains,
    positive where domain j lowers target i; and matrix_errors_ (m, k), its standard errors. Both
    are NaN for domains that no round varied; if such a domain had a share, its effect is spread
    over the others.

    Source: Chen et al., Aioli: a unified optimization framework for language model data mixing,
    ICLR 2025.
    """

    centred = False

    def __init__(self, ridge: float = 0.0):
        self.ridge = ridge

    def fit(self, mixtures: ArrayLike, changes: ArrayLike) -> Self:
        """Fit to rounds.

        Args:
            mixtures: (n, k) shares of the rounds, rows of sum 1.
            changes: (n, m), or (n,) of a single target: loss after the round minus loss before it.

        Raises:
            ValueError: Shares or changes are not valid, `ridge` is below 0, or the rounds are too
                few.
        """
        if not (np.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"`ridge` must be 0 or more, got {self.ridge!r}.")
        return super().fit(mixtures, changes)

    @property
    def penalty(self) -> float:
        """The ridge."""
        return self.ridge

    def _publish(self) -> None:
        table, self.matrix_errors_ = self._tables()
        self.matrix_ = -table

    def _at_vertices(self):
        return self._slope, np.sqrt((self._root**2).sum(2))


def _solve(x: np.ndarray, z: np.ndarray, penalty: float, spent: int) -> tuple:
    """Least squares, min |z - x b|^2 + penalty |b|^2; of least norm where b is not determined.

    Args:
        x: (n, k) design.
        z: (n,) values.
        penalty: Penalty on the squares of b.
        spent: Degrees of freedom that centring took.

    Returns:
        b (k,), a root (k, k) of its covariance, the noise, and the noise's degrees of freedom.
    """
    n, k = x.shape
    # Rows of zeros make Vt square where there are fewer runs than domains
    U, s, Vt = np.linalg.svd(np.vstack([x, np.zeros((max(k - n, 0), k))]), full_matrices=False)
    found = s > RANK * max(s[0], 1e-300)
    gain = np.where(found, s / np.where(found, s**2 + penalty, 1.0), 0.0)
    b = Vt.T @ (gain * (U[:n].T @ z))
    left = n - spent - (gain * s).sum()
    left = left if left > 1e-6 else 0.0
    # Without a degree of freedom left, all variation of the losses may be noise
    noise = np.sqrt(((z - x @ b) ** 2).sum() / left if left else (z**2).mean())
    unknown = noise**2 / penalty if penalty else b @ b / max(found.sum(), 1)
    variance = np.where(found, noise**2 / np.where(found, s**2 + penalty, 1.0), unknown)
    return b, Vt.T * np.sqrt(variance), noise, left
