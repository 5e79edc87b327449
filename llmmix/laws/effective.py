"""The effective-data law: a power law in the amount of useful data that a mixture gives a target.

    L_i(r) = E_i + sum_q A_iq (1 + sum_j v_iqj r_j^a_qj)^-b_iq

    symbol   meaning                                              in `EffectiveDataLaw`
    E_i      floor of the loss                                    (m,)
    A_iq     most that component q adds, A > 0                    (m, K)
    v_iqj    worth of domain j to target i, v > 0                 (m, K, k)
    a_qj     returns of domain j: below 1 they diminish           (K, k), shared by all targets
    b_iq     power, b > 0                                         (m, K)

This is a power law of data (Kaplan et al., 2020) in which each target has weights of its own for
the domains' data. Dividing s out of B (s + sum_j w_j r_j^a)^-b leaves A = B s^-b and v = w / s. All
parameters but E are an exponential or softplus of free numbers, so they stay in range, and a loss
lies between E and E + sum_q A for any mixture.

Fit: maximum a posteriori from one deterministic start, with losses in units of their target's
standard deviation; another start may find a slightly higher maximum. The prior says what such
curves usually look like, so that a fit to fewer runs than parameters still predicts. The noise of
the runs decides their weight against the prior; it is estimated from the errors at runs left out
(to first order, from the leverages), and the fit is repeated with it, `ROUNDS` times. Runs that a
robust fit leaves far off in most targets, such as one that diverged, are set aside first.
"""

import numpy as np
from scipy.linalg import block_diag
from scipy.special import expit

from llmmix.laws.law import Law
from llmmix.laws.least_squares import Arrow, Posterior, Prior, Residuals, levenberg_marquardt

ROUNDS = 4  # rounds of fitting and estimating the noise
NOISE, NOISE_RUNS = 0.1, 8  # prior of the noise, in deviations of the losses; its weight in runs
LEAST, MOST = 0.01, 0.6  # bounds of the noise
HUBER, OUTLIER = 4.0, 10.0  # bend and outlier threshold of the robust fit, in units of the noise
ROUGH = 25  # steps in each of the two rounds of the robust fit
REACH = 2.5  # spread of a target's losses, in interquartile ranges
GROSS = 8.0  # spreads beyond which a loss means that its run diverged

# Means and standard deviations of the prior, with losses in units of their deviation
FLOOR, FLOOR_SD = -1.0, 1.5  # E, relative to the smallest loss
TOP, TOP_SD = np.log(1.5), 0.7  # log of sum A, relative to the largest loss minus E
POWER, POWER_SD = -0.5, 1.0  # softplus^-1 b
WORTH, WORTH_SD, WORTH_APART = -1.5, 1.5, 2.0  # log v: mean, its deviation, that between domains
RETURNS = {1: (0.0,), 2: (-1.0, 1.0), 3: (-1.0, 0.0, 1.0)}  # softplus^-1 a, by component
RETURNS_SD, RETURNS_APART = 1.0, 0.75


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def _together(k: int, mean_sd: float, apart: float) -> np.ndarray:
    """(k, k) precision of numbers with deviation `apart` around a mean of deviation `mean_sd`."""
    return np.linalg.inv(apart**2 * np.eye(k) + mean_sd**2)


def _sparing(far: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """(n,) `far` without the runs that have the only losses of a target."""
    alone = np.isnan(np.where(far[:, None], np.nan, Y)).all(0)
    return far & np.isnan(Y[:, alone]).all(1)


class EffectiveDataLaw(Law):
    """The effective-data law; see the module's equation.

    Args:
        components: K, 1 to 3. Two describe a target with a domain of its own, whose first percent
            helps most, and other domains that help a little.
        max_iter: Largest number of steps of a fit in each round.
        tol: Relative fall of the objective at which a fit has converged.

    After `fit`, besides what `Law` lists, by the caller's targets and domains: floor_ (m,), top_
    (m, K), power_ (m, K), worth_ (m, K, k) and returns_ (K, k); NaN for what was not fitted.
    """

    def __init__(self, components: int = 2, max_iter: int = 100, tol: float = 1e-6):
        self.components = components
        self.max_iter = max_iter
        self.tol = tol

    def _fit(self, X, Y):
        if not isinstance(self.components, int) or self.components not in RETURNS:
            raise ValueError(f"`components` must be 1, 2 or 3, got {self.components!r}.")
        far = self._far_off(X, Y)
        self._aside = far
        Y = np.where(far[:, None], np.nan, Y)
        self._mean, self._sd = np.nanmean(Y, 0), np.nanstd(Y, 0)
        self._sd = np.where(self._sd > 0, self._sd, 1.0)  # a resampled target may not move
        Z = (Y - self._mean) / self._sd
        self._map(X, Z, self._prior_of(Z, X.shape[1]), ROUNDS, None, self.max_iter)
        self._publish()
        return self._noise * self._sd

    def _far_off(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """(n,) which runs a robust fit leaves far off in most of their targets.

        Far off in one target is no outlier: a run without the target's own domain is so rightly.
        """
        quarters = np.nanquantile(Y, [0.25, 0.75], axis=0)
        low, reach = quarters[0], REACH * np.ptp(quarters, axis=0)
        reach = np.where(reach > 0, reach, np.nanmax(Y, 0) - np.nanmin(Y, 0))
        Z = (Y - low) / np.where(reach > 0, reach, 1.0)
        gross = _sparing(np.nanmedian(Z, 1) > GROSS, Y)
        Z[gross] = np.nan
        self._map(X, Z, self._prior_of(Z.clip(-1, 2), X.shape[1]), 2, HUBER, ROUGH)
        errors = np.abs(self._values - Z)
        far = np.minimum(errors / (OUTLIER * self._sigma), errors / 0.5)
        far = gross | (np.nanmedian(np.where(np.isnan(far), 0, far), 1) > 1)
        return _sparing(far, Y)

    def _map(self, X, Z, prior: Prior, rounds: int, huber: float | None, steps: int):
        """Maximum a posteriori, with the noise estimated from the errors at runs left out."""

        def curve(theta, shared, derivatives):
            return self._curve(theta, shared, X, derivatives)

        theta, shared = prior.theta, prior.shared
        self._sigma = np.full(Z.shape[1], NOISE)
        for turn in range(rounds):
            residuals = Residuals(Z, self._sigma, huber)
            theta, shared, _, self.converged_ = levenberg_marquardt(
                curve, theta, shared, residuals, prior, max_iter=steps, tol=self.tol
            )
            values, J, Js = curve(theta, shared, True)
            _, r, weights = residuals(values)
            self._posterior = Posterior(Arrow(J, Js, weights, residuals.scale, prior))
            used = self._posterior.variance(J, Js) * weights * residuals.scale**2
            kept = 1 - np.minimum(used, 0.95)
            errors = (r * weights * self._sigma[:, None]) ** 2  # no larger than Huber's bend
            known = NOISE_RUNS * NOISE**2, NOISE_RUNS + (residuals.scale > 0).sum(1)
            self._noise = np.sqrt((known[0] + (errors / kept).sum(1)) / known[1])
            left_out = np.sqrt((known[0] + (errors / kept**2).sum(1)) / known[1])
            if turn < rounds - 1:
                self._sigma = left_out.clip(LEAST, MOST)
        self._theta, self._shared, self._values = theta, shared, values.T

    def _prior_of(self, Z: np.ndarray, k: int) -> Prior:
        m, K = Z.shape[1], self.components
        low, high = np.nanmin(Z, 0), np.nanmax(Z, 0)
        theta = np.empty((m, 1 + 2 * K + K * k))
        theta[:, 0] = low + FLOOR
        theta[:, 1 : 1 + K] = (np.log(high - theta[:, 0]) + TOP - np.log(K))[:, None]
        theta[:, 1 + K : 1 + 2 * K] = POWER
        theta[:, 1 + 2 * K :] = WORTH
        own = np.diag(np.array([FLOOR_SD] + K * [TOP_SD] + K * [POWER_SD]) ** -2.0)
        worth = np.kron(np.eye(K), _together(k, WORTH_SD, WORTH_APART))
        precision = block_diag(own, worth)
        returns = np.kron(np.eye(K), _together(k, RETURNS_SD, RETURNS_APART))
        return Prior(theta, precision, np.repeat(RETURNS[K], k).astype(float), returns)

    def _parts(self, theta, shared):
        m, K = len(theta), self.components
        worth = np.exp(theta[:, 1 + 2 * K :].reshape(m, K, -1))
        returns = shared.reshape(K, -1)
        return theta[:, 0], theta[:, 1 : 1 + K], theta[:, 1 + K : 1 + 2 * K], worth, returns

    def _terms(self, theta, shared, X):
        """The terms of which the value and its derivatives are made."""
        floor, log_top, power, worth, returns = self._parts(theta, shared)
        a, b = _softplus(returns), _softplus(power)
        log_x = np.log(np.where(X > 0, X, 1.0))
        amounts = np.where(X > 0, np.exp(a[:, None] * log_x), 0.0)  # (K, n, k)
        u = 1 + worth.transpose(1, 0, 2) @ amounts.transpose(0, 2, 1)  # (K, m, n)
        log_u = np.log(u)
        term = np.exp(log_top.T[:, :, None] - b.T[:, :, None] * log_u)
        pull = -b.T[:, :, None] * term / u  # d term / d u
        return floor[:, None] + term.sum(0), log_x, amounts, log_u, term, pull

    def _curve(self, theta, shared, X, derivatives: bool):
        values, log_x, amounts, log_u, term, pull = self._terms(theta, shared, X)
        if not derivatives:
            return values
        _, _, power, worth, returns = self._parts(theta, shared)
        (m, n), K = values.shape, self.components
        J = np.empty((m, n, theta.shape[1]))
        J[:, :, 0] = 1
        J[:, :, 1 : 1 + K] = term.transpose(1, 2, 0)
        slope = -term * log_u * expit(power).T[:, :, None]
        J[:, :, 1 + K : 1 + 2 * K] = slope.transpose(1, 2, 0)
        by_worth = (pull[..., None] * amounts[:, None]) * worth.transpose(1, 0, 2)[:, :, None]
        J[:, :, 1 + 2 * K :] = by_worth.transpose(1, 2, 0, 3).reshape(m, n, -1)
        by_returns = by_worth * log_x * expit(returns)[:, None, None]
        return values, J, by_returns.transpose(1, 2, 0, 3).reshape(m, n, -1)

    def _publish(self) -> None:
        """Set the fitted attributes, in units of the losses and in the caller's order."""
        floor, log_top, power, worth, returns = self._parts(self._theta, self._shared)
        m, k, K = len(self.targets_), len(self.domains_), self.components
        rows, columns = self._targets, self._domains
        self.floor_, self.top_ = np.full(m, np.nan), np.full((m, K), np.nan)
        self.power_, self.worth_ = np.full((m, K), np.nan), np.full((m, K, k), np.nan)
        self.returns_ = np.full((K, k), np.nan)
        self.floor_[rows] = self._mean + self._sd * floor
        self.top_[rows] = np.exp(log_top) * self._sd[:, None]
        self.power_[rows] = _softplus(power)
        self.worth_[np.ix_(rows, np.arange(K), columns)] = worth
        self.returns_[:, columns] = _softplus(returns)

    def _predict(self, X):
        return self._mean + self._sd * self._curve(self._theta, self._shared, X, False).T

    def _spread(self, X):
        _, J, Js = self._curve(self._theta, self._shared, X, True)
        return np.sqrt(self._posterior.variance(J, Js)).T * self._sd

    def _draws(self, X, count, rng):
        values, J, Js = self._curve(self._theta, self._shared, X, True)
        drawn = values + self._posterior.draws(J, Js, count, rng)
        return self._mean + self._sd * drawn.transpose(0, 2, 1)

    def _gradient(self, X):
        X = np.maximum(X, 1e-12)  # where a < 1 the slope at 0 is infinite
        _, _, amounts, _, _, pull = self._terms(self._theta, self._shared, X)
        worth, a = self._parts(self._theta, self._shared)[3], _softplus(self._shared)
        a = a.reshape(self.components, -1)
        slope = a[:, None] * amounts / X  # (K, n, k)
        found = np.einsum("qmn,mqk,qnk->nmk", pull, worth, slope, optimize=True)
        return found * self._sd[:, None]
