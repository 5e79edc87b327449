"""The influence matrix from every step of a run: Bayesian least squares with forgetting.

    drop_i(r) = sum_j A_ij x_j(r) + noise_i      x_j(r): steps' worth of domain j in segment r

Each segment of training is an observation: the mixture that was drawn, and how far each loss fell.
Between two measurements a loss falls little compared with its jitter, so that the draws alone would
give a noisy matrix. A prior helps: a target's loss falls on its own domain, and on others by about
`transfer` times as much. Draws that say otherwise for long enough outweigh it. Losses fall like
powers of time, so the memory grows with the run: a segment counts half once `memory` times the
steps so far have passed since.

llmmix/mixing/aioli.py uses it for `estimator="regression"`.
"""

import numpy as np

VAGUE = 10.0  # prior deviation of a target's own domain, in units of the typical drop


class InfluenceRegression:
    """Recursive least squares for A, with a prior and the covariance of the estimate.

    Args:
        own: (n,) index of each target's own domain; -1 for a target without one.
        domains: Number m of domains.
        memory: Share of the steps so far after which a segment counts half.
        transfer: Prior standard deviation of the effect of another domain on a target, as a share
            of the domains' effects on their own targets. Large: the draws alone decide.
    """

    def __init__(self, own: np.ndarray, domains: int, memory: float, transfer: float):
        self.own, self.memory, self.transfer = np.asarray(own), memory, transfer
        n = len(self.own)
        self.xx = np.zeros((domains, domains))
        self.xy = np.zeros((domains, n))
        self.yy = np.zeros(n)
        self.count = 0.0
        self.seen = 0

    def update(self, shares: np.ndarray, steps: int, drops: np.ndarray, step: int) -> None:
        """Take in a segment.

        Args:
            shares: (m,) share of each domain among the rows drawn.
            steps: Optimizer steps of the segment.
            drops: (n,) loss of each target before the segment minus its loss after it.
            step: Step at which the segment ended.
        """
        kept = 0.5 ** (steps / max(self.memory * step, steps))
        self.seen += 1
        x = shares * steps
        self.xx = kept * self.xx + np.outer(x, x)
        self.xy = kept * self.xy + np.outer(x, drops)
        self.yy = kept * self.yy + drops**2
        self.count = kept * self.count + 1

    def estimate(self) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean (n, m) of A, loss a step, and covariance (n, m, m) of its rows."""
        n, m = len(self.own), len(self.xx)
        spread = np.maximum(self.xx.diagonal(), 1e-12)
        # Fall a step of each target if its own domain explained all of it: the scale of the prior;
        # what it does not explain is the noise
        own = np.where(self.own < 0, 0, self.own)
        alone = np.where(
            self.own < 0,
            self.xy.sum(0) / max(self.xx.sum(), 1e-12),
            self.xy[own, np.arange(n)] / spread[own],
        )
        x_of = np.where(self.own < 0, self.xx.sum(), spread[own])
        rest = np.maximum(self.yy - alone**2 * x_of, 1e-12)
        noise = rest / max(self.count - 1, 1.0)
        scale = max(np.sqrt(np.mean(alone**2)), 1e-12)
        mean, covariance = np.zeros((n, m)), np.zeros((n, m, m))
        for i in range(n):
            deviation = np.full(m, self.transfer * scale)
            if self.own[i] >= 0:
                deviation[self.own[i]] = VAGUE * scale
            else:
                deviation[:] = scale
            precision = self.xx / noise[i] + np.diag(deviation**-2.0)
            covariance[i] = np.linalg.inv(precision)
            mean[i] = covariance[i] @ (self.xy[:, i] / noise[i])
        return mean, covariance

    def state_dict(self) -> dict:
        """The sums so far, as JSON values."""
        return {
            "xx": self.xx.tolist(),
            "xy": self.xy.tolist(),
            "yy": self.yy.tolist(),
            "count": self.count,
            "seen": self.seen,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self.xx, self.xy, self.yy = (np.array(state[name]) for name in ("xx", "xy", "yy"))
        self.count, self.seen = state["count"], state["seen"]


def tilted(weights: np.ndarray, domain: int, tilt: float) -> np.ndarray:
    """(m,) weights with the mass `tilt` moved to one domain; averaged over domains: `weights`."""
    base = np.clip(weights - tilt / len(weights), 0.0, None)
    base *= (1 - tilt) / max(base.sum(), 1e-300)
    base[domain] += tilt
    return base


def advantage(
    weights: np.ndarray, gains: np.ndarray, covariance: np.ndarray, limit: float = 2.0
) -> np.ndarray:
    """How much more each domain helps than the mixture does, shrunk where that is uncertain.

        (excess / gain of the mixture) t^2 / (1 + t^2),      t = excess / its standard error

    The excess is the domain's gain less that of the mixture.

    Args:
        weights: (m,) the mixture.
        gains: (m,) fall of the objective a step on each domain.
        covariance: (m, m) covariance of the gains.
        limit: Bound of the relative excess, on both sides.

    Returns:
        (m,) advantages.
    """
    contrast = np.eye(len(gains)) - weights  # row j: domain j minus the mixture
    excess = contrast @ gains
    error = np.sqrt(np.einsum("ij,jk,ik->i", contrast, covariance, contrast).clip(min=1e-300))
    scale = max(weights @ gains, np.abs(gains).mean(), 1e-300)
    trust = excess**2 / (excess**2 + error**2)
    return np.clip(excess / scale, -limit, limit) * trust
