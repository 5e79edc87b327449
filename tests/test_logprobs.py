import pytest
import torch

from llmmix import logprobs
from llmmix.fused import tiles
from llmmix.fused.tiles import HeadScaling
from llmmix.logprobs import keeps_probabilities, linear_logprobs, linear_statistics


def naive(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, -1)
    return logp, logp.gather(-1, targets.reshape(len(hidden), -1)).view(targets.shape)


SCALINGS = [
    {},
    {"logit_scale": 0.25},
    {"softcap": 3.0},
    {"temperature": 0.7},
    {"logit_scale": 1.7, "softcap": 2.0, "temperature": 1.3},
]


def make(n=7, h=5, v=11, k=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=dtype)
    weight = torch.randn(v, h, generator=g, dtype=dtype)
    bias = torch.randn(v, generator=g, dtype=dtype)
    targets = torch.randint(v, (n,) if k is None else (n, k), generator=g)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("k", [None, 1, 2, 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_log_softmax(scaling, k, with_bias):
    hidden, weight, bias, targets = make(k=k)
    bias = bias if with_bias else None
    expected = naive(hidden, weight, targets, bias=bias, **scaling)[1]
    got = linear_logprobs(hidden, weight, targets, bias=bias, **scaling)
    assert got.shape == targets.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=["one tile", "row by row", "uneven tiles"])
def tiling(request, monkeypatch):
    """One tile; one row by one column; 3 rows by 5 columns, which leaves 1 of 7 and 1 of 11."""
    rows, elements = {"one tile": (100, 10**6), "row by row": (1, 1), "uneven tiles": (3, 15)}[
        request.param
    ]
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", rows)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", elements)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputing", "keeping"])
@pytest.mark.parametrize("loss", ["log_probs", "log_probs and entropy"])
def test_gradients_pass_gradcheck(scaling, budget, loss, monkeypatch):
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", 3)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 15)
    hidden, weight, bias, targets = make(k=2)
    for x in (hidden, weight, bias):
        x.requires_grad_()

    def outputs(hidden, weight, bias):
        out = linear_statistics(
            hidden,
            weight,
            targets,
            bias=bias,
            scaling=HeadScaling(**scaling),
            outputs=("log_probs", "entropy"),
            memory_budget=budget,
        )
        return out.log_probs if loss == "log_probs" else (out.log_probs, out.entropy)

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("loss", ["log_probs", "entropy"])
def test_each_gradient_is_right_alone(trained, loss, tiling):
    given = dict(zip(("hidden", "weight", "bias", "targets"), make(k=5), strict=True))
    given[trained].requires_grad_()
    out = linear_statistics(**given, outputs=("entropy",))
    (got,) = torch.autograd.grad(getattr(out, loss).pow(2).sum(), given[trained], retain_graph=True)
    (again,) = torch.autograd.grad(getattr(out, loss).pow(2).sum(), given[trained])
    assert torch.equal(got, again)  # what was saved is not used up
    logp, chosen = naive(**given)
    plain = chosen if loss == "log_probs" else -(logp.exp() * logp).sum(-1)
    (expected,) = torch.autograd.grad(plain.pow(2).sum(), given[trained])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_probabilities_are_kept_only_within_the_budget_and_for_a_trained_head():
    hidden, weight, _, _ = make(dtype=torch.float32)
    assert not keeps_probabilities(hidden, weight)
    weight.requires_grad_()
    assert keeps_probabilities(hidden, weight, 7 * 11 * 4)
    assert not keeps_probabilities(hidden, weight, 7 * 11 * 4 - 1)


def saved_for_backward(budget, **requires):
    hidden, weight, _, targets = make(n=64, v=1000, dtype=torch.float32)
    hidden.requires_grad_(requires.get("hidden", True))
    weight.requires_grad_(requires.get("weight", True))
    inputs = {hidden.data_ptr(), weight.data_ptr()}
    sizes = []

    def pack(x):
        sizes.append(0 if x.data_ptr() in inputs else x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_statistics(hidden, weight, targets, memory_budget=budget)
    return sum(sizes)


def test_what_is_saved_does_not_grow_with_the_vocabulary_beyond_the_budget():
    assert saved_for_backward(2**30) >= 64 * 1000
    assert saved_for_backward(0) < 64 * 20
    assert saved_for_backward(2**30, weight=False) < 64 * 20
    assert saved_for_backward(0, hidden=False, weight=True) < 64 * 10


def test_statistics_match_their_definitions(tiling):
    hidden, weight, bias, targets = make(n=9)
    logp, chosen = naive(hidden, weight, targets, bias=bias)
    out = linear_statistics(hidden, weight, targets, bias=bias, outputs=logprobs.STATISTICS)
    p = logp.exp()
    torch.testing.assert_close(out.log_probs, chosen)
    torch.testing.assert_close(out.entropy, -(p * logp).sum(-1))
    torch.testing.assert_close(out.log_sum_sq_probs, (p**2).sum(-1).log())
    torch.testing.assert_close(out.mean_logits, (hidden @ weight.T + bias).mean(-1))
    assert torch.equal(out.is_top1, logp.argmax(-1) == targets)
    torch.testing.assert_close(out.top_k_entropy, out.entropy)  # 20 of 11 tokens are all


def test_of_equal_logits_the_first_counts_as_the_most_likely(tiling):
    hidden, weight = torch.ones(7, 3), torch.zeros(11, 3)
    targets = torch.tensor([0, 1, 4, 5, 6, 10, 0])
    out = linear_statistics(hidden, weight, targets, outputs=("is_top1",))
    assert out.is_top1.tolist() == [True, False, False, False, False, False, True]
    weight[[2, 7]] = 1.0  # two equal maxima, in one tile or in two
    out = linear_statistics(
        hidden, weight, torch.tensor([0, 2, 7, 2, 7, 1, 10]), outputs=("is_top1",)
    )
    assert out.is_top1.tolist() == [False, True, False, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputing", "keeping"])
def test_error_is_no_more_than_twice_what_the_plain_computation_makes(dtype, scaling, budget):
    """Of the value and of each gradient, against fp64, beside the plain computation in fp32."""
    hidden, weight, bias, targets = make(n=64, h=48, v=501, k=2, dtype=torch.float32)
    inputs = [x.to(dtype) for x in (hidden, weight, bias)]

    def errors(function, to, truth=None):
        leaves = [x.detach().to(to).requires_grad_() for x in inputs]
        value = function(*leaves)
        value.backward(torch.linspace(-1, 1, value.numel()).view_as(value).to(value.dtype))
        return [x.double() for x in (value.detach(), *(leaf.grad for leaf in leaves))]

    def plain(hidden, weight, bias):
        return naive(hidden, weight, targets, bias=bias, **scaling)[1]

    def ours(hidden, weight, bias):
        return linear_statistics(
            hidden,
            weight,
            targets,
            bias=bias,
            scaling=HeadScaling(**scaling),
            memory_budget=budget,
        ).log_probs

    truth, native = errors(plain, torch.float64), errors(plain, torch.float32)
    if dtype == torch.bfloat16:  # the gradients are then handed over in bf16
        native = [native[0], *(x.bfloat16().double() for x in native[1:])]
    for ours_, native_, truth_ in zip(errors(ours, dtype), native, truth, strict=True):
        assert (ours_ - truth_).abs().max() <= 2 * (native_ - truth_).abs().max()


def test_logits_far_apart_are_exact():
    """Probabilities that underflow, which the floor under the exponential must not distort."""
    hidden, weight, _, targets = make(n=32, h=16, v=300, dtype=torch.float32)
    hidden = (hidden * 40).requires_grad_()
    plain = hidden.detach().clone().requires_grad_()
    got, (logp, expected) = linear_logprobs(hidden, weight, targets), naive(plain, weight, targets)
    assert logp.min() < -300
    torch.testing.assert_close(got, expected)
    got.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(hidden.grad, plain.grad, rtol=1e-5, atol=1e-4)


def test_gradient_has_the_dtype_of_its_input():
    hidden, weight, _, targets = make(dtype=torch.float32)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    linear_logprobs(hidden, weight, targets).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_autocast_does_not_lower_the_precision():
    hidden, weight, _, targets = make(n=32, h=64, v=101, dtype=torch.float32)
    plain = linear_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprobs(hidden, weight, targets)
    assert torch.equal(plain, inside)


def test_no_rows_give_no_values_and_a_zero_gradient():
    hidden, weight, _, _ = make()
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    assert out.shape == (0,)
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_frozen_head_gets_no_gradient():
    hidden, weight, _, targets = make()
    hidden.requires_grad_()
    linear_logprobs(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_nan_or_infinity_in_hidden_states_comes_out_as_nan(bad, scaling, tiling):
    hidden, weight, bias, targets = make()
    hidden[2, 0] = bad
    scaling = HeadScaling(**scaling)
    out = linear_statistics(
        hidden, weight.abs(), targets, bias=bias, scaling=scaling, outputs=("entropy",)
    )
    for x in (out.log_probs, out.entropy):
        assert x[2].isnan() and x[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_a_model_compiled_around_it_gives_the_same():
    hidden, weight, _, targets = make(dtype=torch.float32)
    weight.requires_grad_()

    def loss(hidden, weight):
        return -linear_logprobs(torch.tanh(hidden), weight, targets).mean()

    expected = loss(hidden, weight)
    got = torch.compile(loss, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(got, expected)
    a, b = (torch.autograd.grad(x, weight)[0] for x in (got, expected))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([-100] * 7)}, r"`targets` must lie in \[0, 11\).*-100"),
        ({"targets": torch.tensor([11] * 7)}, "`targets` must lie"),
        ({"targets": torch.zeros(6, dtype=torch.long)}, r"`targets` must be \(N,\) or \(N, K\)"),
        ({"weight": torch.zeros(11, 4)}, "same H"),
        ({"bias": torch.zeros(3)}, "`bias` must be"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    hidden, weight, bias, targets = make()
    given = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**given)


def test_unknown_output_is_refused():
    hidden, weight, _, targets = make()
    with pytest.raises(ValueError, match="logits"):
        linear_statistics(hidden, weight, targets, outputs=("logits",))
