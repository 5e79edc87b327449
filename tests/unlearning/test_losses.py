"""Losses of unlearning against published vectors, naive formulas in fp64, and their edges."""

import math

import pytest
import torch

from llmmix.unlearning import losses as u

B, S, V = 2, 6, 5
_ = -100


def table(b, t, v, modulus, divisor):
    values = [
        [[(b * i + t * j + v * k) % modulus / divisor for k in range(V)] for j in range(S)]
        for i in range(B)
    ]
    return torch.tensor(values, dtype=torch.float64)


# Current model and reference, on answers to forget, templates and rows to retain
LF, LE, LR = table(7, 3, 5, 11, 4), table(5, 2, 3, 7, 2), table(2, 5, 3, 13, 5)
RF, RE, RR = table(3, 4, 2, 9, 3), table(4, 3, 2, 8, 3), table(3, 2, 5, 10, 4)
YF = torch.tensor([[_, _, 1, 2, _, _], [_, 3, 0, 2, 1, _]])
YE = torch.tensor([[_, _, 3, _, _, _], [_, _, 0, 1, _, _]])
YR = torch.tensor([[_, _, _, 4, 0, 2], [_, 1, 4, 3, _, _]])


def token_logps(logits, labels):
    """What the fused head gives: (B, T-1) log-probabilities, zero where not scored, and a mask."""
    targets = labels[:, 1:]
    found = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1))
    return found.squeeze(-1).masked_fill(targets == _, 0), targets != _


def shifted(labels, skip=0):
    """The label each position predicts, without the first `skip` of each row."""
    labels = labels[:, 1:].clone()
    for row in labels:
        row[(row != _).nonzero()[:skip]] = _
    return labels


def per_token(losses, mask):
    """Mean over all tokens of a batch, of losses that are means over each row's."""
    return ((losses * mask.sum(1)).sum() / mask.sum()).item()


LPF, MF = token_logps(LF, YF)
LPE, ME = token_logps(LE, YE)
LPR, MR = token_logps(LR, YR)
RPF, RPE = token_logps(RF, YF)[0], token_logps(RE, YE)[0]
SUM_F, SUM_E, REF_F, REF_E = LPF.sum(1), LPE.sum(1), RPF.sum(1), RPE.sum(1)
NUMBER = pytest.approx


def test_the_fixture_is_the_published_one():
    assert (-SUM_F).tolist() == NUMBER([2.823799, 7.098628], abs=1e-6)
    assert (-REF_F).tolist() == NUMBER([3.920427, 6.058301], abs=1e-6)
    assert (-SUM_E).tolist() == NUMBER([1.216415, 4.416927], abs=1e-6)
    assert (-REF_E).tolist() == NUMBER([2.777464, 2.513091], abs=1e-6)


def test_vectors_of_means_over_tokens():
    assert per_token(u.nll_loss(LPF, MF), MF) == NUMBER(1.653738, abs=1e-6)
    assert per_token(u.nll_loss(LPE, ME), ME) == NUMBER(1.877780, abs=1e-6)
    retain = per_token(u.nll_loss(LPR, MR), MR)
    assert retain == NUMBER(2.002484, abs=1e-6)
    ascent = per_token(u.grad_ascent_loss(LPF, MF), MF)
    assert ascent == NUMBER(-1.653738, abs=1e-6)
    assert ascent + retain == NUMBER(0.348747, abs=1e-6)  # gradient difference
    assert per_token(u.wga_loss(LPF, MF, 1.0), MF) == NUMBER(-0.295268, abs=1e-6)
    assert per_token(u.satimp_loss(LPF, MF, 5.0, 1.0), MF) == NUMBER(-0.002647, abs=1e-6)
    found = u.undial_loss(LF[:, :-1], RF[:, :-1], shifted(YF), 10.0)
    assert per_token(found, MF) == NUMBER(1.832231, abs=1e-6)
    for skip, expected in ((1, 1.469048), (0, 1.489113)):
        labels = shifted(YF, skip)
        found = per_token(u.ceu_loss(LF[:, :-1], labels), labels != _)
        assert found == NUMBER(expected, abs=1e-6)


def test_vectors_of_means_over_rows():
    forget = u.npo_loss(SUM_F, REF_F, 0.1).mean().item()
    assert forget == NUMBER(13.919641, abs=1e-6)
    assert forget + per_token(u.nll_loss(LPR, MR), MR) == NUMBER(15.922125, abs=1e-6)
    simnpo = [u.simnpo_loss(SUM_F, MF.sum(1), 4.5, delta).mean().item() for delta in (0.0, 1.0)]
    # the released code takes delta off the NLL, and so adds it to the log-probability
    assert simnpo == NUMBER([0.000462, 0.039049], abs=1e-6)
    total = 0.125 * simnpo[0] + per_token(u.nll_loss(LPR, MR), MR)
    assert total == NUMBER(2.002542, abs=1e-6)
    dpo = u.dpo_loss(SUM_E, SUM_F, REF_E, REF_F, 0.1)
    assert dpo.mean().item() == NUMBER(14.074501, abs=1e-6)


def test_kl_vectors_of_scored_positions_and_of_all():
    labels = shifted(YR)
    ours = per_token(u.kl_loss(LR[:, :-1], RR[:, :-1], labels), labels != _)
    assert ours == NUMBER(0.432390, abs=1e-6)
    # the released code counts prompt, padding and the last position too
    everywhere = torch.zeros(B, S, dtype=torch.long)
    theirs = u.kl_loss(LR, RR, everywhere).mean().item()
    assert theirs == NUMBER(0.423561, abs=1e-6)
    assert per_token(u.grad_ascent_loss(LPF, MF), MF) + theirs == NUMBER(-1.230177, abs=1e-6)


def test_pdu_vectors_and_its_multiplier():
    found = per_token(u.pdu_loss(LF[:, :-1], shifted(YF)), MF)
    assert found == NUMBER(0.925000, abs=1e-6)
    unshifted = per_token(u.pdu_loss(LF, YF), YF != _)  # as released, off by one
    assert unshifted == NUMBER(0.881250, abs=1e-6)
    retain = per_token(u.nll_loss(LPR, MR), MR)
    assert unshifted + retain - 0.3 == NUMBER(2.583735, abs=1e-6)
    assert u.pdu_multiplier(1.0, retain, 0.3, 5.0) == NUMBER(9.512422, abs=5e-6)
    assert u.pdu_multiplier(1.0, 0.05, 0.3, 5.0) == 0 and u.pdu_multiplier(1.0, 0.3, 0.3, 5.0) == 1
    assert math.isnan(u.pdu_multiplier(1.0, math.nan, 0.3, 5.0))


def test_rmu_is_a_mean_over_d_tokens_and_rows_and_the_published_number_a_broadcast():
    hidden, target, mask = LF[..., :4], LE[..., :4], YF != _
    squares = ((hidden - target) ** 2).mean(-1)
    by_hand = [squares[row, mask[row]].mean().item() for row in range(B)]
    ours = u.rmu_loss(hidden, target, mask)
    assert ours.tolist() == NUMBER(by_hand, rel=1e-6)
    assert ours.mean().item() == NUMBER(0.644531, abs=1e-6)
    # the released code divides sums (B,) by counts (B, 1): every row by every row's count
    sums, counts = (squares * mask).sum(1), mask.sum(1, keepdim=True)
    assert (sums / counts).shape == (B, B)
    assert (sums / counts).mean().item() == NUMBER(0.899414, abs=1e-6)


def test_rmu_target_is_one_vector_of_the_steered_length():
    target = u.rmu_target(64, 6.5, seed=3)
    assert target.shape == (64,) and target.norm().item() == NUMBER(6.5, rel=1e-6)
    assert (target >= 0).all() and len(target.unique()) > 32
    assert torch.equal(target, u.rmu_target(64, 6.5, seed=3))
    assert not torch.equal(target, u.rmu_target(64, 6.5, seed=4))
    # the same direction whatever the length, and one target for all tokens
    torch.testing.assert_close(2 * target, u.rmu_target(64, 13.0, seed=3))
    hidden = target.expand(2, 3, 64).clone().requires_grad_()
    loss = u.rmu_loss(hidden, target, torch.ones(2, 3, dtype=torch.bool))
    assert loss.tolist() == [0, 0]


def test_npo_and_dpo_at_the_reference():
    for beta in (0.1, 1.0):
        start = 2 / beta * math.log(2)
        assert u.npo_loss(SUM_F, SUM_F, beta).tolist() == NUMBER([start] * 2)
        assert u.dpo_loss(SUM_E, SUM_F, SUM_E, SUM_F, beta).tolist() == NUMBER([start] * 2)
    logps = SUM_F.clone().requires_grad_()
    u.npo_loss(logps, SUM_F, 0.1).sum().backward()
    assert logps.grad.tolist() == NUMBER([1, 1])  # the weight of gradient ascent


@pytest.mark.parametrize("beta", [1e-3, 0.1, 3.0])
def test_npo_gradient_is_ascent_with_a_weight_that_falls_as_it_forgets(beta):
    logps = torch.linspace(-300, -5, 30, dtype=torch.float64, requires_grad=True)
    u.npo_loss(logps, torch.full_like(logps, -100), beta).sum().backward()
    expected = 2 * torch.sigmoid(beta * (logps.detach() + 100))
    torch.testing.assert_close(logps.grad, expected)
    if beta == 1e-3:
        assert (logps.grad - 1).abs().max() < 0.11


# Every loss as a function of leaves, and the naive formula of a row, in fp64
def _q(logits, y):
    return torch.cat([logits[:y], logits[y + 1 :]]).softmax(0)


def _kl(p, q):
    return (p * (p.log() - q.log())).sum()


ROWS = [(row, (YF[row, 1:] != _).nonzero().flatten().tolist()) for row in range(B)]
OF_LOGPS = {
    "nll": (u.nll_loss, lambda lp: -lp.mean()),
    "grad_ascent": (u.grad_ascent_loss, lambda lp: lp.mean()),
    "wga": (
        lambda lp, m: u.wga_loss(lp, m, 0.7),
        lambda lp: (lp.detach().exp() ** 0.7 * lp).mean(),
    ),
    "satimp": (
        lambda lp, m: u.satimp_loss(lp, m, 2.0, 0.5),
        lambda lp: (lp.detach().exp() ** 2 * (1 - lp.detach().exp()) ** 0.5 * lp).mean(),
    ),
}
OF_LOGITS = {
    "undial": (
        lambda z, y: u.undial_loss(z, RF[:, :-1], y, 3.0),
        lambda z, t, y: (
            -((t - 3.0 * torch.eye(V, dtype=t.dtype)[y]).softmax(0) * z.log_softmax(0)).sum()
        ),
    ),
    "ceu": (
        u.ceu_loss,
        lambda z, t, y: (
            -(_q(z.detach(), y) * torch.cat([z[:y], z[y + 1 :]]).sub(z.logsumexp(0))).sum()
        ),
    ),
    "kl": (
        lambda z, y: u.kl_loss(z, RF[:, :-1], y),
        lambda z, t, y: _kl(t.softmax(0), z.softmax(0)),
    ),
    "pdu": (u.pdu_loss, lambda z, t, y: (z.max() - z.mean()) ** 2),
}


@pytest.mark.parametrize("name", OF_LOGPS)
def test_losses_of_token_logps_and_their_gradients_are_the_naive_ones(name):
    loss, naive = OF_LOGPS[name]
    ours, plain = LPF.clone().requires_grad_(), LPF.clone().requires_grad_()
    found = loss(ours, MF)
    expected = torch.stack([naive(plain[row, places]) for row, places in ROWS])
    torch.testing.assert_close(found, expected)
    found.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    assert ours.grad[~MF].eq(0).all()


@pytest.mark.parametrize("name", OF_LOGITS)
def test_losses_of_logits_and_their_gradients_are_the_naive_ones(name):
    loss, naive = OF_LOGITS[name]
    labels = shifted(YF)
    ours, plain = LF[:, :-1].clone().requires_grad_(), LF[:, :-1].clone().requires_grad_()
    found = loss(ours, labels)
    expected = torch.stack(
        [
            torch.stack([naive(plain[row, t], RF[row, t], labels[row, t]) for t in places]).mean()
            for row, places in ROWS
        ]
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.double().pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-6)


def test_gradients_of_summed_logps_and_of_hidden_states():
    def leaf(x):
        return x.clone().requires_grad_()

    assert torch.autograd.gradcheck(lambda x: u.npo_loss(x, REF_F, 0.3), leaf(SUM_F))
    assert torch.autograd.gradcheck(lambda x: u.simnpo_loss(x, MF.sum(1), 1.5, 0.2), leaf(SUM_F))
    assert torch.autograd.gradcheck(
        lambda a, f: u.dpo_loss(a, f, REF_E, REF_F, 0.3), (leaf(SUM_E), leaf(SUM_F))
    )
    hidden = leaf(LF[..., :4])
    u.rmu_loss(hidden, LE[..., :4], YF != _).sum().backward()
    counts = (YF != _).sum(1).view(-1, 1, 1)
    expected = 2 * (LF - LE)[..., :4] / 4 / counts * (YF != _).unsqueeze(-1)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-6, atol=1e-7)


def test_weights_and_targets_carry_no_gradient():
    z = LF[:, :-1].clone().requires_grad_()
    teacher = RF[:, :-1].clone().requires_grad_()
    labels = shifted(YF)
    (u.undial_loss(z, teacher, labels, 3.0) + u.kl_loss(z, teacher, labels)).sum().backward()
    assert teacher.grad is None and z.grad is not None
    # of a cross-entropy to a fixed target the gradient in the logits is p - q
    z = LF[:, :-1].clone().requires_grad_()
    u.ceu_loss(z, labels).sum().backward()
    others = z.detach().scatter(-1, labels.clamp(min=0).unsqueeze(-1), -torch.inf).softmax(-1)
    mask = (labels != _).unsqueeze(-1)
    expected = (z.detach().softmax(-1) - others) * mask / mask.sum(1, keepdim=True)
    torch.testing.assert_close(z.grad, expected, rtol=1e-5, atol=1e-6)
    hidden, target = LF.clone().requires_grad_(), LE.clone().requires_grad_()
    u.rmu_loss(hidden, target, YF != _).sum().backward()
    assert target.grad is None


def test_wga_and_satimp_are_bounded_and_wga_of_beta_zero_is_ascent():
    logps = -torch.logspace(-4, 3, 200).unsqueeze(1)
    mask = torch.ones_like(logps, dtype=torch.bool)
    for loss in (u.wga_loss, u.satimp_loss):
        assert loss(logps, mask).min() >= -1 / math.e - 1e-6
    torch.testing.assert_close(u.wga_loss(LPF, MF, 0.0), u.grad_ascent_loss(LPF, MF))
    torch.testing.assert_close(u.satimp_loss(LPF, MF, 0.0, 0.0), u.grad_ascent_loss(LPF, MF))
    torch.testing.assert_close(u.satimp_loss(LPF, MF, 1.0, 0.0), u.wga_loss(LPF, MF, 1.0))
    sure = torch.zeros(1, 1)  # p = 1
    assert u.satimp_loss(sure, sure == 0).item() == 0


def test_a_cap_holds_a_token_where_it_is():
    logps = torch.tensor([[-1.0, -5.0, 0.0], [-7.0, -2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss = u.grad_ascent_loss(logps, mask, cap=4.0)
    assert loss.tolist() == NUMBER([(-1 - 4) / 2, (-4 - 2 - 3) / 3])
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.5, 0, 0], [0, 1 / 3, 1 / 3]]))


EMPTY = {
    "nll": lambda x, m: u.nll_loss(x[..., 0], m),
    "grad_ascent": lambda x, m: u.grad_ascent_loss(x[..., 0], m, cap=2.0),
    "simnpo": lambda x, m: u.simnpo_loss((x[..., 0] * m).sum(1), m.sum(1), 4.5, delta=1.0),
    "wga": lambda x, m: u.wga_loss(x[..., 0], m),
    "satimp": lambda x, m: u.satimp_loss(x[..., 0], m),
    "undial": lambda x, m: u.undial_loss(x, -x, torch.where(m, 1, _), 10.0),
    "ceu": lambda x, m: u.ceu_loss(x, torch.where(m, 1, _)),
    "kl": lambda x, m: u.kl_loss(x, -x.detach(), torch.where(m, 1, _)),
    "pdu": lambda x, m: u.pdu_loss(x, torch.where(m, 1, _)),
    "rmu": lambda x, m: u.rmu_loss(x, x.detach() + 1, m),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_row_without_a_token_is_an_exact_zero_on_the_graph(name):
    generator = torch.Generator().manual_seed(0)
    x = (-torch.rand(3, 4, V, generator=generator)).requires_grad_()
    mask = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    loss = EMPTY[name](x, mask)
    assert loss.shape == (3,) and loss[1].item() == 0 and (loss[[0, 2]] != 0).all()
    loss.sum().backward()
    assert x.grad.isfinite().all() and x.grad[1].eq(0).all() and x.grad[[0, 2]].any()
    # and alone in its batch
    alone = x.detach()[1:2].clone().requires_grad_()
    loss = EMPTY[name](alone, mask[1:2])
    assert loss.requires_grad and loss.item() == 0
    loss.sum().backward()
    assert alone.grad.eq(0).all()


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_vocabulary_padded_with_minus_infinity_changes_nothing(name):
    labels, teacher = shifted(YF), RF[:, :-1]

    def loss(z, t):
        return {
            "undial": lambda: u.undial_loss(z, t, labels, 3.0),
            "ceu": lambda: u.ceu_loss(z, labels),
            "kl": lambda: u.kl_loss(z, t, labels),
            "pdu": lambda: u.pdu_loss(z, labels),
        }[name]()

    plain = LF[:, :-1].float().requires_grad_()
    padding = torch.full((B, S - 1, 3), -torch.inf)
    padded = torch.cat([plain.detach(), padding], -1).requires_grad_()
    expected, found = loss(plain, teacher), loss(padded, torch.cat([teacher, padding], -1))
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    found.sum().backward()
    assert padded.grad.isfinite().all() and padded.grad[..., V:].eq(0).all()
    torch.testing.assert_close(padded.grad[..., :V], plain.grad)


LOW = {
    "nll": lambda x, m: u.nll_loss(x, m),
    "grad_ascent": lambda x, m: u.grad_ascent_loss(x, m),
    "wga": lambda x, m: u.wga_loss(x, m),
    "satimp": lambda x, m: u.satimp_loss(x, m),
    "npo": lambda x, m: u.npo_loss(x[:, 0], x[:, 1].detach(), 0.1),
    "simnpo": lambda x, m: u.simnpo_loss(x[:, 0], m.sum(1), 4.5),
    "dpo": lambda x, m: u.dpo_loss(x[:, 0], x[:, 1], x[:, 2].detach(), x[:, 3].detach(), 0.1),
}


@pytest.mark.parametrize("name", [*LOW, *OF_LOGITS, "rmu"])
def test_bf16_goes_in_and_fp32_comes_out(name):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(B, S - 1, dtype=torch.bool)
    if name in LOW:
        x, loss = -3 * torch.rand(B, S - 1, generator=generator), lambda x: LOW[name](x, mask)
    elif name == "rmu":
        x, loss = LF[:, :-1], lambda x: u.rmu_loss(x, LE[:, :-1].to(x.dtype), mask)
    else:
        x, loss = LF[:, :-1], lambda x: OF_LOGITS[name][0](x, shifted(YF))
    rough = x.bfloat16().requires_grad_()
    exact = rough.detach().double()
    found = loss(rough)
    assert found.dtype == torch.float32
    # no digit of the arithmetic is lost, only those of the input
    torch.testing.assert_close(found.double(), loss(exact).double(), rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert rough.grad.dtype == torch.bfloat16 and rough.grad.isfinite().all()


def test_long_answers_do_not_overflow():
    far = torch.tensor([-1e5, 1e5])
    zero = torch.zeros(2)
    assert u.npo_loss(far, zero, 1.0).tolist() == [0, 2e5]
    assert u.dpo_loss(far, zero, zero, zero, 1.0).tolist() == [2e5, 0]
    assert u.simnpo_loss(far, torch.ones(2), 1.0).tolist() == [0, 2e5]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta):
    for call in (
        lambda: u.npo_loss(SUM_F, REF_F, beta),
        lambda: u.simnpo_loss(SUM_F, MF.sum(1), beta),
        lambda: u.dpo_loss(SUM_E, SUM_F, REF_E, REF_F, beta),
    ):
        with pytest.raises(ValueError, match="`beta` must be positive"):
            call()


@pytest.mark.parametrize("beta", [-0.1, math.nan])
def test_a_negative_exponent_is_refused(beta):
    labels = shifted(YF)
    for call in (
        lambda: u.wga_loss(LPF, MF, beta),
        lambda: u.satimp_loss(LPF, MF, beta, 1.0),
        lambda: u.satimp_loss(LPF, MF, 1.0, beta),
        lambda: u.undial_loss(LF[:, :-1], RF[:, :-1], labels, beta),
    ):
        with pytest.raises(ValueError, match="`beta[12]?` must not be negative"):
            call()


def test_ceu_of_one_token_is_refused():
    with pytest.raises(ValueError, match="vocabulary of one token"):
        u.ceu_loss(torch.zeros(1, 2, 1), torch.zeros(1, 2, dtype=torch.long))
