"""The entropy over the k most likely tokens, found tile by tile."""

import math

import pytest
import torch

from llmmix.fused import largest, tiles
from llmmix.fused.largest import merge_largest
from llmmix.fused.tiles import HeadScaling
from llmmix.logprobs import linear_statistics


def top_k_entropy(z, **options):
    """Through a head whose weight is the identity: `z` are the hidden states."""
    weight, targets = torch.eye(z.size(1), dtype=z.dtype), torch.zeros(len(z), dtype=torch.long)
    return linear_statistics(z, weight, targets, outputs=("top_k_entropy", "entropy"), **options)


def plain(z, k):
    p = z.topk(min(k, z.size(1))).values.softmax(-1)
    return -(p * p.log()).sum(-1)


@pytest.mark.parametrize(
    ("vocabulary", "rho", "full", "top"),
    [
        (64, 0.8, 2.50200252553, 2.43836238976),
        (64, 0.95, 3.8040728707, 2.95311429593),
        (1000, 0.99, 5.59967635904, 2.99405469341),
    ],
)
def test_geometric_distributions(vocabulary, rho, full, top):
    z = torch.arange(vocabulary).double().flip(0) * math.log(rho) - 3
    out = top_k_entropy(z[None])
    assert out.entropy.item() == pytest.approx(full, rel=1e-10)
    assert out.top_k_entropy.item() == pytest.approx(top, rel=1e-10)


def kinds_of_logits(v=203):
    """Rising, falling and random logits, few distinct values, equal ones, and few that count."""
    g = torch.Generator().manual_seed(0)
    line = torch.linspace(-3, 3, v, dtype=torch.float64)
    few = torch.randint(3, (2, v), generator=g).double()
    tail = torch.full((1, v), -50.0, dtype=torch.float64)
    tail[0, [1, 100, v - 1]] = 1.0
    random = torch.randn(4, v, generator=g, dtype=torch.float64) * 4
    lines, equal = torch.stack([line, line.flip(0)]), torch.zeros(1, v).double()
    return torch.cat([lines, random, few, equal, tail])


@pytest.mark.parametrize("columns", [1, 7, 45, 64, 300])
@pytest.mark.parametrize("k", [1, 3, 20, 500])
def test_tiles_of_any_width_give_the_entropy_of_torch_topk(columns, k, monkeypatch):
    monkeypatch.setattr(largest, "GROUP", 5)
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", 4)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 4 * columns)
    z = kinds_of_logits()
    out = top_k_entropy(z, top_k=k)
    torch.testing.assert_close(out.top_k_entropy, plain(z, k), rtol=1e-10, atol=1e-12)
    assert (out.top_k_entropy <= out.entropy + 1e-12).all()  # majorisation


def test_only_what_exceeds_the_smallest_of_the_largest_is_sorted(monkeypatch):
    """A tile of 2,048 columns adds a few to sort, not itself."""
    z = torch.randn(8, 3 * 2048, generator=torch.Generator().manual_seed(0))
    top, sorted_widths = torch.full((8, 20), torch.finfo(z.dtype).min), []
    topk = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda x, k: sorted_widths.append(x.size(1)) or topk(x, k)
    )
    for i, tile in enumerate(z.split(2048, dim=1)):
        merge_largest(top, tile, first=i == 0)
    assert max(sorted_widths) <= 100
    assert torch.equal(top, topk(z, 20).values)


def test_the_scaled_logits_count_and_no_gradient_flows():
    z = kinds_of_logits().requires_grad_()
    bias = torch.linspace(1, -1, z.size(1), dtype=torch.float64)
    scaling = HeadScaling(logit_scale=-1.7, softcap=3.0, temperature=0.5)
    out = top_k_entropy(z, bias=bias, scaling=scaling, top_k=5)
    capped = 3.0 * torch.tanh((z + bias) * -1.7 / 3.0) / 0.5
    torch.testing.assert_close(out.top_k_entropy, plain(capped.detach(), 5))
    assert not out.top_k_entropy.requires_grad and out.log_probs.requires_grad


def test_nan_rows_no_rows_and_a_top_k_of_zero():
    z = kinds_of_logits().repeat(1, 10)
    z[3, 5] = float("nan")
    got = top_k_entropy(z).top_k_entropy
    assert got.isnan().nonzero().flatten().tolist() == [3]
    assert top_k_entropy(z[:0]).top_k_entropy.shape == (0,)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0.*`entropy`"):
        top_k_entropy(z, top_k=0)
