"""Token-weighted losses for SFT: twelve of them, on TRL's own trainer.

losses.py has the arithmetic, weights.py the weight that each loss gives a token, loss_table.py what
each needs, settings.py and config.py the settings, objective.py a loss with its settings on a
forward, references.py the other model that some compare with, reference_model.py the one that is
named, snapshot.py that of psft, trainer.py the trainer. Recipe: recipes/token_losses.py.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.token_losses.config import TokenLossConfig as TokenLossConfig
    from llmmix.token_losses.losses import asft_loss as asft_loss
    from llmmix.token_losses.losses import deft_loss as deft_loss
    from llmmix.token_losses.losses import dft_loss as dft_loss
    from llmmix.token_losses.losses import eaft_loss as eaft_loss
    from llmmix.token_losses.losses import focal_loss as focal_loss
    from llmmix.token_losses.losses import gce_loss as gce_loss
    from llmmix.token_losses.losses import gem_loss as gem_loss
    from llmmix.token_losses.losses import label_smoothing_loss as label_smoothing_loss
    from llmmix.token_losses.losses import nll_loss as nll_loss
    from llmmix.token_losses.losses import psft_loss as psft_loss
    from llmmix.token_losses.losses import select_loss as select_loss
    from llmmix.token_losses.losses import select_mask as select_mask
    from llmmix.token_losses.losses import threshold_loss as threshold_loss
    from llmmix.token_losses.trainer import TokenLossTrainer as TokenLossTrainer
    from llmmix.token_losses.weights import token_weight as token_weight

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["TokenLossConfig"],
        "losses": [
            "asft_loss",
            "deft_loss",
            "dft_loss",
            "eaft_loss",
            "focal_loss",
            "gce_loss",
            "gem_loss",
            "label_smoothing_loss",
            "nll_loss",
            "psft_loss",
            "select_loss",
            "select_mask",
            "threshold_loss",
        ],
        "trainer": ["TokenLossTrainer"],
        "weights": ["token_weight"],
    },
)
