"""Fine-tuning losses and data mixing that TRL lacks, on TRL's own trainers.

Public names are imported on first use, so that `import llmmix` and `llmmix ls` stay instant.
"""

import importlib

_HOMES = {
    "DCOConfig": "dco",
    "DCOTrainer": "dco",
    "SFTMixConfig": "sftmix",
    "SFTMixTrainer": "sftmix",
    "RPOConfig": "rpo",
    "RPOTrainer": "rpo",
    "FLATConfig": "flat",
    "FLATTrainer": "flat",
    "UnlearnConfig": "unlearn_trainer",
    "UnlearnTrainer": "unlearn_trainer",
    "AioliCallback": "mixing.aioli",
    "AioliConfig": "mixing.aioli",
    "MixtureSampler": "mixing.sampler",
    "attach_head": "head",
    "attach_mixture": "mixing.attach",
    "linear_logprobs": "logprobs",
    "LikelihoodFilter": "filtering",
    "SolveRates": "solve_rates",
    "attach_filter": "filtering",
    "attach_weights": "solve_rates",
    "split_steps": "steps",
    "sample": "sampling",
    "Verifier": "verify",
    "pass_at_n": "estimators",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'llmmix' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmmix.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
