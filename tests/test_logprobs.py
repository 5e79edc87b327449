import pytest
import torch

from llmmix import logprobs
from llmmix.logprobs import HeadScaling, linear_logprobs, linear_statistics


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


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tile_rows", [1, 3, 100])
def test_gradients_pass_gradcheck_whatever_the_tile(scaling, tile_rows, monkeypatch):
    hidden, weight, bias, targets = make(k=2)
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", tile_rows * weight.size(0))
    for x in (hidden, weight, bias):
        x.requires_grad_()

    def both(hidden, weight, bias):
        out = linear_statistics(
            hidden,
            weight,
            targets,
            bias=bias,
            scaling=HeadScaling(**scaling),
            outputs=("log_probs", "entropy"),
        )
        return out.log_probs, out.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_statistics_match_their_definitions():
    hidden, weight, bias, targets = make(n=9)
    logp, chosen = naive(hidden, weight, targets, bias=bias)
    out = linear_statistics(hidden, weight, targets, bias=bias, outputs=logprobs.STATISTICS)
    p = logp.exp()
    torch.testing.assert_close(out.log_probs, chosen)
    torch.testing.assert_close(out.entropy, -(p * logp).sum(-1))
    torch.testing.assert_close(out.log_sum_sq_probs, (p**2).sum(-1).log())
    torch.testing.assert_close(out.mean_logits, (hidden @ weight.T + bias).mean(-1))
    assert torch.equal(out.is_top1, logp.argmax(-1) == targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_more_than_the_plain_computation_makes_unavoidable(dtype):
    hidden, weight, _, targets = make(n=64, h=48, v=501, dtype=torch.float32)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    truth = naive(hidden.double(), weight.double(), targets)[1]
    plain = naive(hidden.float(), weight.float(), targets)[1]
    got = linear_logprobs(hidden, weight, targets)
    assert got.dtype == torch.float32
    unavoidable = (plain - truth).abs().max()
    assert (got - truth).abs().max() <= 2 * unavoidable


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


def test_nan_in_hidden_states_comes_out_as_nan():
    hidden, weight, _, targets = make()
    hidden[2, 0] = float("nan")
    out = linear_logprobs(hidden, weight, targets)
    assert out[2].isnan() and not out[[0, 1, 3]].isnan().any()


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
