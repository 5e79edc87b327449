"""Mixture laws: the loss as a function of the mixture, fitted to finished runs.

    runs = read_runs("ratios.csv", "metrics.csv")
    law = DefaultLaw().fit(*runs.frames())
    law.predict(mixtures), law.interval(mixtures), law.best_mixture("code")
    compare({"effective": DefaultLaw(), "linear": LinearLaw()}, *runs.frames())

It needs numpy, scipy, scikit-learn and pandas, and no torch. The laws are in effective.py,
exponential.py, linear.py and trees.py; `Law` (law.py) is their base class. eval/mixture_laws.py is
the program on top.
"""

from llmmix.laws.budget import learning_curve
from llmmix.laws.design import next_mixtures
from llmmix.laws.effective import EffectiveDataLaw
from llmmix.laws.exponential import ExponentialLaw
from llmmix.laws.fidelity import assess
from llmmix.laws.judge import best_of, compare, cross_validate
from llmmix.laws.law import Law
from llmmix.laws.linear import LinearDynamicLaw, LinearLaw, LogLinearLaw
from llmmix.laws.proposal import examine_proposal
from llmmix.laws.tables import read_runs
from llmmix.laws.transfer import TransferCalibrator, judge_transfer
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
    "assess",
    "best_of",
    "compare",
    "cross_validate",
    "examine_proposal",
    "judge_transfer",
    "learning_curve",
    "next_mixtures",
    "read_runs",
]
