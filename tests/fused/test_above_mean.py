"""A target's logit above the mean logit: the identity of label smoothing, values and gradients."""

import pytest
import torch

from llmmix.fused import tiles
from llmmix.fused.above_mean import linear_above_mean
from llmmix.fused.tiles import HeadScaling
from llmmix.logprobs import linear_logprobs

Z = torch.tensor([[2, 0, -1], [0.5, 1.5, 0], [0, 0, 3]], dtype=torch.float64)


def test_label_smoothing_on_the_published_numbers():
    z, weight, labels = Z.clone().requires_grad_(), torch.eye(3).double(), torch.arange(3)
    loss = -linear_logprobs(z, weight, labels) + 0.1 * linear_above_mean(z, weight, labels)
    expected = [0.336512686223, 0.547702117441, 0.294922956421]
    assert loss.tolist() == pytest.approx(expected, rel=1e-10)
    loss.mean().backward()
    row = [0.0659635214296, -0.101600538041, 0.0356370166109]
    assert z.grad[1].tolist() == pytest.approx(row, rel=1e-10)
    plain = torch.nn.functional.cross_entropy(Z, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss.detach(), plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("trained", [(0, 1, 2), (0,), (1,), (2,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_logits(trained, dtype, monkeypatch):
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 15)  # the mean of the rows in several blocks
    g = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (11, 5), (11,))
    ours = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    exact = [x.double() for x in ours]
    targets = torch.tensor([0, 10, 3, 3, 3, 7, 1])
    for i in trained:
        ours[i].requires_grad_(), exact[i].requires_grad_()
    hidden, weight, bias = ours
    got = linear_above_mean(hidden, weight, targets, bias=bias, scaling=HeadScaling(1.7, None, 0.7))
    z = (exact[0] @ exact[1].T + exact[2]) * 1.7 / 0.7
    expected = z.gather(1, targets[:, None]).squeeze(1) - z.mean(1)
    assert got.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    tolerance = 1e-5 if dtype == torch.bfloat16 else 1e-10
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 1, 7, dtype=torch.float64)
    got.backward(upstream.to(got.dtype)), expected.backward(upstream)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert (a.grad is None) == (i not in trained)
        if i in trained and dtype == torch.bfloat16:  # the gradient is handed over in bf16
            torch.testing.assert_close(a.grad, b.grad.bfloat16(), rtol=2**-7, atol=1e-6)
        elif i in trained:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_no_rows_give_no_values_and_a_zero_gradient():
    hidden, weight = torch.ones(2, 5, requires_grad=True), torch.ones(11, 5, requires_grad=True)
    out = linear_above_mean(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    assert out.shape == (0,)
    out.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_cap_and_bad_targets_are_refused():
    hidden, weight, targets = torch.ones(2, 5), torch.ones(11, 5), torch.tensor([3, -100])
    with pytest.raises(ValueError, match=r"softcap 30\.0"):
        linear_above_mean(hidden, weight, targets, scaling=HeadScaling(softcap=30.0))
    with pytest.raises(ValueError, match=r"`targets` must lie in \[0, 11\).*-100"):
        linear_above_mean(hidden, weight, targets)
    with pytest.raises(ValueError, match=r"`targets` must be \(N,\)"):
        linear_above_mean(hidden, weight, targets[:, None])
