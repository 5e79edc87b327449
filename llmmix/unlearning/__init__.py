"""Unlearning: forget losses and FLAT, their trainers, and the rows they read.

Public names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.unlearning.config import UnlearnConfig as UnlearnConfig
    from llmmix.unlearning.flat import FLATConfig as FLATConfig
    from llmmix.unlearning.flat import FLATTrainer as FLATTrainer
    from llmmix.unlearning.flat import flat_loss as flat_loss
    from llmmix.unlearning.loss_table import LOSSES as LOSSES
    from llmmix.unlearning.losses import ceu_loss as ceu_loss
    from llmmix.unlearning.losses import dpo_loss as dpo_loss
    from llmmix.unlearning.losses import grad_ascent_loss as grad_ascent_loss
    from llmmix.unlearning.losses import kl_loss as kl_loss
    from llmmix.unlearning.losses import nll_loss as nll_loss
    from llmmix.unlearning.losses import npo_loss as npo_loss
    from llmmix.unlearning.losses import pdu_loss as pdu_loss
    from llmmix.unlearning.losses import pdu_multiplier as pdu_multiplier
    from llmmix.unlearning.losses import rmu_loss as rmu_loss
    from llmmix.unlearning.losses import rmu_target as rmu_target
    from llmmix.unlearning.losses import satimp_loss as satimp_loss
    from llmmix.unlearning.losses import simnpo_loss as simnpo_loss
    from llmmix.unlearning.losses import undial_loss as undial_loss
    from llmmix.unlearning.losses import wga_loss as wga_loss
    from llmmix.unlearning.trainer import UnlearnTrainer as UnlearnTrainer

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "losses": [
            "ceu_loss",
            "dpo_loss",
            "grad_ascent_loss",
            "kl_loss",
            "nll_loss",
            "npo_loss",
            "pdu_loss",
            "pdu_multiplier",
            "rmu_loss",
            "rmu_target",
            "satimp_loss",
            "simnpo_loss",
            "undial_loss",
            "wga_loss",
        ],
        "flat": ["FLATConfig", "FLATTrainer", "flat_loss"],
        "config": ["UnlearnConfig"],
        "trainer": ["UnlearnTrainer"],
        "loss_table": ["LOSSES"],
    },
)
