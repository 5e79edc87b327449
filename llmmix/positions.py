"""Which rows may share a batch, where the longest row of a batch changes the positions of all.

Long RoPE, Phi-3's among others, has two sets of frequencies, and takes the second for a whole batch
as soon as one row of it passes a certain length. Dynamic NTK changes them too, but only beyond the
context, which no row may pass.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from llmmix.data import batches_of_tokens
from llmmix.models import configs_of


def rope_switches(model: nn.Module) -> list[int]:
    """Lengths beyond which a row takes other frequencies; none for most models."""
    found = set()
    for config in configs_of(model):
        given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        # One dictionary, or one for each type of layer
        for rope in (given, *(part for part in given.values() if isinstance(part, dict))):
            if rope.get("rope_type") == "longrope":
                found.add(rope["original_max_position_embeddings"])
    return sorted(found)


def rows_alike(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Rows that may share a batch, by number: all of them, for most models.

    Args:
        model: A model of transformers.
        lengths: Tokens of each row.
    """
    switches = rope_switches(model)
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(sum(length > switch for switch in switches), []).append(row)
    return list(groups.values())


def batches_alike(
    model: nn.Module,
    lengths: Sequence[int],
    token_budget: int,
    *,
    scored: Sequence[int] | None = None,
    **limits: int,
) -> list[list[int]]:
    """`llmmix.data.batches_of_tokens`, of rows that may share a batch."""
    return [
        [alike[place] for place in batch]
        for alike in rows_alike(model, lengths)
        for batch in batches_of_tokens(
            [lengths[row] for row in alike],
            token_budget,
            scored=None if scored is None else [scored[row] for row in alike],
            **limits,
        )
    ]
