"""A metric of ours in the log of TRL's trainers."""

from transformers import Trainer


def log_metric(trainer: Trainer, name: str, value: float) -> None:
    """Let TRL average a metric's values since its last log; other trainers do not show it."""
    if hasattr(trainer, "_metrics"):
        trainer._metrics["train"][name].append(value)
