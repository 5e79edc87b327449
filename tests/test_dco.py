import math

import pytest
import torch
import torch.nn.functional as F

from llmmix import DCOConfig
from llmmix.dco import dco_loss, dco_weight

# F(N, p) and -log(1 - (1-p)^N), computed with 700 digits
WEIGHTS = {
    1e-8: [0.99999999, 0.99999998, 0.99999992, 0.99999969, 0.99999873, 0.99997953],
    1e-4: [0.99995, 0.99985, 0.99925014, 0.9968531, 0.98730334, 0.80917368],
    0.01: [0.99497487, 0.98497538, 0.92639876, 0.71622477, 0.21364399, 5.4762318e-17],
    0.1: [0.94736842, 0.84792091, 0.40435329, 0.008394028, 5.4964195e-11, 1.7196343e-185],
    0.5: [0.66666667, 0.26666667, 2.4414435e-4, 3.469447e-18, 2.2108592e-75, 0],
    0.9: [0.18181818, 0.00360036, 1.44e-14, 5.76e-62, 2.304e-253, 0],
}
WEIGHT_N = [2, 4, 16, 64, 256, 4096]
LOSSES = {
    1e-300: [690.7755279, 690.0823807, 689.3892335, 688.0029392, 686.6166448, 685.2303505],
    1e-8: [18.42068074, 17.72753357, 17.0343864, 15.6480921, 14.26179798, 12.87550457],
    1e-3: [6.907755279, 6.215108223, 5.522961043, 4.142659674, 2.780217166, 1.487409762],
    0.1: [2.302585093, 1.660731207, 1.067404362, 0.2049378097, 0.001179714047, 1.932334983e-12],
    0.5: [0.6931471806, 0.2876820725, 0.06453852114, 1.525890548e-5, 5.421e-20, 8.6e-78],
}
LOSS_N = [1, 2, 4, 16, 64, 256]


@pytest.mark.parametrize("p", WEIGHTS)
def test_weight_matches_the_published_table(p):
    logps = torch.tensor([math.log(p)], dtype=torch.float64)
    got = [dco_weight(logps, n).item() for n in WEIGHT_N]
    assert got == pytest.approx(WEIGHTS[p], rel=1e-3 if p == 0.9 else 1e-7, abs=1e-300)


@pytest.mark.parametrize("p", LOSSES)
def test_loss_matches_the_published_table(p):
    logps = torch.tensor([math.log(p)], dtype=torch.float64)
    got = [dco_loss(logps, n).item() for n in LOSS_N]
    # the last columns are printed with two to four digits
    assert got[:4] == pytest.approx(LOSSES[p][:4], rel=1e-8)
    assert got[4:] == pytest.approx(LOSSES[p][4:], rel=5e-3)


def test_log_space_vectors_and_gradient():
    logps = torch.tensor([0, -1e-300, -1e-12, -0.5, -6, -700, -5000], dtype=torch.float64)
    logps.requires_grad_()
    loss = dco_loss(logps, 64)
    loss.sum().backward()
    expected_loss = [0, 0, 0, 1.1865810747147635e-26, 1.9182438019197212]
    expected_loss += [695.8411169166403, 4995.84111691664]
    expected_grad = [0, 0, 0, -1.1706289312786959e-24, -0.9238289301927933, -1, -1]
    torch.testing.assert_close(loss, loss.new_tensor(expected_loss), rtol=1e-10, atol=1e-40)
    torch.testing.assert_close(logps.grad, loss.new_tensor(expected_grad), rtol=1e-10, atol=1e-40)


def test_long_completions_are_cross_entropy_minus_log_n():
    logps = torch.tensor([-2000.0, -800.0, -100.0, -50.0], dtype=torch.float64)
    expected = [1994.4548225555204, 794.4548225555204, 94.45482255552044, 44.45482255552044]
    torch.testing.assert_close(dco_loss(logps, 256), logps.new_tensor(expected))
    assert torch.equal(dco_weight(logps, 256), torch.ones_like(logps))


@pytest.mark.parametrize(
    ("dtype", "rtol_loss", "rtol_weight"),
    [(torch.float64, 1e-13, 1e-13), (torch.float32, 1e-5, 2e-5)],
)
@pytest.mark.parametrize("n", [2, 64, 4096])
def test_relative_error_over_six_hundred_nats(n, dtype, rtol_loss, rtol_weight):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 300
    logps = -torch.logspace(-6, math.log10(600), 60, dtype=torch.float64).to(dtype)
    loss, weight = dco_loss(logps, n).tolist(), dco_weight(logps, n).tolist()
    for lp, got_loss, got_weight in zip(logps.tolist(), loss, weight, strict=True):
        p = mpmath.e ** mpmath.mpf(lp)
        cover = 1 - (1 - p) ** n
        if (truth := -mpmath.log(cover)) > 1e-30:
            assert got_loss == pytest.approx(float(truth), rel=rtol_loss)
        if (truth := n * p * (1 - p) ** (n - 1) / cover) > 1e-30:
            assert got_weight == pytest.approx(float(truth), rel=rtol_weight)


def test_gradcheck():
    logps = torch.tensor([-0.3, -1, -4, -9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dco_loss(x, 16), logps)


def test_weight_falls_with_p_and_with_n():
    logps = torch.linspace(-12, -0.01, 50, dtype=torch.float64)
    weights = torch.stack([dco_weight(logps, n) for n in (1, 2, 4, 16, 64, 256)])
    assert (weights.diff(dim=1) <= 0).all() and (weights.diff(dim=0) <= 0).all()


def test_worked_example_from_logits():
    logits = torch.tensor([[2.0, 0, -1], [0.5, 1.5, 0], [0, 0, 3], [1, 1, 1]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    logps = -F.cross_entropy(logits[:-1], labels, reduction="sum").reshape(1)
    assert logps.item() == pytest.approx(-0.7291377600851915)
    assert dco_loss(logps, 4).item() == pytest.approx(0.07452682131369738)
    assert dco_weight(logps, 4).item() == pytest.approx(0.2883622651991807)
    assert (dco_weight(logps, 4) * -logps / 3).item() == pytest.approx(0.07008527204680752)


def test_low_precision_input_is_computed_in_fp32():
    logps = torch.tensor([-3.0, -0.5], dtype=torch.bfloat16, requires_grad=True)
    loss = dco_loss(logps, 8)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert logps.grad.dtype == torch.bfloat16


def test_nan_stays_nan():
    assert dco_loss(torch.tensor([float("nan")]), 4).isnan().all()


def test_weights_multiply_the_loss_of_a_row_and_the_divisor_counts_rows():
    """Rows of 4, 1, 3 and 3 tokens, one behind the other; the second has nothing scored."""
    log_probs = [0, -0.5, -0.7, 0, 0, -0.25, -1.2, 0, -0.1, -0.2]  # of each token but the first
    row_of = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3, 3])
    values = torch.tensor(log_probs, dtype=torch.float64)
    logps = torch.zeros(4, dtype=torch.float64).index_add(0, row_of, values)
    scored = torch.tensor([True, False, True, True])
    losses = dco_loss(logps, 4) * scored
    expected = [0.27242010352, 0, 0.420464750974, 0.00452271887885]
    assert losses.tolist() == pytest.approx(expected, rel=1e-10)
    weights = torch.tensor([1, 1, 0.5, 2], dtype=torch.float64)
    assert (losses.sum() / 3).item() == pytest.approx(0.232469191124, rel=1e-10)
    assert ((weights * losses).sum() / 3).item() == pytest.approx(0.163899305588, rel=1e-10)
    for n, mean in ((1, 0.983333333333), (16, 0.00573976592277)):
        assert ((dco_loss(logps, n) * scored).sum() / 3).item() == pytest.approx(mean, rel=1e-10)


def test_bad_n_is_refused():
    with pytest.raises(ValueError, match="`n_samples` must be at least 1, got 0"):
        dco_loss(torch.zeros(1), 0)
    with pytest.raises(ValueError, match="`n_samples` must be at least 1"):
        DCOConfig("out", n_samples=0)
    with pytest.raises(ValueError, match="`reduction` must be"):
        DCOConfig("out", reduction="mean")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_samples": "64"}, "`n_samples` must be a whole number, got '64'"),
        ({"votes": 2.5}, "`votes` must be a whole number, got 2.5"),
        ({"padding_free": "false"}, "`padding_free` must be true or false, got 'false'"),
        ({"reduction": None}, "`reduction` must be text, got None"),
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DCOConfig("out", **given)


@pytest.mark.slow
def test_training_for_pass_at_n_orders_coverage_and_accuracy():
    """Noisy 32-way answers: larger N covers more with 64 draws and hits less with one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512 + 512, 16, generator=generator)
    truth = (2 * x @ torch.randn(16, 32, generator=generator) / 4).softmax(-1)
    y = torch.multinomial(truth, 1, generator=generator).squeeze(1)
    results = {}
    for n in (1, 4, 16, 64):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            *(torch.nn.Linear(16, 256), torch.nn.ReLU()),
            *(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32)),
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(400):
            logps = net(x[:512]).log_softmax(-1).gather(1, y[:512, None]).squeeze(1)
            optimizer.zero_grad()
            dco_loss(logps, n).mean().backward()
            optimizer.step()
        with torch.no_grad():
            p = net(x[512:]).softmax(-1).gather(1, y[512:, None]).squeeze(1)
        results[n] = p.mean().item(), (1 - (1 - p) ** 64).mean().item()
    accuracy, coverage = zip(*results.values(), strict=True)
    assert list(accuracy) == sorted(accuracy, reverse=True), results
    assert all(b - a > 0.05 for a, b in zip(coverage, coverage[1:], strict=False)), results
