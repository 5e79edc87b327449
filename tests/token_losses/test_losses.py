"""The losses of a token: values and weights worked out by hand, and identities between them."""

import math

import pytest
import torch

from llmmix.token_losses import (
    asft_loss,
    deft_loss,
    dft_loss,
    eaft_loss,
    focal_loss,
    gce_loss,
    gem_loss,
    label_smoothing_loss,
    nll_loss,
    psft_loss,
    select_loss,
    select_mask,
    threshold_loss,
    token_weight,
)

P = torch.tensor([1e-6, 0.01, 0.1, 0.25, 0.5, 0.9, 0.99], dtype=torch.float64)
LOGITS = torch.tensor([[2, 0, -1], [0.5, 1.5, 0], [0, 0, 3]], dtype=torch.float64)
REFERENCE = torch.tensor([[1, 0.5, -1], [1, 1, 0], [0, 0.5, 2]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_vector(found, *values, digits=1e-10):
    torch.testing.assert_close(found, vector(*values), rtol=digits, atol=0)


def label_log_probs(logits):
    return logits.log_softmax(-1).gather(-1, LABELS[:, None]).squeeze(-1)


def kl_to_reference(logits):
    reference = REFERENCE.log_softmax(-1)
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)


def above_mean(logits):
    return logits.gather(-1, LABELS[:, None]).squeeze(-1) - logits.mean(-1)


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def log_sum_sq(logits):
    return (2 * logits.log_softmax(-1)).logsumexp(-1)


def gradient(loss):
    """The gradient in the logits of a mean over the tokens of the example."""
    logits = LOGITS.clone().requires_grad_()
    loss(logits).mean().backward()
    return logits.grad


OLD = vector(-0.5, -0.45, -0.095)
# Each loss with its other arguments, on the three tokens above
CALLS = {
    "nll": (nll_loss, {}),
    "dft": (dft_loss, {}),
    "gce": (gce_loss, {"q": 0.7}),
    "gce above one": (gce_loss, {"q": 10.0}),
    "gce below zero": (gce_loss, {"q": -1.0}),
    "threshold": (threshold_loss, {"p": 0.7, "keep": "top", "q": 1.0}),
    "threshold bottom": (threshold_loss, {"p": 0.7, "keep": "bottom"}),
    "deft": (deft_loss, {"log_sum_sq_probs": log_sum_sq(LOGITS)}),
    "psft": (psft_loss, {"old_log_probs": OLD, "clip_low": 0.2, "clip_high": 0.28}),
    "focal": (focal_loss, {"gamma": 2.0}),
    "focal below one": (focal_loss, {"gamma": 0.5}),
    "label_smoothing": (label_smoothing_loss, {"above_mean": above_mean(LOGITS), "factor": 0.1}),
    "gem": (gem_loss, {"beta": 0.7}),
    "select": (select_loss, {"selected": torch.tensor([True, False, True])}),
}


@pytest.mark.parametrize(
    ("q", "values"),
    [
        (-1, (999999, 99, 9, 3, 1, 0.1111111111, 0.0101010101)),
        (
            0.7,
            (
                *(1.428481292, 1.371698976, 1.143533955, 0.8872440834),
                *(0.5491825619, 0.1015690033, 0.01001506538),
            ),
        ),
        (
            10,
            (
                *(0.1, 0.1, 0.09999999999, 0.09999990463),
                *(0.09990234375, 0.06513215599, 0.009561792499),
            ),
        ),
    ],
    ids=str,
)
def test_gce_by_probability(q, values):
    assert_vector(gce_loss(P.log(), q), *values, digits=1e-9)
    torch.testing.assert_close(token_weight("gce", P.log(), q=q), P**q, rtol=1e-10, atol=0)


def test_dft_and_focal_by_probability():
    assert_vector(
        dft_loss(P.log()),
        *(1.381551056e-5, 0.04605170186, 0.2302585093, 0.3465735903),
        *(0.3465735903, 0.09482446409, 0.009949832495),
        digits=1e-9,
    )
    assert_vector(
        focal_loss(P.log(), 2),
        *(13.81548293, 4.513527299, 1.865093925, 0.7797905781),
        *(0.1732867951, 0.001053605157, 1.005033585e-6),
        digits=1e-9,
    )
    assert_vector(
        token_weight("focal", P.log(), gamma=2.0),
        *(1.000025631, 1.07128237, 1.224465317, 1.082360385),
        *(0.5965735903, 0.02896489282, 2.989966499e-4),
        digits=1e-9,
    )
    assert_vector(
        token_weight("focal", P.log(), gamma=0.5),
        *(1.000006408, 1.018129288, 1.070040188, 1.066119759),
        *(0.9521713171, 0.4661584082, 0.1497491625),
        digits=1e-9,
    )


def test_values_on_three_tokens():
    lp = label_log_probs(LOGITS)
    assert nll_loss(lp).mean().item() == pytest.approx(0.243045920028, rel=1e-10)
    assert_vector(dft_loss(lp), 0.143315176974, 0.291870510224, 0.0863270181152)
    assert_vector(deft_loss(lp, log_sum_sq(LOGITS)), 0.15978121782, 0.417357201994, 0.0912748772465)
    assert_vector(
        token_weight("deft", lp, log_sum_sq_probs=log_sum_sq(LOGITS)),
        *(0.883871818877, 0.804599576692, 0.924133522041),
    )
    assert_vector(psft_loss(lp, OLD, 0.2, 0.28), -1.28, -0.985733954207, -1.00007704655)
    assert_vector(token_weight("psft", lp, **CALLS["psft"][1]), 0.0, 0.985733954207, 1.00007704655)
    assert_vector(
        label_smoothing_loss(lp, above_mean(LOGITS), 0.1),
        *(0.336512686223, 0.547702117441, 0.294922956421),
    )
    assert_vector(
        gem_loss(label_log_probs(LOGITS / 0.7), 0.7),
        *(0.0481433121918, 0.213678095592, 0.0190088517628),
    )


@pytest.mark.parametrize(
    ("alpha", "top_k", "mean"),
    [(1.0, 20, 0.0605908594036), (1.0, 3, 0.165221156608), (2.0, 20, 0.0163641641676)],
)
def test_eaft_is_gated_by_entropy(alpha, top_k, mean):
    lp = label_log_probs(LOGITS)
    found = eaft_loss(lp, entropy(LOGITS), alpha, top_k).mean().item()
    assert found == pytest.approx(mean, rel=1e-10)


@pytest.mark.parametrize(("alpha", "mean"), [(0.05, 0.181368204015), (0.1, 0.188898839592)])
def test_asft_adds_the_divergence(alpha, mean):
    lp, kl = label_log_probs(LOGITS), kl_to_reference(LOGITS)
    assert asft_loss(lp, kl, alpha).mean().item() == pytest.approx(mean, rel=1e-10)


def test_threshold_keeps_one_side_and_counts_all():
    lp = label_log_probs(LOGITS)
    top = threshold_loss(lp, 0.7, "top", q=1.0)
    assert top.mean().item() == pytest.approx(0.082254089002, rel=1e-10)
    assert (top > 0).tolist() == [True, False, True]
    bottom = threshold_loss(lp, 0.7, "bottom")
    assert_vector(bottom, 0.0, 0.464368784108, 0.0)


def test_gradients_in_the_logits():
    def asft(logits):
        return asft_loss(label_log_probs(logits), kl_to_reference(logits), 1.0) - dft_loss(
            label_log_probs(logits)
        )

    def smooth(logits):
        return label_smoothing_loss(label_log_probs(logits), above_mean(logits), 0.1)

    dft = gradient(lambda logits: dft_loss(label_log_probs(logits)))
    assert_vector(dft[0], -0.043935060181, 0.0321191026479, 0.011815957533)
    assert_vector(dft[1], 0.0484438512984, -0.0778265323855, 0.0293826810871)
    assert_vector(dft[2], 0.0137260718281, 0.0137260718281, -0.0274521436563)
    row = gradient(asft)[0]
    assert_vector(row, 0.0898992471712, -0.0780040761664, -0.0118951710048)
    assert_vector(gradient(smooth)[1], 0.0659635214296, -0.101600538041, 0.0356370166109)
    gem = gradient(lambda logits: gem_loss(label_log_probs(logits / 0.7), 0.7))
    assert_vector(gem[0], -0.02215479365, 0.0178717985939, 0.0042829950561)


def test_dft_has_the_gradient_of_one_minus_p_and_of_gce_with_q_one():
    dft = gradient(lambda logits: dft_loss(label_log_probs(logits)))
    for other in (
        lambda logits: 1 - label_log_probs(logits).exp(),
        lambda logits: gce_loss(label_log_probs(logits), 1.0),
    ):
        torch.testing.assert_close(gradient(other), dft, rtol=1e-12, atol=1e-15)
    # and its value rises while the model learns, up to p = 1/e
    values = dft_loss(torch.linspace(0.01, 1 / math.e, 9, dtype=torch.float64).log())
    assert (values.diff() > 0).all()


def test_smoothing_is_that_of_uniform_labels_and_gem_is_its_own_form():
    def uniform(logits):
        log_probs = logits.log_softmax(-1)
        return 0.9 * -label_log_probs(logits) + 0.1 * -log_probs.mean(-1)

    def smooth(logits):
        return label_smoothing_loss(label_log_probs(logits), above_mean(logits), 0.1)

    def gem_paper(logits):
        log_probs, q = logits.log_softmax(-1), (logits / 0.7).softmax(-1).detach()
        return -(q * (label_log_probs(logits)[:, None] - log_probs)).sum(-1)

    torch.testing.assert_close(smooth(LOGITS), uniform(LOGITS), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(smooth), gradient(uniform), rtol=1e-12, atol=1e-15)
    gem = gradient(lambda logits: gem_loss(label_log_probs(logits / 0.7), 0.7))
    torch.testing.assert_close(gem, gradient(gem_paper), rtol=1e-12, atol=1e-15)


def test_losses_whose_setting_is_off_are_simpler_ones():
    lp = label_log_probs(LOGITS)
    nll = nll_loss(lp)
    for same in (
        gce_loss(lp, 0),
        gce_loss(lp, torch.zeros_like(lp)),
        gce_loss(lp, 1e-13),
        eaft_loss(lp, entropy(LOGITS), 0.0, 20),
        focal_loss(lp, 0.0),
        label_smoothing_loss(lp, above_mean(LOGITS), 0.0),
        gem_loss(lp, 1.0),
        threshold_loss(lp, 0.0, "top"),
        threshold_loss(lp, 1.0, "bottom"),
        select_loss(lp, torch.ones_like(lp, dtype=torch.bool)),
    ):
        torch.testing.assert_close(same, nll, rtol=1e-12, atol=0)
    torch.testing.assert_close(asft_loss(lp, kl_to_reference(LOGITS), 0.0), dft_loss(lp))
    # With one update a snapshot, r = 1
    assert token_weight("psft", lp, old_log_probs=lp, clip_low=0.2, clip_high=0.28).eq(1).all()


@pytest.mark.parametrize("name", CALLS)
def test_the_weight_is_minus_the_slope_in_log_p(name):
    loss, needs = CALLS[name]
    lp = label_log_probs(LOGITS).requires_grad_()
    (slope,) = torch.autograd.grad(loss(lp, **needs).sum(), lp)
    weight = token_weight(name.split()[0], lp, **needs)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, -slope, rtol=1e-12, atol=0)
    if name == "dft":  # whose weight stands still
        return
    step = 1e-6
    lp = lp.detach()
    rise = (loss(lp + step, **needs) - loss(lp - step, **needs)) / (2 * step)
    torch.testing.assert_close(weight, -rise, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CALLS)
def test_precision_and_the_ends_of_the_range(name):
    """In bf16 they count in fp32; p = 1, and log p above 0 by rounding, leave all finite."""
    loss, needs = CALLS[name]
    needs = {k: v[:1].expand(3) if isinstance(v, torch.Tensor) else v for k, v in needs.items()}
    lp = torch.tensor([-3.0, 0.0, 1e-7], requires_grad=True)
    values = loss(lp, **needs)
    values.sum().backward()
    assert values.isfinite().all() and lp.grad.isfinite().all()
    assert values[1].item() == pytest.approx(values[2].item(), abs=1e-6)
    low = loss(lp.detach().bfloat16(), **needs)
    assert low.dtype == torch.promote_types(torch.float32, values.dtype)
    torch.testing.assert_close(low[0], values[0].detach())


def test_one_minus_p_keeps_its_digits():
    lp = torch.tensor([-1e-6])
    assert gce_loss(lp, 1.0).item() == pytest.approx(1e-6, rel=1e-6)
    assert focal_loss(lp, 1.0).item() == pytest.approx(1e-12, rel=1e-6)
    # The slope of (1 - p)^.5 is infinite at p = 1, and the weight goes to 0 there
    assert token_weight("focal", torch.zeros(1), gamma=0.5).item() == 0


def test_select_takes_each_rows_own_highest_scores():
    scores = torch.tensor(
        [[5.0, 1, 2, 3, 4], [9, 9, 1, 1, 100], [1, 1, 1, 1, 1], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]]
    )
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[1, 4] = mask[3, 1:] = mask[4] = False
    kept = select_mask(scores, mask, 0.6)
    assert kept.tolist() == [
        [True, False, False, True, True],
        [True, True, True, False, False],  # of what ties with the third, the first
        [True, True, True, False, False],
        [True, False, False, False, False],
        [False] * 5,
    ]
    # Whatever else is in the batch
    assert select_mask(scores[:1], mask[:1], 0.6).tolist() == kept[:1].tolist()
    assert select_mask(scores, mask, 1.0).equal(mask)
    lp = label_log_probs(LOGITS)
    assert_vector(label_log_probs(REFERENCE) - lp, -0.385110900086, -0.39762601995, -0.211432755808)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lp: gce_loss(lp, -1.5), "`q` must be -1 or more, got -1.5"),
        (lambda lp: threshold_loss(lp, 0.5, "middle"), "`keep` must be 'top' or 'bottom'"),
        (lambda lp: eaft_loss(lp, -lp, 1.0, 1), "`top_k` must be at least 2, got 1"),
        (lambda lp: focal_loss(lp, -1.0), "`gamma` must be 0 or more, got -1.0"),
        (lambda lp: token_weight("wit", lp), "`loss_type` must be one of nll, dft.*'wit'"),
    ],
    ids=["q", "keep", "top_k", "gamma", "loss_type"],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([-1.0]))
