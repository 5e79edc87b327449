"""FLAT, by its short name: the method is in llmmix/unlearning/flat.py."""

from llmmix.unlearning.flat import FLATConfig, FLATTrainer, flat_loss

__all__ = ["FLATConfig", "FLATTrainer", "flat_loss"]
