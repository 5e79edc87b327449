"""Which rows a trainer sees: domains mixed by weights that may move while it trains.

Public names are imported on first use.
"""

import importlib

_HOMES = {
    "AioliCallback": "aioli",
    "AioliConfig": "aioli",
    "BanditCallback": "bandit",
    "BanditConfig": "bandit",
    "DoGECallback": "proxies",
    "DoGEConfig": "proxies",
    "DoReMiCallback": "proxies",
    "DoReMiConfig": "proxies",
    "MixtureCallback": "callback",
    "MixtureSampler": "sampler",
    "SkillItCallback": "online",
    "SkillItConfig": "online",
    "StreamedRows": "streams",
    "attach_mixture": "attach",
    "label_domains": "rows",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'llmmix.mixing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmmix.mixing.{_HOMES[name]}"), name)
