import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmmix import segment_attention
from llmmix.segment_attention import Segments, attend, serve_segments

LENGTHS = [3, 9, 1, 6]
CPU = torch.device("cpu")


def parts(heads=4, groups=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(LENGTHS), 8) for n in (heads, groups, groups)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def under_a_mask(query, key, value, window, scale):
    """The same attention, of all tokens under one mask."""
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    back = torch.arange(len(sequence)).unsqueeze(1) - torch.arange(len(sequence))
    seen = (sequence.unsqueeze(1) == sequence) & (back >= 0) & (back < (window or 99))
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, seen, scale=scale).transpose(1, 2)


def kernel_of_torch(query, key, value, bounds, _, *longest, scale, window_size, enable_gqa):
    """What `varlen_attn` promises, without a GPU: (N, heads, D), tokens to the left and right."""
    assert bounds.dtype == torch.int32 and longest == (max(LENGTHS), max(LENGTHS)) and enable_gqa
    left, right = window_size
    assert right == 0
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    assert bounds.diff().tolist() == LENGTHS
    return under_a_mask(q, k, v, None if left < 0 else left + 1, scale).squeeze(0)


@pytest.mark.parametrize("way", ["loop", "kernel"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_is_the_attention_under_a_mask_with_its_gradients(window, scale, way, monkeypatch):
    if way == "kernel":
        monkeypatch.setattr(segment_attention, "_fits_varlen", lambda *_: True)
        monkeypatch.setattr(segment_attention.varlen, "varlen_attn", kernel_of_torch)
    inputs = parts()
    found = attend(*inputs, Segments(LENGTHS, CPU), window, scale)
    expected = under_a_mask(*inputs, window, scale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn(found.shape, dtype=found.dtype)
    for a, b in zip(
        torch.autograd.grad(found, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_drops_a_share_of_the_attention():
    query, key, value = parts()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = attend(query, key, torch.ones_like(value), Segments(LENGTHS, CPU), dropout=0.5)
    first = found[0, 0]  # sees itself alone: dropped, or doubled
    assert set(first.flatten().tolist()) == {0.0, 2.0}


def test_calls_without_segments_go_where_they_went():
    serve_segments()
    serving = AttentionInterface()["sdpa"]
    serve_segments()
    assert AttentionInterface()["sdpa"] is serving
    assert serving.__wrapped__ is sdpa_attention_forward
    module, inputs = torch.nn.Module(), parts(heads=2)
    found, _ = serving(module, *inputs, None, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, *inputs, None, scaling=0.3)
    assert torch.equal(found, expected)


class Attention(torch.nn.Module):
    """A layer as models have them, for what it and its config say."""

    def __init__(self, layer_idx=0, is_causal=True, **config):
        super().__init__()
        self.config = type("Config", (), config)
        self.layer_idx, self.is_causal = layer_idx, is_causal


ODD = {
    "softcap": (Attention(), {"softcap": 30.0}),
    "position_bias": (Attention(), {"position_bias": torch.ones(1)}),
    "to come": (Attention(is_causal=False), {}),
    "tokens to come": (Attention(), {"is_causal": False}),
    "window of None": (Attention(sliding_window=4), {}),
    "window of 4": (Attention(), {"sliding_window": 4}),
    "chunked": (Attention(layer_types=["chunked_attention"]), {}),
    "None, its config says None": (Attention(attention_chunk_size=4), {}),
}


@pytest.mark.parametrize("said", ODD)
def test_refuses_what_is_more_than_causal_and_within_a_window(said):
    serve_segments()
    module, asked = ODD[said]
    with pytest.raises(ValueError, match=said):
        AttentionInterface()["sdpa"](
            module, *parts(), None, segments=Segments(LENGTHS, CPU), **asked
        )


def test_an_attention_that_does_not_know_segments_fails():
    mask = segment_attention.no_mask(CPU)
    for tokens in (1, 5):
        x = torch.ones(1, 2, tokens, 4)
        with pytest.raises(RuntimeError):
            scaled_dot_product_attention(x, x, x, mask)
        with pytest.raises(RuntimeError):
            (x @ x.mT + mask).softmax(-1) @ x
