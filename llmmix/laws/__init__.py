"""Mixture laws: the loss as a function of the mixture, fitted to finished runs.

    law = DefaultLaw().fit(mixtures, losses)
    law.predict(mixtures), law.interval(mixtures), law.best_mixture("code")

No torch: numpy, scipy and scikit-learn alone.
"""

from llmmix.laws.effective import EffectiveDataLaw
from llmmix.laws.exponential import ExponentialLaw
from llmmix.laws.law import Law
from llmmix.laws.linear import LinearDynamicLaw, LinearLaw, LogLinearLaw
from llmmix.laws.transfer import TransferCalibrator
from llmmix.laws.trees import GradientBoostedLaw

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
