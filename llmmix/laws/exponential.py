"""The exponential law, Data Mixing Laws (Ye et al., 2024).

    L_i(r) = c_i + exp(log k_i + sum_j t_ij r_j)

The shares sum to one, so a number added to all t_i is a factor of k_i: each target has k + 1
parameters. Where all losses of a target are positive, c_i >= 0 as in the paper; it is free for
other quantities, such as differences of losses.

Each target is fitted by itself, with Huber's loss of the residuals, which is linear beyond `huber`.
Two terms are not in the paper: a ridge on t, and a penalty where a domain alone would be worse than
a ceiling, which is as far above the worst run as that is above the best. Without them, a fit to few
runs reaches a t of hundreds, and the law explodes away from the runs. The ridge alone is not
enough: if it is strong enough to prevent that, it also prevents the steep falls that a target's
loss has in the first percents of its own domain.

The problem has several minima, so it is solved from several c, with the linear fit of log(L - c) as
the start for t; the two best are solved to convergence (`scipy.optimize.least_squares`). Without
the ridge it has many more where runs are few, so the fit with ridge and ceiling is a start too.
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import helmert
from scipy.optimize import least_squares
from scipy.stats import norm

from llmmix.laws.law import Law, require_runs
from llmmix.laws.least_squares import Arrow, Posterior, Prior

RIDGE = 1e-5
LEAST_RIDGE = 1e-10  # keeps the normal matrix invertible where the paper's fit has no solution
NEAREST, FARTHEST = 0.05, 20.0  # starts of c below the smallest loss, in spreads of the losses
FIRST, FINAL = 30, 2  # steps from each start, and number of starts solved to convergence
FAR = 10.0  # spreads from the median beyond which a loss does not raise the ceiling
CAPPED = 4.0  # deviations at which a residual is capped in the noise, as of a run that diverged
NO_SHARED, NO_PRECISION = np.zeros(0), np.zeros((0, 0))


class ExponentialLaw(Law):
    """L_i(r) = c_i + exp(log k_i + sum_j t_ij r_j), the law of Data Mixing Laws.

    min  sum_n Huber(L_i(r_n) - y_ni) / s_i^2 + ridge |t_i|^2 + 1/2 sum_j max(0, over_ij)^2

    s_i is the spread of the losses. over_ij is the logarithm of (loss on domain j alone - c_i) /
    (ceiling - c_i).

    Args:
        huber: Residual, in units of the losses, beyond which it counts linearly. None: least
            squares.
        ridge: Ridge on t. 0: the paper's fit, with neither ridge nor ceiling; no fit with the
            default ridge has a lower sum of Huber's losses, and it takes twice the evaluations.
        starts: Number of values of c to start from.
        max_iter: Largest number of evaluations in each of the last fits.
        tol: Relative fall of the objective at which a fit has converged.

    After `fit`, besides what `Law` lists, by the caller's targets and domains: floor_ (m,), c;
    log_scale_ (m,), log k; exponents_ (m, k), t. NaN for what was not fitted.

    Source: Ye et al., Data mixing laws: optimizing data mixtures by predicting language modeling
    performance, ICLR 2025.
    """

    def __init__(
        self,
        huber: float | None = 0.02,
        ridge: float = RIDGE,
        starts: int = 8,
        max_iter: int = 200,
        tol: float = 1e-6,
    ):
        self.huber = huber
        self.ridge = ridge
        self.starts = starts
        self.max_iter = max_iter
        self.tol = tol

    def _fit(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        if self.huber is not None and not self.huber > 0:
            raise ValueError(f"`huber` must be above 0, or None, got {self.huber!r}.")
        if not (np.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"`ridge` must be 0 or more, got {self.ridge!r}.")
        if self.starts < 1:
            raise ValueError(f"`starts` must be 1 or more, got {self.starts!r}.")
        parameters = X.shape[1] + 1
        require_runs(self, Y, parameters + 1, f"has {parameters} parameters for each target")
        self._centre = X.mean(0)
        vertices = np.eye(X.shape[1]) * X[0].sum() - self._centre
        fits, found = [], []
        for y in Y.T:
            rows = np.isfinite(y)
            problem = X[rows] - self._centre, y[rows], vertices, self
            fits.append(_Target(*problem, self.ridge))
            known = []
            if self.ridge < RIDGE:
                known = [_Target(*problem, RIDGE).solve(self.starts, self.max_iter)[0]]
            found.append(fits[-1].solve(self.starts, self.max_iter, known))
        self._theta = np.array([theta for theta, _, _ in found])
        self._free = np.array([free for _, free, _ in found])
        self.converged_ = all(converged for _, _, converged in found)
        self._room = np.array([fit.ceiling - fit.least for fit in fits])
        noise = self._weigh(X, Y, np.array([fit.precision for fit in fits]))
        self._publish()
        return noise

    def _weigh(self, X: np.ndarray, Y: np.ndarray, precision: np.ndarray) -> np.ndarray:
        """(m,) noise of the runs; sets the posterior."""
        values, J, Js = self._curve(X, True)
        known = np.isfinite(Y.T)
        r = np.where(known, np.nan_to_num(Y.T) - values, 0.0)
        typical = (
            np.array([np.median(np.abs(a[b])) for a, b in zip(r, known, strict=True)]) / 0.6745
        )
        cap = np.where(typical > 0, CAPPED * typical, np.inf)[:, None]
        squares = (np.minimum(np.abs(r), cap) ** 2).sum(1)
        blocks = (J * known[:, :, None]).transpose(0, 2, 1) @ J
        used = np.trace(np.linalg.solve(blocks + precision, blocks), axis1=1, axis2=2)
        # There is a run more than parameters: at least part of a degree of freedom is left
        noise = np.sqrt(squares / np.maximum(known.sum(1) - used, 0.5))
        sigma = np.maximum(noise, 1e-9 * self._room)
        curvature, square = _huber_moments(sigma, self.huber)
        weigh = (curvature / square)[:, None, None]
        prior = Prior(self._theta, precision * weigh, NO_SHARED, NO_PRECISION)
        scale = known * (curvature / np.sqrt(square))[:, None]
        self._posterior = Posterior(Arrow(J, Js, np.ones_like(scale), scale, prior))
        return noise

    def _curve(self, X: np.ndarray, derivatives: bool):
        return _curve(self._theta, (X - self._centre)[None], self._free, derivatives)

    def _publish(self) -> None:
        """Set the fitted attributes in the caller's order."""
        m, k = len(self.targets_), len(self.domains_)
        self.floor_, self.log_scale_ = np.full(m, np.nan), np.full(m, np.nan)
        self.exponents_ = np.full((m, k), np.nan)
        t = self._theta[:, 2:]
        self.floor_[self._targets] = self._theta[:, 0]
        self.log_scale_[self._targets] = self._theta[:, 1] - t @ self._centre
        self.exponents_[np.ix_(self._targets, self._domains)] = t

    def _predict(self, X):
        return self._curve(X, False).T

    def _shrunk(self, J: np.ndarray, Js: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m, n) deviations, capped by the ceiling's height, and the factors that cap them."""
        std = np.sqrt(self._posterior.variance(J, Js))
        by = 1 / np.hypot(1, std / self._room[:, None])
        return std * by, by

    def _spread(self, X):
        _, J, Js = self._curve(X, True)
        return self._shrunk(J, Js)[0].T

    def _draws(self, X, count, rng):
        values, J, Js = self._curve(X, True)
        drawn = self._posterior.draws(J, Js, count, rng) * self._shrunk(J, Js)[1]
        return (values + drawn).transpose(0, 2, 1)

    def _gradient(self, X):
        e = self._curve(X, False) - self._theta[:, :1]
        return e.T[:, :, None] * self._theta[:, 2:]


class _Target:
    """The fit of one target: x (n, k) and `vertices` (k, k) minus the centre, y (n,) losses."""

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        vertices: np.ndarray,
        law: ExponentialLaw,
        ridge: float,
    ):
        k = x.shape[1]
        # A number added to all t changes only the ridge, which is smallest where t sums to 0: the
        # fit has k - 1 numbers for such t
        self.basis = helmert(k)
        self.x, self.y, self.tol = x @ self.basis.T, y, law.tol
        self.bounded = y.min() > 0
        self.spread = _spread_of(y)
        self.least = np.quantile(y, 0.02)
        top = min(y.max(), np.median(y) + FAR * self.spread)
        self.ceiling = top + (top - self.least)
        ridges = np.array([LEAST_RIDGE] * 2 + [max(ridge, LEAST_RIDGE)] * k)
        self.precision = np.diag(2 * self.spread**2 * ridges)
        self.root = np.sqrt(2 * ridges[:-1])
        self.vertices = (vertices if ridge else vertices[:0]) @ self.basis.T
        self.bend = np.inf if law.huber is None else law.huber / self.spread

    def solve(
        self, starts: int, steps: int, known: Sequence[np.ndarray] = ()
    ) -> tuple[np.ndarray, bool, bool]:
        """The parameters (2 + k,), whether c is free, and whether the fit converged.

        `known` are parameters to start from too.
        """
        tried = [self._descend(theta, FIRST) for theta in self._starts(starts)]
        tried.sort(key=lambda found: found[0])
        begun = [found[1] for found in tried[:FINAL]]
        begun += [np.append(theta[:2], self.basis @ theta[2:]) for theta in known]
        tried = [self._descend(theta, steps) for theta in begun]
        _, theta, free, converged = min(tried, key=lambda found: found[0])
        return np.append(theta[:2], theta[2:] @ self.basis), free, converged

    def _starts(self, count: int) -> list[np.ndarray]:
        """Starts: c below the smallest loss, at several gaps; log k and t by fitting log(y - c)."""
        gaps = self.spread * np.geomspace(NEAREST, FARTHEST, count)
        gaps = np.unique(np.minimum(gaps, self.least) if self.bounded else gaps)
        root = np.diag(self.spread * self.root[1:])
        starts = []
        for gap in gaps:
            e = np.maximum(self.y - self.least + gap, gap / 2)
            w = np.minimum(e, 10 * np.median(e))  # an error of y is one of e log e
            A = np.column_stack([np.ones_like(e), self.x]) * w[:, None]
            b = np.append(w * np.log(e), np.zeros(len(root)))
            t = np.linalg.lstsq(np.vstack([A, root]), b, rcond=None)[0]
            starts.append(np.append(self.least - gap, t))
        return starts

    def _descend(self, theta: np.ndarray, steps: int) -> tuple[float, np.ndarray, bool, bool]:
        """The objective, the parameters, whether c is free, and whether the fit converged."""
        least = np.full(len(theta), -np.inf)
        least[0] = 0.0 if self.bounded else -np.inf
        mean = np.append(theta[:2], np.zeros(len(theta) - 2))
        found = least_squares(
            lambda theta: self._residuals(theta, mean),
            np.maximum(theta, least),
            self._derivatives,
            bounds=(least, np.inf),
            method="dogbox",  # the one that can end on the bound c = 0
            x_scale="jac",
            loss=self._rho,
            ftol=self.tol,
            gtol=None,
            max_nfev=steps,
        )
        return found.cost, found.x, found.x[0] > least[0], found.status > 0

    def _rho(self, squares: np.ndarray) -> np.ndarray:
        """Huber's loss of the runs' squared residuals, and the squares of all others."""
        rho = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
        far = np.flatnonzero(squares[: len(self.y)] > self.bend**2)
        z = squares[far]
        root = np.sqrt(z)
        rho[:, far] = (
            (2 * root - self.bend) * self.bend,
            self.bend / root,
            -0.5 * self.bend / (root * z),
        )
        return rho

    def _over(self, theta: np.ndarray) -> tuple[np.ndarray, float]:
        """Log of each vertex's height above c over the ceiling's, and the ceiling's height."""
        room = max(self.ceiling - theta[0], 1e-3 * self.spread)
        return theta[1] + self.vertices @ theta[2:] - np.log(room), room

    def _residuals(self, theta: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Residuals of the runs in spreads, of the vertices above the ceiling, and of the ridge."""
        with np.errstate(over="ignore"):
            runs = theta[0] + np.exp(theta[1] + self.x @ theta[2:]) - self.y
        above = np.maximum(self._over(theta)[0], 0)
        return np.concatenate([runs / self.spread, above, self.root * (theta - mean)])

    def _derivatives(self, theta: np.ndarray) -> np.ndarray:
        e = np.exp(theta[1] + self.x @ theta[2:])[:, None]
        over, room = self._over(theta)
        runs = np.hstack([np.ones_like(e), e, e * self.x]) / self.spread
        above = np.column_stack([np.full_like(over, 1 / room), np.ones_like(over), self.vertices])
        return np.vstack([runs, above * (over > 0)[:, None], np.diag(self.root)])


def _curve(theta: np.ndarray, x: np.ndarray, free: np.ndarray, derivatives: bool):
    """Values (m, n) of theta (m, 2 + k), c, log k and t, at x (1, n, k) about the centre.

    With derivatives: also those (m, n, 2 + k), 0 for a c that is not `free` (m,), and (m, n, 0).
    """
    e = np.exp(theta[:, 1:2] + (x @ theta[:, 2:, None])[:, :, 0])
    values = theta[:, :1] + e
    if not derivatives:
        return values
    J = np.empty((*e.shape, theta.shape[1]))
    J[:, :, 0] = free[:, None]
    J[:, :, 1] = e
    J[:, :, 2:] = e[:, :, None] * x
    return values, J, np.zeros((*e.shape, 0))


def _spread_of(y: np.ndarray) -> float:
    """Standard deviation of losses, robust against a few outliers."""
    low, high = np.quantile(y, norm.cdf([-1, 1]))
    return (high - low) / 2 if high - low > 1e-3 * np.ptp(y) else float(np.std(y))


def _huber_moments(sigma: np.ndarray, huber: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean curvature of Huber's loss, and mean square of its slope, under noise of sigma (m,).

    An M-estimator's covariance is square / curvature^2 (J'J)^-1.
    """
    if huber is None:
        return np.ones_like(sigma), sigma**2
    u = huber / sigma
    inside = 2 * norm.cdf(u) - 1
    return inside, sigma**2 * (inside - 2 * u * norm.pdf(u) + u**2 * (1 - inside))
