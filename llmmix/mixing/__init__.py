"""Which rows a trainer sees: rows of several domains, in shares that may change during training.

`attach_mixture` (attach.py) is the way in; a method such as Aioli (aioli.py) has a file of its own.
Public names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.mixing.aioli import AioliCallback as AioliCallback
    from llmmix.mixing.aioli import AioliConfig as AioliConfig
    from llmmix.mixing.attach import attach_mixture as attach_mixture
    from llmmix.mixing.callback import MixtureCallback as MixtureCallback
    from llmmix.mixing.doge import DoGECallback as DoGECallback
    from llmmix.mixing.doge import DoGEConfig as DoGEConfig
    from llmmix.mixing.doremi import DoReMiCallback as DoReMiCallback
    from llmmix.mixing.doremi import DoReMiConfig as DoReMiConfig
    from llmmix.mixing.odm import ODMCallback as ODMCallback
    from llmmix.mixing.odm import ODMConfig as ODMConfig
    from llmmix.mixing.rows import label_domains as label_domains
    from llmmix.mixing.sampler import MixtureSampler as MixtureSampler
    from llmmix.mixing.skillit import SkillItCallback as SkillItCallback
    from llmmix.mixing.skillit import SkillItConfig as SkillItConfig
    from llmmix.mixing.skillit import skillit_graph as skillit_graph
    from llmmix.mixing.streams import StreamedRows as StreamedRows
    from llmmix.mixing.weights import proportional as proportional
    from llmmix.mixing.weights import stratified as stratified

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "aioli": ["AioliCallback", "AioliConfig"],
        "attach": ["attach_mixture"],
        "callback": ["MixtureCallback"],
        "doge": ["DoGECallback", "DoGEConfig"],
        "doremi": ["DoReMiCallback", "DoReMiConfig"],
        "odm": ["ODMCallback", "ODMConfig"],
        "rows": ["label_domains"],
        "sampler": ["MixtureSampler"],
        "skillit": ["SkillItCallback", "SkillItConfig", "skillit_graph"],
        "streams": ["StreamedRows"],
        "weights": ["proportional", "stratified"],
    },
)
