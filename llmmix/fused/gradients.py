"""The part of a head's gradients that comes from the targets' own logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmmix.fused.tiles import TiledLogits


def target_gradients(
    needed: Sequence[bool],
    logits: TiledLogits,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    g: Tensor,
) -> tuple[Tensor | None, ...]:
    """What the targets' logits add to the gradients of hidden, weight and bias.

    Args:
        needed: Which of the three to compute; the others are None.
        logits: The head.
        weight: (V, H).
        bias: (V,), or None.
        targets: (N, K) token ids.
        g: (N, K) upstream gradients of the targets' raw logits.
    """
    dh, dw, db = (
        torch.zeros_like(x, dtype=logits.dtype) if need and x is not None else None
        for x, need in zip((logits.hidden, weight, bias), needed, strict=False)
    )
    for y, g_k in zip(targets.unbind(1), g.split(1, dim=1), strict=True):
        if dh is not None:
            dh.addcmul_(weight[y].to(dh.dtype), g_k)
        if dw is not None:
            dw.index_add_(0, y, g_k * logits.hidden)
        if db is not None:
            db.index_add_(0, y, g_k.squeeze(1))
    return dh, dw, db
