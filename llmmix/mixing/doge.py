"""DoGE: more of the domains whose gradients agree with those of the targets.

    w_t ~ w_(t-1) exp(score / mu),      then (1 - c) w_t + c / m
    score_j = lr sum_i <g_j, g_i> / (mean |g| + 1e-6),      within [lr dw_min, lr dw_max]

    symbol   name               symbol   name
    m        names              <>, |g|  the signal `gradients`
    c        smoothing          mu       mu

The answer is the average of the weights over the proxy's run (llmmix/mixing/proxies.py).

Weak where: the targets are the domains themselves, and a domain's gradient is also compared with
itself, on the same few rows, so that noise raises a score as use does. With the published bound of
0 a domain that harms is no worse off than a useless one; scores scale with the learning rate, and
weights freeze as it decays. Each gradient is clipped first; where norms still exceed `dw_max`, all
scores sit at the bound and nothing moves: raise it. Each update costs m backward passes and holds m
gradients.

Source: Fan et al., "DoGE: Domain Reweighting with Generalization Estimation" (arXiv:2310.15393).
Recipe: recipes/aioli.py.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmmix.mixing.checks import require, require_whole
from llmmix.mixing.controllers import Observation
from llmmix.mixing.proxies import AveragedController, ProxyCallback
from llmmix.mixing.sampler import MixtureSampler


def doge_scores(
    products: np.ndarray,
    norms: np.ndarray,
    learning_rate: float,
    dw_min: float = 0.0,
    dw_max: float = 5.0,
) -> np.ndarray:
    """DoGE's score_j = lr sum_i <g_j, g_i> / (mean |g| + 1e-6), within [lr dw_min, lr dw_max].

    With the published bound of 0 below, a domain that harms the targets scores as one that is
    useless. The bounds shrink with the rate: as it decays the weights freeze.

    Args:
        products: (m, n) inner products of the domains' gradients with the targets'.
        norms: (m,) norms of the domains' gradients.
        learning_rate: Learning rate of the step.
        dw_min: Least score, in learning rates.
        dw_max: Largest score, in learning rates.

    Returns:
        (m,).
    """
    scores = learning_rate * products.sum(1) / (norms.mean() + 1e-6)
    return np.clip(scores, learning_rate * dw_min, learning_rate * dw_max)


@dataclass
class DoGEConfig:
    """Options of `DoGE`; the defaults are those of its release, but for `max_grad_norm`.

    Raises:
        ValueError: An option is out of its range.
    """

    mu: float = field(
        default=0.05,
        metadata={"help": "Temperature mu of a step; smaller is spikier (its scripts: 0.01)."},
    )
    smoothing: float = field(
        default=0.0, metadata={"help": "Share c that is spread evenly at each step."}
    )
    dw_min: float = field(default=0.0, metadata={"help": "Least score, in learning rates."})
    dw_max: float = field(default=5.0, metadata={"help": "Largest score, in learning rates."})
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Norm to which each gradient is clipped (the release: 5)."},
    )
    interval: int = field(default=1, metadata={"help": "Steps between updates."})

    def __post_init__(self) -> None:
        require(0 < self.mu < math.inf, "mu", "be positive", self.mu)
        require(0 <= self.smoothing < 1, "smoothing", "lie in [0, 1)", self.smoothing)
        require(self.dw_min < self.dw_max, "dw_max", f"exceed dw_min={self.dw_min}", self.dw_max)
        require_whole("interval", self.interval)


class DoGE(AveragedController):
    """A proxy's weights rise where a domain's gradient agrees with the targets'.

    `average` is what the final model is trained on. The learning rate of a score is the mean over
    the steps since the last update.

    Args:
        config: Options of the method.
        names: Names of the m domains.
        targets: Not needed: what the gradients are compared with is the measurement's choice.
        weights: (m,) first weights.

    Attributes:
        average: (m,) the answer.
    """

    method = "DoGE"
    measure = "gradients"
    config: DoGEConfig

    def observe(self, observation: Observation) -> None:
        """Raise the weights by the scores; they stand if a signal is not finite or all are zero."""
        products = np.asarray(observation.signal["products"], dtype=np.float64)
        products = self.read(observation, "products", len(self.names), *products.shape[-1:])
        norms = self.read(observation, "norms", len(self.names))
        rate = observation.learning_rate / observation.steps
        finite = np.isfinite(products).all() and np.isfinite(norms).all() and math.isfinite(rate)
        self.skipped += not finite
        gains = None
        if finite and products.any():
            config = self.config
            # As if each gradient had been clipped before
            kept = np.minimum(1.0, config.max_grad_norm / np.maximum(norms, 1e-12))
            if products.shape[1] == len(kept):
                products = products * kept[None]
            products, norms = products * kept[:, None], norms * kept
            gains = doge_scores(products, norms, rate, config.dw_min, config.dw_max) / config.mu
        self.update(gains, observation.steps)


class DoGECallback(ProxyCallback):
    """Moves a sampler's weights by DoGE while a trainer runs a proxy.

    The targets are the domains themselves: gradients are of training rows, as many of each domain
    as a step has, drawn anew for each update. Parameters must be whole on every process.

    Args:
        sampler: Sampler of the trainer's rows; its weights are the first ones.
        config: Options of DoGE.
        options: Keyword arguments of `MixtureCallback`.

    Attributes:
        average: The answer, by domain; printed when training ends.
    """

    def __init__(self, sampler: MixtureSampler, config: DoGEConfig | None = None, **options: Any):
        config = DoGEConfig() if config is None else config
        super().__init__(sampler, functools.partial(DoGE, config), **options)
