"""A padded batch without its padding: one row, in which each sequence sees itself alone.

Everything outside of the backbone keeps the rows of the batch: labels, pairs, references, metrics.

    symbol   shape
    mask     (B, T)      true at the tokens of the batch, on either side of the padding
    row      (1, N)      its N tokens, one sequence behind the other
"""

from typing import Any

import torch
from torch import Tensor


def has_padding(attention_mask: Any) -> bool:
    """Whether a batch's mask (B, T) leaves out a position."""
    plain = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
    return plain and not bool((attention_mask != 0).all())


def without_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a backbone for the tokens of a padded batch alone.

    Args:
        inputs: `input_ids` (B, T) and `attention_mask` (B, T), and what else the backbone takes.

    Returns:
        `input_ids` and `position_ids` (1, N) in place of both, and the rest.
    """
    mask = inputs["attention_mask"] != 0
    positions = mask.cumsum(1) - 1
    rest = {name: x for name, x in inputs.items() if name != "attention_mask"}
    return {
        **rest,
        "input_ids": inputs["input_ids"][mask].unsqueeze(0),
        "position_ids": positions[mask].unsqueeze(0),
    }


def as_padded(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (B, T, H) from those of the tokens alone (1, N, H); zero at the padding."""
    mask = attention_mask.to(hidden.device) != 0
    padded = hidden.new_zeros(*mask.shape, hidden.size(-1))
    return torch.masked_scatter(padded, mask.unsqueeze(-1), hidden)
