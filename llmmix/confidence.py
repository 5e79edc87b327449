"""Stage 1 of SFTMix, by its short name: it is in llmmix/sftmix/scoring.py."""

from llmmix.sftmix.scoring import ReferenceArguments, add_confidence, mean_nlls

__all__ = ["ReferenceArguments", "add_confidence", "mean_nlls"]
