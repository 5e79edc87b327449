"""The Triton kernels against the torch they stand for; without a GPU, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from llmmix import logprobs
from llmmix.fused import device, kernels, tiles
from llmmix.fused.tiles import HeadScaling
from llmmix.logprobs import STATISTICS, linear_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALINGS = [{}, {"temperature": 0.7}, {"logit_scale": 1.7, "softcap": 2.0, "temperature": 1.3}]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """3 rows by 16 columns, in blocks of 8: more than one of each, and one left over."""
    kind = "cpu" if DEVICE == "cpu" else "gpu"
    monkeypatch.setitem(tiles.TILE_ROWS, kind, 3)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, kind, 48)
    monkeypatch.setattr(kernels, "BLOCK", 8)


def run(monkeypatch, arithmetic, operand, inputs, targets, scaling, budget, loss):
    monkeypatch.setattr(logprobs, "arithmetic", lambda logits: arithmetic)
    monkeypatch.setattr(logprobs, "operand_dtype", lambda *_: operand)  # bf16 is for GPUs alone
    leaves = [x.clone().requires_grad_() for x in inputs]
    hidden, weight, bias = leaves
    out = linear_statistics(
        hidden,
        weight,
        targets,
        bias=bias,
        scaling=scaling,
        outputs=STATISTICS,
        memory_budget=budget,
    )
    g = torch.linspace(-1, 1, out.log_probs.numel(), device=DEVICE).view_as(out.log_probs)
    total = (g * out.log_probs).sum()
    if loss == "entropy":
        total = total + out.entropy.square().sum()
    total.backward()
    return [x.float() for x in (*out, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputing", "keeping"])
@pytest.mark.parametrize("loss", ["log_probs", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_do_what_the_torch_does(scaling, budget, loss, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (50, 5), (50,))
    inputs = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    targets = torch.randint(50, (7, 2), generator=generator).to(DEVICE)
    targets = targets.T.contiguous().T  # one column after the other: any strides will do
    targets[0, 0] = (inputs[0] @ inputs[1].T + inputs[2]).float().argmax(1)[0]
    given = (inputs, targets, HeadScaling(**scaling), budget, loss)
    expected = run(monkeypatch, tiles, torch.float32, *given)
    assert expected[STATISTICS.index("is_top1")].any()
    for got, exact in zip(run(monkeypatch, kernels, dtype, *given), expected, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=2e-6)
        else:  # what enters the second product is rounded to 8 bits
            assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_kernels_are_for_a_gpu_with_triton_and_fp32_sums(monkeypatch):
    logits = torch.zeros(2, 2)
    assert device.arithmetic(logits) is tiles
    monkeypatch.setattr(device, "has_kernels", lambda x: True)
    assert device.arithmetic(logits) is kernels
    assert device.arithmetic(logits.double()) is tiles


def test_nan_and_no_rows_and_equal_logits():
    weight, targets = torch.ones(50, 5, device=DEVICE), torch.tensor([0, 1, 40], device=DEVICE)
    hidden = torch.ones(3, 5, device=DEVICE)
    hidden[1, 0] = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "arithmetic", lambda logits: kernels)
        out = linear_statistics(hidden, weight, targets, outputs=("is_top1", "entropy"))
        none = linear_statistics(hidden[:0], weight, targets[:0])
    assert out.log_probs.isnan().tolist() == [False, True, False]
    assert out.is_top1.tolist() == [True, False, False]  # the first of equals
    assert none.log_probs.shape == (0,)
