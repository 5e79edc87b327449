"""ODM and EXP3, two bandits: more of the domains whose losses are high.

    ODM    R <- a R + (1 - a) r / pi,   E_t = min(1 / m, sqrt(ln m / (m t)))
           pi = (1 - m E_t) softmax(E_(t-1) R) + E_t
    EXP3   w <- w exp(eta r / (m pi)),  pi = (1 - gamma) w / sum w + gamma / m

    symbol  name                        symbol  name
    m       names                       r       the signal `train` or `losses` (m,)
    a       decay                       pi      weights

Where it is weak: a reward is the level of a loss, not its fall, so a domain of noise, which no
model can predict, is rewarded most. Where all domains are always seen and rewards are divided by
pi, EXP3 settles where pi is proportional to the rewards (3, 2.5, 2 -> .4, .333, .267), not on the
best arm. ODM multiplies R by its exploration rate, so its weights return to equal ones as that
decays. Rewards from a batch are noisy, since it has few rows of each domain.

Source: Albalak et al., "Efficient Online Data Mixing For Language Model Pre-Training"
(arXiv:2312.02406). Recipe: recipes/aioli.py.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.checks import Weights, require, require_same, require_whole
from llmmix.mixing.controllers import Observation, OnlineController
from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.weights import log_normalize, log_of


def exploration(step: int, m: int) -> float:
    """ODM's E_t = min(1 / m, sqrt(ln m / (m t))) after t = `step` steps, warm-up included."""
    return min(1 / m, math.sqrt(math.log(m) / (m * step)))


def explore(scores: np.ndarray, share: float) -> np.ndarray:
    """(m,) the weights pi = (1 - share) softmax(scores) + share / m."""
    return (1 - share) * np.exp(log_normalize(scores)) + share / len(scores)


@dataclass
class ODMConfig:
    """Options of `ODM`. The published plugin is exp3 on losses with `full_information=False`.

    Raises:
        ValueError: An option is out of its range.
    """

    update: str = field(
        default="odm", metadata={"help": "Update rule: odm or exp3.", "choices": ["odm", "exp3"]}
    )
    reward: str = field(
        default="train",
        metadata={
            "help": "Reward of a domain: its loss in the batch (train) or on validation (losses).",
            "choices": ["train", "losses"],
        },
    )
    full_information: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the rewards of all domains are known, so that they are not divided by "
            "pi. Default: true for the reward losses, else false."
        },
    )
    interval: int | None = field(
        default=None,
        metadata={
            "help": "Steps between updates. Default: 1, or a hundredth of the run for the reward "
            "losses."
        },
    )
    warmup_share: float = field(
        default=0.01, metadata={"help": "Share of the run that trains on the first weights."}
    )
    decay: float = field(
        default=0.9, metadata={"help": "Weight a of the past in the running rewards (odm)."}
    )
    eta: float = field(default=0.3, metadata={"help": "Size of an update (exp3)."})
    gamma: float = field(
        default=0.1, metadata={"help": "Share of the mixture that is spread evenly (exp3)."}
    )

    def __post_init__(self) -> None:
        require(self.update in ("odm", "exp3"), "update", "be 'odm' or 'exp3'", self.update)
        known = self.reward in ("train", "losses")
        require(known, "reward", "be 'train' or 'losses'", self.reward)
        require_whole("interval", 1 if self.interval is None else self.interval)
        require(0 <= self.warmup_share < 1, "warmup_share", "lie in [0, 1)", self.warmup_share)
        require(0 <= self.decay < 1, "decay", "lie in [0, 1)", self.decay)
        require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        require(0 < self.gamma <= 1, "gamma", "lie in (0, 1]", self.gamma)


class ODM(OnlineController):
    """Draws more of the domains whose losses are high, as arms of a bandit.

    The paper draws one domain a batch and rewards it. Here a batch holds several domains, and each
    of them is rewarded by its mean loss.

    Args:
        config: Options of the method.
        names: Names of the m domains. Each is an arm, also one with a first weight of 0.
        targets: The domains in any order, for `reward="losses"`; else not used.
        weights: (m,) weights of the warm-up.
    """

    method = "ODM"
    config: ODMConfig
    kept = (*OnlineController.kept, "rate")
    arrays = (*OnlineController.arrays, "scores")

    def __init__(self, config: ODMConfig, names: list[str], targets: list[str], weights: Weights):
        super().__init__(config, names, targets, weights)
        self.measure, m = config.reward, len(self.names)
        if self.measure == "losses":
            require_same(self.names, self.targets, "reward='losses'")
        # R of odm, ln w of exp3
        self.scores = np.zeros(m) if config.update == "odm" else log_of(self.weights)
        self.rate = 1 / m  # E_(t-1)

    def steps_to_update(self, step: int, total_steps: int) -> int:
        """The rest of the warm-up; after it, steps to the next multiple of the interval."""
        warmup = round(self.config.warmup_share * total_steps)
        seldom = max(1, total_steps // 100) if self.measure == "losses" else 1
        every = self.config.interval or seldom
        return warmup - step if step < warmup else every - (step - warmup) % every

    def observe(self, observation: Observation) -> None:
        """Reward the arms that were seen; one whose reward is not finite keeps its score."""
        rewards = self.read(observation, self.measure, len(self.names))
        broken = np.isinf(rewards)
        if self.measure == "losses":
            rewards = rewards[[self.targets.index(name) for name in self.names]]
            broken = ~np.isfinite(rewards)  # every domain is measured: a NaN is no absence
        m, config = len(self.names), self.config
        full = config.full_information
        full = self.measure == "losses" if full is None else full
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            rewards = rewards / (1 if full else self.weights)
            if config.update == "exp3":
                rewards = rewards * config.eta / m
        seen = np.isfinite(rewards)
        self.skipped += bool(broken.any() or not seen.any())
        if not seen.any():
            return
        if config.update == "exp3":
            self.scores = log_normalize(self.scores + np.where(seen, rewards, 0.0))
            self.weights = explore(self.scores, config.gamma)
            return
        a = config.decay
        self.scores = np.where(seen, a * self.scores + (1 - a) * rewards, self.scores)
        last, self.rate = self.rate, exploration(observation.step, m)
        self.weights = explore(last * self.scores, m * self.rate)


class ODMCallback(MixtureCallback):
    """Moves a sampler's weights by ODM, or by EXP3, while a trainer runs.

    Args:
        sampler: Sampler of the trainer's rows; its weights apply during the warm-up.
        config: Options of ODM.
        options: Keyword arguments of `MixtureCallback`.
    """

    method = "shares moved by ODM"
    paper = (
        "Efficient Online Data Mixing For Language Model Pre-Training",
        "2312.02406",
    )

    def __init__(self, sampler: MixtureSampler, config: ODMConfig | None = None, **options: Any):
        config = ODMConfig() if config is None else config
        self.measures_losses = config.reward == "losses"
        super().__init__(sampler, functools.partial(ODM, config), **options)
