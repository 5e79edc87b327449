"""The k largest logits of each row, found tile by tile, and the entropy of those tokens alone.

`torch.topk` over a whole tile takes longer than the matrix product that makes the tile. After the
first tile, few logits exceed the k-th largest so far: the maxima of groups of columns show where.
"""

import torch
from torch import Tensor

GROUP = 32  # columns that share a maximum


def merge_largest(largest: Tensor, z: Tensor, first: bool) -> None:
    """Replace the k largest logits so far (n, k), in descending order, by those with a tile `z`.

    Args:
        largest: (n, k), updated in place.
        z: (n, columns), scaled logits; unchanged.
        first: Whether `z` is the first tile of its rows.
    """
    n, k = largest.shape
    groups = z.size(1) // GROUP
    if groups < 2 * k or n == 0:
        largest.copy_(torch.cat((largest, z), 1).topk(k).values)
        return
    grouped, rest = z[:, : groups * GROUP].unflatten(1, (GROUP, groups)), z[:, groups * GROUP :]
    maxima = grouped.amax(1)
    # At least k logits reach the bound, so none below it can be among the k largest
    bound = maxima.topk(k).values[:, -1:] if first else largest[:, -1:].clone()
    row, group = (maxima > bound).nonzero(as_tuple=True)
    candidates = grouped[row, :, group]
    place, member = (candidates > bound[row]).nonzero(as_tuple=True)
    found = _by_row(candidates[place, member], row[place], bound)
    top = torch.cat((largest, rest, found), 1).topk(k).values
    torch.maximum(top, bound, out=largest)  # fewer than k above the bound: the others equal it


def _by_row(values: Tensor, row: Tensor, bound: Tensor) -> Tensor:
    """Values of ascending rows as (n, the most of one row), filled up with `bound` (n, 1)."""
    counts = torch.bincount(row, minlength=bound.size(0))
    starts = counts.cumsum(0) - counts
    width = int(counts.max())
    found = bound.expand(-1, width).clone()
    found[row, torch.arange(row.numel(), device=row.device) - starts[row]] = values
    return found


def entropy_of_largest(largest: Tensor) -> Tensor:
    """(n,) entropy in nats of the softmax over k logits (n, k) in descending order."""
    z = largest - largest[:, :1]
    e = z.exp()
    total = e.sum(1)
    return total.log() - (e * z).sum(1) / total
