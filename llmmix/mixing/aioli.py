"""Aioli: estimate from the run itself what each domain does for each loss, and mix by it.

    L_i(t+1) = L_i(t) - sum_j A_ij p_j        the law: A_ij is the loss that i sheds on domain j
    W A_i = G_i                               probes with mixtures W shed G_i: solve for A's rows
    p_j ~ p0_j exp(eta * sum_i u_i A_ij)      exponentiated gradient: more of what helps more

    symbol   argument            symbol   argument
    f        one_hot_factor      eta      eta
    EMA      ema                 p0       prior_weights, `anchor`

Two estimators. "one_hot", the paper's: every `update_steps` a few real training steps on each
nearly one-hot mixture in turn, losses measured in between. "regression", ours: the mixture is
always tilted a little, to each domain in turn, so that all steps tell, and recursive least squares
with forgetting reads A off them; no step is spent on an estimate alone.

A's rows are targets and its columns domains, and it carries their names. Source: Chen et al.,
"Aioli: A Unified Optimization Framework for Language Model Data Mixing" (arXiv:2411.05735) and its
released code, whose variants are under `compat="official"`. Recipe: recipes/aioli.py.
"""

import functools
from dataclasses import dataclass

import numpy as np

from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.controllers import check_weights
from llmmix.mixing.estimators import OneHotAioli, RegressionAioli
from llmmix.mixing.influence import (
    InfluenceMatrix,
    normalize_matrix,
    probe_mixtures,
    solve_mixing_matrix,
    update_weights,
)
from llmmix.mixing.online import option
from llmmix.mixing.sampler import MixtureSampler

__all__ = [
    "AioliCallback",
    "AioliConfig",
    "InfluenceMatrix",
    "normalize_matrix",
    "probe_mixtures",
    "solve_mixing_matrix",
    "update_weights",
]

CONTROLLERS = {"one_hot": OneHotAioli, "regression": RegressionAioli}


@dataclass
class AioliConfig:
    """Of Aioli. What is None follows from the length of the run and the number of domains."""

    estimator: str = option("one_hot", "How A is read: one_hot (the paper's) or regression.")
    update_steps: int | None = option(
        None, "Steps between updates. Default: a tenth of the run; regression: a fortieth."
    )
    rounds: int = option(2, "one_hot: how often each domain is probed before an update.")
    probe_steps: int | None = option(
        None, "one_hot: steps of a probe. Default: a quarter of the steps are probes."
    )
    one_hot_factor: float = option(0.75, "one_hot: f, the share of the domain that is probed.")
    eta: float | None = option(
        None, "Size of an update. Default: 2 a domain; regression: 0.5; compat=official: 0.2."
    )
    ema: float | None = option(0.5, "one_hot: weight of the past matrices; none to accumulate.")
    tilt: float = option(0.1, "regression: share of each step given to one domain in turn.")
    memory: float = option(
        0.1, "regression: share of the steps so far after which a step counts half."
    )
    transfer: float = option(
        0.1, "regression: what other domains do for a target beside its own, prior deviation."
    )
    min_share: float = option(0.25, "No domain falls below this part of an equal share.")
    first_step: int | None = option(
        None, "Steps before the first measurement. Default: a tenth of the run."
    )
    prior_weights: list[float] | None = option(None, "p0; default: the sampler's weights.")
    prior_steps: int = option(0, "Steps on p0 before all else (the restricted setting).")
    anchor: str = option("prior", "What updates tilt: prior, or uniform as the published code.")
    target_weights: list[float] | None = option(None, "Weights of the targets; default: equal.")
    compat: str | None = option(None, "official: the published code's update, order and floor.")
    evidence: float = option(
        1.0, "one_hot: standard errors by which gains must differ for the weights to move."
    )
    order_seed: int = option(0, "Of the order of the probes.")

    def __post_init__(self):
        self._check_kinds()
        choices = {
            "estimator": tuple(CONTROLLERS),
            "anchor": ("prior", "uniform"),
            "compat": (None, "official"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        ranges = {
            "one_hot_factor": (0.05, 1),
            "eta": (0, 1e6),
            "memory": (1e-6, np.inf),
            "transfer": (1e-6, np.inf),
            "ema": (0, 1),
            "tilt": (0, 1),
            "min_share": (0, 1),
            "evidence": (0, np.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is None and name in ("eta", "ema"):
                continue
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"`{name}` must lie in [{low}, {high}], got {value!r}.")
        if self.compat and self.estimator != "one_hot":
            raise ValueError("`compat='official'` is of the estimator 'one_hot'.")

    def _check_kinds(self) -> None:
        whole = {"rounds": 1, "prior_steps": 0, "order_seed": 0}
        whole |= {"update_steps": 1, "probe_steps": 1, "first_step": 0}
        for name, low in whole.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if not isinstance(value, int) or value < low:
                raise ValueError(f"`{name}` must be a whole number from {low} on, got {value!r}.")
        for name in ("prior_weights", "target_weights"):
            if (given := getattr(self, name)) is not None:
                check_weights(given, list(map(str, range(len(given)))), name)


class AioliCallback(MixtureCallback):
    """Moves a sampler's weights by Aioli while a trainer runs.

    Args:
        sampler: Of the trainer's rows; its weights are the first ones.
        config: Of Aioli.
        options: As those of `MixtureCallback`.
    """

    def __init__(self, sampler: MixtureSampler, config: AioliConfig | None = None, **options):
        config = AioliConfig() if config is None else config
        make = functools.partial(CONTROLLERS[config.estimator], config)
        super().__init__(sampler, make, **options)
