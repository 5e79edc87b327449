"""DoGE: more of the domains whose gradients agree with those of the targets.

    w_t ~ w_(t-1) exp(score / mu),      then (1 - c) w_t + c / m
    score_j = lr sum_i <g_j, g_i> / (mean |g| + 1e-6),      within [lr dw_min, lr dw_max]

    symbol   name               symbol   name
    m        names              <>, |g|  the signal `gradients`
    c        smoothing          mu       mu

The final model is trained on the average of these weights over the proxy's run
(llmmix/mixing/proxies.py).

Where it is weak: the targets are the domains themselves, so a domain's gradient is also compared
with itself on the same few rows, and noise raises its score as much as usefulness does. With the
published bound of 0, a harmful domain scores no lower than a useless one. Scores scale with the
learning rate, so the weights freeze as it decays. Each gradient is clipped first; where norms still
exceed `dw_max`, all scores sit at the bound and nothing moves: raise it. Each update costs m
backward passes and holds m gradients in memory.

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

    With the published lower bound of 0, a domain that harms the targets scores like a useless one.
    The bounds shrink with the learning rate: as it decays, the weights freeze.

    Args:
        products: (m, n) inner products of the domains' gradients with the targets'.
        norms: (m,) norms of the domains' gradients.
        learning_rate: Learning rate of the step.
        dw_min: Smallest score, as a multiple of the learning rate.
        dw_max: Largest score, as a multiple of the learning rate.

    Returns:
        (m,) scores.
    """
    scores = learning_rate * products.sum(1) / (norms.mean() + 1e-6)
    return np.clip(scores, learning_rate * dw_min, learning_rate * dw_max)


@dataclass
class DoGEConfig:
    """Options of `DoGE`. The defaults are those of its release, except `max_grad_norm`.

    Raises:
        ValueError: An option is out of its range.
    """

    mu: float = field(
        default=0.05,
        metadata={
            "help": "Temperature mu of an update; smaller is spikier (the release's scripts: 0.01)."
        },
    )
    smoothing: float = field(
        default=0.0,
        metadata={"help": "Share c of the mixture that is spread evenly at each update."},
    )
    dw_min: float = field(
        default=0.0, metadata={"help": "Smallest score, as a multiple of the learning rate."}
    )
    dw_max: float = field(
        default=5.0, metadata={"help": "Largest score, as a multiple of the learning rate."}
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Norm to which each gradient is clipped (in the release: 5)."},
    )
    interval: int = field(default=1, metadata={"help": "Steps between updates."})

    def __post_init__(self) -> None:
        require(0 < self.mu < math.inf, "mu", "be positive", self.mu)
        require(0 <= self.smoothing < 1, "smoothing", "lie in [0, 1)", self.smoothing)
        require(self.dw_min < self.dw_max, "dw_max", f"exceed dw_min={self.dw_min}", self.dw_max)
        require(self.max_grad_norm > 0, "max_grad_norm", "be positive", self.max_grad_norm)
        require_whole("interval", self.interval)


class DoGE(AveragedController):
    """Raises a proxy's weight of each domain whose gradient agrees with those of the targets.

    The final model is trained on `average`. Scores take the mean learning rate of the steps since
    the last update.

    Args:
        config: Options of the method.
        names: Names of the m domains.
        targets: Not used: the measurement decides which gradients are compared.
        weights: (m,) first weights.

    Attributes:
        average: (m,) mean of the weights over the steps.
    """

    method = "DoGE"
    measure = "gradients"
    config: DoGEConfig

    def observe(self, observation: Observation) -> None:
        """Raise the weights by the scores; keep them if a signal is not finite or all are zero."""
        products = np.asarray(observation.signal["products"], dtype=np.float64)
        products = self.read(observation, "products", len(self.names), *products.shape[-1:])
        norms = self.read(observation, "norms", len(self.names))
        rate = observation.learning_rate / observation.steps
        finite = np.isfinite(products).all() and np.isfinite(norms).all() and math.isfinite(rate)
        self.skipped += not finite
        gains = None
        if finite and products.any():
            config = self.config
            # The same as clipping each gradient beforehand
            kept = np.minimum(1.0, config.max_grad_norm / np.maximum(norms, 1e-12))
            if products.shape[1] == len(kept):
                products = products * kept[None]
            products, norms = products * kept[:, None], norms * kept
            gains = doge_scores(products, norms, rate, config.dw_min, config.dw_max) / config.mu
        self.update(gains, observation.steps)


class DoGECallback(ProxyCallback):
    """Moves a sampler's weights by DoGE while a trainer runs a proxy.

    The targets are the domains themselves. Gradients are taken on training rows, as many of each
    domain as a step has rows, drawn anew for each update. Every process must hold all parameters.

    Args:
        sampler: Sampler of the trainer's rows; its weights are the first ones.
        config: Options of DoGE.
        options: Keyword arguments of `MixtureCallback`.

    Attributes:
        average: Mean of the weights over the steps, by domain; printed when training ends.
    """

    method = "shares moved by DoGE, for a proxy"
    paper = (
        "DoGE: Domain Reweighting with Generalization Estimation",
        "2310.15393",
    )

    def __init__(self, sampler: MixtureSampler, config: DoGEConfig | None = None, **options: Any):
        config = DoGEConfig() if config is None else config
        super().__init__(sampler, functools.partial(DoGE, config), **options)
