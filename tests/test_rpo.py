import pytest
import torch

from llmmix import RPOConfig
from llmmix.rpo import rpo_loss

CHOSEN = torch.tensor([-60, -35.5], dtype=torch.float64)
REJECTED = torch.tensor([-70, -30.25], dtype=torch.float64)
REF_CHOSEN = torch.tensor([-62, -36.0], dtype=torch.float64)
REF_REJECTED = torch.tensor([-66, -31.0], dtype=torch.float64)
LENGTHS = torch.tensor([40, 25])
ALL = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


@pytest.mark.parametrize(
    ("beta", "eta", "expected"),
    [
        (0.01, 0, [0.6635971130761409, 0.6943979618097418]),
        (0.01, 0.005, [0.6665971130761409, 0.6961729618097418]),
        (0.05, 0.005, [0.5693552444685271, 0.70829171168279]),
        (0.1, 1, [6.4374879504858855, 4.255725303525525]),
    ],
)
def test_sum_vectors(beta, eta, expected):
    loss = rpo_loss(*ALL, beta=beta, eta=eta)
    torch.testing.assert_close(loss, loss.new_tensor(expected), rtol=1e-10, atol=0)


def test_mean_vectors():
    loss = rpo_loss(*ALL, beta=0.5, eta=0.2, sft_reduction="mean", chosen_lengths=LENGTHS)
    expected = [0.04858735157374206 + 0.2 * 1.5, 0.7575990353171691 + 0.2 * 1.42]
    torch.testing.assert_close(loss, loss.new_tensor(expected), rtol=1e-10, atol=0)
    assert loss.mean().item() == pytest.approx(0.6950931934454556, rel=1e-10)


def test_gradient_vectors():
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    rpo_loss(chosen, rejected, REF_CHOSEN, REF_REJECTED, beta=0.01, eta=0.005).sum().backward()
    expected_chosen = [-0.004900044983805899, -0.005056249996744794]
    expected_rejected = [0.004850044983805899, 0.005006249996744794]
    torch.testing.assert_close(chosen.grad, CHOSEN.new_tensor(expected_chosen))
    torch.testing.assert_close(rejected.grad, CHOSEN.new_tensor(expected_rejected))


def test_large_margins_do_not_overflow():
    big = torch.tensor([-1e5], dtype=torch.float32)
    zero = torch.zeros(1)
    assert rpo_loss(big, zero, zero, zero, beta=1.0, eta=0.0).item() == 1e5
    assert rpo_loss(zero, big, zero, zero, beta=1.0, eta=0.0).item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": -0.1}, "`rpo_eta` must not be negative"),
        ({"sft_reduction": "token"}, "`sft_reduction` must be"),
        ({"sft_reduction": "mean"}, "needs `chosen_lengths`"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rpo_loss(*ALL, **{"beta": 0.1, "eta": 0.1, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rpo_eta": -1.0}, "`rpo_eta` must not be negative"),
        ({"sft_reduction": "x"}, "`sft_reduction` must be"),
        ({"loss_type": ["ipo"]}, "`loss_type` must be"),
        ({"loss_type": ["sigmoid", "sft"]}, "`loss_type` must be"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RPOConfig("out", **change)
