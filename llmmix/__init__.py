"""Fine-tuning losses and data mixing that TRL lacks, on TRL's own trainers.

Public names are imported on first use, so that `import llmmix` and `llmmix ls` stay instant.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.dco import DCOConfig as DCOConfig
    from llmmix.dco import DCOTrainer as DCOTrainer
    from llmmix.filtering import LikelihoodFilter as LikelihoodFilter
    from llmmix.filtering import attach_filter as attach_filter
    from llmmix.grading.estimators import pass_at_n as pass_at_n
    from llmmix.grading.verify import Verifier as Verifier
    from llmmix.head import attach_head as attach_head
    from llmmix.logprobs import linear_logprobs as linear_logprobs
    from llmmix.mixing.aioli import AioliCallback as AioliCallback
    from llmmix.mixing.aioli_config import AioliConfig as AioliConfig
    from llmmix.mixing.attach import attach_mixture as attach_mixture
    from llmmix.mixing.sampler import MixtureSampler as MixtureSampler
    from llmmix.row_weights import attach_weights as attach_weights
    from llmmix.rpo import RPOConfig as RPOConfig
    from llmmix.rpo import RPOTrainer as RPOTrainer
    from llmmix.sampling import sample as sample
    from llmmix.sftmix.trainer import SFTMixConfig as SFTMixConfig
    from llmmix.sftmix.trainer import SFTMixTrainer as SFTMixTrainer
    from llmmix.solve_rates import SolveRates as SolveRates
    from llmmix.steps import split_steps as split_steps
    from llmmix.token_losses.config import TokenLossConfig as TokenLossConfig
    from llmmix.token_losses.trainer import TokenLossTrainer as TokenLossTrainer
    from llmmix.trainers import attach_heads as attach_heads
    from llmmix.unlearning.config import UnlearnConfig as UnlearnConfig
    from llmmix.unlearning.flat import FLATConfig as FLATConfig
    from llmmix.unlearning.flat import FLATTrainer as FLATTrainer
    from llmmix.unlearning.trainer import UnlearnTrainer as UnlearnTrainer

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dco": ["DCOConfig", "DCOTrainer"],
        "row_weights": ["attach_weights"],
        "sftmix.trainer": ["SFTMixConfig", "SFTMixTrainer"],
        "token_losses.config": ["TokenLossConfig"],
        "token_losses.trainer": ["TokenLossTrainer"],
        "rpo": ["RPOConfig", "RPOTrainer"],
        "unlearning.flat": ["FLATConfig", "FLATTrainer"],
        "unlearning.config": ["UnlearnConfig"],
        "unlearning.trainer": ["UnlearnTrainer"],
        "mixing.aioli": ["AioliCallback"],
        "mixing.aioli_config": ["AioliConfig"],
        "mixing.sampler": ["MixtureSampler"],
        "mixing.attach": ["attach_mixture"],
        "head": ["attach_head"],
        "logprobs": ["linear_logprobs"],
        "filtering": ["LikelihoodFilter", "attach_filter"],
        "solve_rates": ["SolveRates"],
        "steps": ["split_steps"],
        "trainers": ["attach_heads"],
        "sampling": ["sample"],
        "grading.verify": ["Verifier"],
        "grading.estimators": ["pass_at_n"],
    },
)
__version__ = "0.1.0"
