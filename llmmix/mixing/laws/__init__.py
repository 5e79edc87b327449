"""Mixture laws: the loss as a function of the mixture, fitted to finished runs.

    law = DefaultLaw().fit(mixtures, losses)
    law.predict(mixtures), law.interval(mixtures), law.best_mixture("code")

No torch: numpy, scipy and scikit-learn alone.
"""

from llmmix.mixing.laws.effective import EffectiveDataLaw
from llmmix.mixing.laws.exponential import ExponentialLaw
from llmmix.mixing.laws.law import Law
from llmmix.mixing.laws.linear import LinearDynamicLaw, LinearLaw, LogLinearLaw
from llmmix.mixing.laws.transfer import TransferCalibrator
from llmmix.mixing.laws.trees import GradientBoostedLaw

DefaultLaw = EffectiveDataLaw

__all__ = [
    "DefaultLaw",
    "EffectiveDataLaw",
    "ExponentialLaw",
    "GradientBoostedLaw",
    "Law",
    "LinearDynamicLaw",
    "LinearLaw",
    "LogLinearLaw",
    "TransferCalibrator",
]
