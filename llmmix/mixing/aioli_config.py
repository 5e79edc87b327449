"""The options of Aioli (llmmix/mixing/aioli.py); each help line names its estimator."""

from dataclasses import dataclass, field

import numpy as np

from llmmix.mixing.checks import check_weights, require, require_whole


@dataclass
class AioliConfig:
    """Options of Aioli. Where one is None, the run's length and the number of domains decide it.

    Raises:
        ValueError: An option is out of its range, or `compat` is set with another estimator than
            "one_hot".
    """

    estimator: str = field(
        default="one_hot",
        metadata={
            "help": "Estimator of the influence matrix A: one_hot (the paper's, by training "
            "probes) or regression (ours, from every step)."
        },
    )
    update_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps between two updates of the weights. Default: a tenth of the run "
            "(one_hot) or a fortieth (regression)."
        },
    )
    rounds: int = field(
        default=2, metadata={"help": "Probes of each domain before an update (one_hot)."}
    )
    probe_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of a probe (one_hot). Default: probes take a quarter of all steps."
        },
    )
    one_hot_factor: float = field(
        default=0.75, metadata={"help": "Share f of the probed domain during its probe (one_hot)."}
    )
    eta: float | None = field(
        default=None,
        metadata={
            "help": "Size eta of an update. Default: twice the number of domains (one_hot), 0.2 "
            "(compat official) or 0.5 (regression)."
        },
    )
    ema: float | None = field(
        default=0.5,
        metadata={
            "help": "Weight of the past in the moving average of matrices (one_hot). With null in "
            "a YAML file, updates accumulate instead."
        },
    )
    tilt: float = field(
        default=0.1,
        metadata={
            "help": "Share of each step that goes to one domain in turn, so that mixtures differ "
            "(regression)."
        },
    )
    memory: float = field(
        default=0.1,
        metadata={
            "help": "Share of the steps so far after which a measurement counts half (regression)."
        },
    )
    transfer: float = field(
        default=0.1,
        metadata={
            "help": "Prior standard deviation of the effect of other domains on a target, as a "
            "share of its own domain's effect (regression)."
        },
    )
    min_share: float = field(
        default=0.25,
        metadata={"help": "Smallest share of a domain, as a fraction of an equal share."},
    )
    first_step: int | None = field(
        default=None,
        metadata={
            "help": "Steps before the first measurement. Default: a tenth of the run, or 0 with "
            "compat official."
        },
    )
    prior_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Prior mixture p0, in the order of the domains. Default: the sampler's weights."
        },
    )
    prior_steps: int = field(
        default=0,
        metadata={
            "help": "Steps on p0 before anything is measured (the paper's restricted setting)."
        },
    )
    anchor: str = field(
        default="prior",
        metadata={"help": "Mixture that updates tilt (one_hot): prior, or uniform (as published)."},
    )
    target_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each target's loss in the objective. Default: equal weights."},
    )
    compat: str | None = field(
        default=None,
        metadata={
            "help": "Set to official for the published code without our corrections (one_hot)."
        },
    )
    evidence: float = field(
        default=1.0,
        metadata={
            "help": "Standard errors by which gains must differ before the weights move (one_hot)."
        },
    )
    order_seed: int = field(
        default=0,
        metadata={"help": "Seed of the order in which domains are probed or tilted towards."},
    )

    def __post_init__(self) -> None:
        self._check_kinds()
        choices: dict[str, tuple] = {
            "estimator": ("one_hot", "regression"),
            "anchor": ("prior", "uniform"),
            "compat": (None, "official"),
        }
        for name, allowed in choices.items():
            require(
                getattr(self, name) in allowed, name, f"be one of {allowed}", getattr(self, name)
            )
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
            met = isinstance(value, int | float) and low <= value <= high
            require(met, name, f"lie in [{low}, {high}]", value)
        if self.compat and self.estimator != "one_hot":
            raise ValueError("`compat='official'` needs `estimator='one_hot'`.")

    def _check_kinds(self) -> None:
        whole = {"rounds": 1, "prior_steps": 0, "order_seed": 0}
        for name, least in whole.items():
            require_whole(name, getattr(self, name), least)
        for name, least in {"update_steps": 1, "probe_steps": 1, "first_step": 0}.items():
            if (value := getattr(self, name)) is not None:
                require_whole(name, value, least)
        for name in ("prior_weights", "target_weights"):
            if (given := getattr(self, name)) is not None:
                check_weights(given, list(map(str, range(len(given)))), name)
