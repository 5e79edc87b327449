"""Which rows a trainer sees: domains mixed by weights that may move while it trains.

Public names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.mixing.aioli import AioliCallback as AioliCallback
    from llmmix.mixing.aioli import AioliConfig as AioliConfig
    from llmmix.mixing.attach import attach_mixture as attach_mixture
    from llmmix.mixing.bandit import BanditCallback as BanditCallback
    from llmmix.mixing.bandit import BanditConfig as BanditConfig
    from llmmix.mixing.callback import MixtureCallback as MixtureCallback
    from llmmix.mixing.online import SkillItCallback as SkillItCallback
    from llmmix.mixing.online import SkillItConfig as SkillItConfig
    from llmmix.mixing.proxies import DoGECallback as DoGECallback
    from llmmix.mixing.proxies import DoGEConfig as DoGEConfig
    from llmmix.mixing.proxies import DoReMiCallback as DoReMiCallback
    from llmmix.mixing.proxies import DoReMiConfig as DoReMiConfig
    from llmmix.mixing.rows import label_domains as label_domains
    from llmmix.mixing.sampler import MixtureSampler as MixtureSampler
    from llmmix.mixing.streams import StreamedRows as StreamedRows

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "aioli": ["AioliCallback", "AioliConfig"],
        "attach": ["attach_mixture"],
        "bandit": ["BanditCallback", "BanditConfig"],
        "callback": ["MixtureCallback"],
        "online": ["SkillItCallback", "SkillItConfig"],
        "proxies": ["DoGECallback", "DoGEConfig", "DoReMiCallback", "DoReMiConfig"],
        "rows": ["label_domains"],
        "sampler": ["MixtureSampler"],
        "streams": ["StreamedRows"],
    },
)
