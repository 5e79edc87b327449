"""A batch of preferences, [chosen, rejected]: which of its pairs are scored, and TRL's means."""

from torch import Tensor
from transformers import Trainer

from llmmix.training.means import log_metric, log_of


def scored_pairs(mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B,) bool: which pairs have a token to score and a weight that is not 0.

    Args:
        mask: (2B, T) of [chosen, rejected], not 0 where a token is scored.
        weights: (B,), or None.
    """
    scored = mask.bool().any(1).view(2, -1).any(0)
    return scored if weights is None else scored & (weights != 0).to(scored.device)


def count_scored_pairs(trainer: Trainer, mask: Tensor, count: float, *, training: bool) -> None:
    """Turn TRL's means over the pairs of a micro-batch into means over those with a token.

    Args:
        trainer: A `DPOTrainer`.
        mask: (2B, T), of which B pairs enter TRL's means on this process.
        count: Pairs of all processes with a token.
        training: Whether the trainer trains, or evaluates.
    """
    pairs = len(mask) // 2 * trainer.accelerator.num_processes
    metrics = log_of(trainer, training=training)
    for name in [name for name in metrics if name.startswith(("rewards/", "logps/"))]:
        log_metric(trainer, name, metrics[name].pop() * pairs, count, training=training)
