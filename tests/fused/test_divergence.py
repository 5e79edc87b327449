"""KL(reference || model) tile by tile, and the statistics from the same logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmmix.fused import divergence, tiles
from llmmix.fused.divergence import LinearHead, statistics_and_kl
from llmmix.fused.tiles import HeadScaling, TiledLogits
from llmmix.logprobs import STATISTICS, linear_statistics

Z = torch.tensor([[2, 0, -1], [0.5, 1.5, 0], [0, 0, 3]], dtype=torch.float64)
R = torch.tensor([[1, 0.5, -1], [1, 1, 0], [0, 0.5, 2]], dtype=torch.float64)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def test_the_published_numbers():
    z, identity = Z.clone().requires_grad_(), torch.eye(3, dtype=torch.float64)
    reference = LinearHead(R, identity)
    statistics, kl = statistics_and_kl(LinearHead(z, identity), torch.arange(3), reference)
    assert kl.tolist() == pytest.approx([0.214895820888, 0.10237398005, 0.134568333692], rel=1e-10)
    assert kl.mean().item() == pytest.approx(0.150612711543, rel=1e-10)
    expected = [-0.169846019556, -0.464368784108, -0.094922956421]
    assert statistics.log_probs.tolist() == pytest.approx(expected, rel=1e-10)
    (grad,) = torch.autograd.grad(kl.mean(), z, retain_graph=True)
    first = [0.0898992471712, -0.0780040761664, -0.0118951710048]
    assert grad[0].tolist() == pytest.approx(first, rel=1e-10)
    lp = statistics.log_probs
    asft = (-lp.exp().detach() * lp + 0.05 * kl).mean()
    assert asft.item() == pytest.approx(0.181368204015, rel=1e-10)


@pytest.fixture
def small_tiles(monkeypatch):
    """3 rows by 5 columns, which leaves 1 of 7 and 1 of 11."""
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", 3)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 15)


def heads(dtype=torch.float64, n=7, v=11):
    """Hidden, weight and bias of a model, and of a reference of another width."""
    g = torch.Generator().manual_seed(0)
    shapes = ((n, 5), (v, 5), (v,), (n, 6), (v, 6), (v,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def logits(hidden, weight, bias=None, scaling=None):
    scale, cap, temperature = scaling or HeadScaling()
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


def dense(model, targets, reference):
    """Log p of the targets, and the divergence, from all logits."""
    p, q = (logits(*head).log_softmax(-1) for head in (model, reference))
    lp = p.gather(1, targets.reshape(len(p), -1)).view(targets.shape)
    return lp, (q.exp() * (q - p)).sum(-1)


SCALINGS = [
    (HeadScaling(), HeadScaling()),
    (HeadScaling(1.7, 2.0, 1.3), HeadScaling(0.5)),
    (HeadScaling(temperature=0.7), HeadScaling(softcap=3.0)),
]


@pytest.mark.parametrize("scalings", SCALINGS)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("loss", ["kl", "both"])
def test_values_and_gradients_are_the_dense_ones(scalings, trained, loss, small_tiles):
    targets = torch.tensor([[0, 10], [5, 5], [4, 3], [9, 0], [10, 1], [2, 2], [7, 6]])
    upstream = torch.linspace(-1, 1, 7, dtype=torch.float64)
    results = []
    for compute in (statistics_and_kl, dense):
        leaves = heads()
        for i in trained:
            leaves[i].requires_grad_()
        model = LinearHead(*leaves[:3], scalings[0])
        statistics, kl = compute(model, targets, LinearHead(*leaves[3:], scalings[1]))
        lp = statistics.log_probs if compute is statistics_and_kl else statistics
        total = (upstream * kl).sum()
        if loss == "both":
            total = total + (torch.outer(upstream.flip(0), upstream[:2]) * lp).sum()
        results.append([lp, kl, *torch.autograd.grad(total, [leaves[i] for i in trained])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_nothing_flows_to_the_reference_and_statistics_are_those_of_the_head(small_tiles):
    leaves, targets = [x.requires_grad_() for x in heads()], torch.tensor([0, 10, 3, 3, 8, 7, 1])
    scaling = HeadScaling(1.7, 2.0, 1.3)
    model = LinearHead(*leaves[:3], scaling)
    ours, kl = statistics_and_kl(model, targets, LinearHead(*leaves[3:]), STATISTICS, top_k=4)
    options = {"bias": leaves[2], "scaling": scaling, "outputs": STATISTICS, "top_k": 4}
    for a, b in zip(ours, linear_statistics(*leaves[:2], targets, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert [x.requires_grad for x in ours] == [True] + [False] * 5
    (kl + ours.log_probs).sum().backward()
    assert [x.grad is None for x in leaves] == [False] * 3 + [True] * 3


def test_a_shared_weight_is_read_once(small_tiles, monkeypatch):
    read, weights = [], TiledLogits.weights
    monkeypatch.setattr(
        TiledLogits, "weights", lambda self, columns: read.append(columns) or weights(self, columns)
    )
    hidden, weight, bias, *_ = heads()
    other, targets = hidden.flip(0), torch.zeros(7, dtype=torch.long)
    shared = statistics_and_kl(LinearHead(hidden, weight), targets, LinearHead(other, weight, bias))
    assert len(read) == 3 * 3  # blocks of rows by blocks of columns
    copied = LinearHead(other, weight.clone(), bias)
    apart = statistics_and_kl(LinearHead(hidden, weight), targets, copied)
    assert len(read) == 3 * 3 + 2 * 3 * 3
    torch.testing.assert_close(shared, apart, rtol=0, atol=0)


def test_a_model_diverges_from_itself_by_zero(small_tiles):
    """To the last bit, with its gradient: so a run begins where its reference is."""
    hidden, weight, bias, *_ = (x.float().requires_grad_() for x in heads())
    head = LinearHead(hidden, weight, bias)
    _, kl = statistics_and_kl(head, torch.zeros(7, dtype=torch.long), head)
    kl.sum().backward()
    assert not any(x.any() for x in (kl, hidden.grad, weight.grad, bias.grad))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_of_all_logits_is_made(trained, monkeypatch):
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", 64)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 2**13)
    leaves = heads(torch.float32, n=200, v=3000)
    leaves[0].requires_grad_()
    leaves[1].requires_grad_(trained)
    targets = torch.zeros(200, dtype=torch.long)
    with LargestTensor() as seen:
        out, kl = statistics_and_kl(
            LinearHead(*leaves[:3]), targets, LinearHead(*leaves[3:]), STATISTICS
        )
        (out.log_probs + kl).sum().backward()
    assert seen.elements <= 6 * 3000 < 200 * 3000 / 30  # a weight is the largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_computes_in_fp32(dtype, small_tiles):
    """Also under autocast: the inputs are rounded, and what is computed of them is not."""
    leaves, targets = heads(dtype), torch.tensor([0, 10, 3, 3, 8, 7, 1])
    exact = [x.double().requires_grad_() for x in leaves]
    for x in leaves[:3]:
        x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        statistics, kl = statistics_and_kl(
            LinearHead(*leaves[:3]), targets, LinearHead(*leaves[3:])
        )
    lp, expected = dense(exact[:3], targets, exact[3:])
    (kl + statistics.log_probs).sum().backward(), (expected + lp).sum().backward()
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(leaves[:3], exact[:3], strict=True):
        assert x.grad.dtype == dtype
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_infinity_comes_out_as_nan_in_its_row_alone(bad, small_tiles):
    leaves = heads()
    leaves[0][1, 0] = leaves[3][4, 2] = bad
    cap, targets = HeadScaling(softcap=2.0), torch.zeros(7, dtype=torch.long)
    statistics, kl = statistics_and_kl(
        LinearHead(*leaves[:3], cap), targets, LinearHead(*leaves[3:], cap)
    )
    assert kl.isnan().nonzero().flatten().tolist() == [1, 4]
    assert statistics.log_probs.isnan().nonzero().flatten().tolist() == [1]


def test_no_rows_give_no_values_and_a_zero_gradient():
    leaves = heads(n=0)
    leaves[0].requires_grad_(), leaves[1].requires_grad_()
    none = torch.empty(0, dtype=torch.long)
    statistics, kl = statistics_and_kl(LinearHead(*leaves[:3]), none, LinearHead(*leaves[3:]))
    assert kl.shape == statistics.log_probs.shape == (0,)
    kl.sum().backward()
    assert not leaves[1].grad.any()


def test_what_does_not_fit_is_named():
    leaves, targets = heads(), torch.zeros(7, dtype=torch.long)
    model = LinearHead(*leaves[:3])
    with pytest.raises(ValueError, match=r"reference's hidden states must be \(7, 6\)"):
        statistics_and_kl(model, targets, LinearHead(leaves[3][:2], leaves[4]))
    with pytest.raises(ValueError, match="reference's vocabulary has 10 tokens and the model's 11"):
        statistics_and_kl(model, targets, LinearHead(leaves[3], leaves[4][:10]))
    with pytest.raises(ValueError, match=r"`targets` must lie in \[0, 11\)"):
        statistics_and_kl(model, targets - 100, LinearHead(*leaves[3:]))


@pytest.mark.parametrize(
    ("operand", "scalings"), [(torch.float32, SCALINGS[1]), (torch.bfloat16, SCALINGS[0])]
)
def test_with_kernels_it_computes_the_same(operand, scalings, small_tiles, monkeypatch):
    """In Triton's interpreter; a GPU's products are in bf16, its sums are not."""
    kernels = pytest.importorskip("llmmix.fused.kernels")
    monkeypatch.setattr(kernels, "BLOCK", 8)
    targets = torch.tensor([0, 10, 3, 3, 8, 7, 1])
    results = []
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr(divergence, "arithmetic", lambda logits: kernels)
            monkeypatch.setattr(divergence, "operand_dtype", lambda *_: operand)
        leaves = [x.to(operand).float() for x in heads()]
        for x in leaves[:3]:
            x.requires_grad_()
        model = LinearHead(*leaves[:3], scalings[0])
        reference = LinearHead(*leaves[3:], scalings[1])
        statistics, kl = statistics_and_kl(model, targets, reference, STATISTICS, top_k=3)
        (kl - 0.3 * statistics.log_probs).sum().backward()
        results.append([kl, *statistics, *(x.grad for x in leaves[:3])])
    for plain, ours in zip(*results, strict=True):
        if operand == torch.float32:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=5e-6)
        else:  # what enters the second product is rounded to 8 bits
            difference = (ours.float() - plain.float()).abs().max()
            assert difference <= 2**-7 * plain.float().abs().max()
