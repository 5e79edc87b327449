import pytest
import torch

from llmmix import SFTMixConfig
from llmmix.logprobs import linear_logprobs
from llmmix.sftmix.losses import confidence, mix_pairs, mixup_loss
from llmmix.sftmix.pairing import confident_half

W = torch.tensor([[1, 0, -1], [0.5, 2, 0], [-1, 1, 1], [0, -0.5, 0.25]], dtype=torch.float64)
HC = torch.tensor([[1, 2, 3], [0, 1, -1], [0.5, 0.5, 0.5]], dtype=torch.float64)
HU = torch.tensor([[-1, 0, 1], [2, -1, 0]], dtype=torch.float64)
YC, YU = torch.tensor([1, 1, 3]), torch.tensor([2, 0])


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (0.3, [0.7377639703703415, 0.8726629997955384]),
        (0.5, [0.8537538011293067, 0.9790737366423006]),
        (1.0, [0.4803782476187544, 0.4492539519686692]),
        (0.0, [0.24229858148468983, 0.24659064750979923]),
    ],
)
def test_mixup_loss_vectors(lam, expected):
    loss = mixup_loss(HC[:2], HU, W, YC[:2], YU, lam)
    torch.testing.assert_close(loss, W.new_tensor(expected), rtol=1e-10, atol=0)
    per_position = mixup_loss(HC[:2], HU, W, YC[:2], YU, torch.full((2,), lam))
    torch.testing.assert_close(per_position, loss, rtol=1e-6, atol=0)


def test_mixup_gradient_vectors():
    hc, hu = HC.clone().requires_grad_(), HU.clone().requires_grad_()
    mixup_loss(hc[:2], hu, W, YC[:2], YU, 0.3).mean().backward()
    expected_c = [[-0.02054988, -0.03703453, 0.01213022], [-0.01346515, -0.06316962, 0.00542026]]
    expected_u = [[-0.04794973, -0.08641391, 0.02830385], [-0.03141869, -0.14739579, 0.01264726]]
    torch.testing.assert_close(hc.grad[:2], W.new_tensor(expected_c), rtol=0, atol=1e-8)
    torch.testing.assert_close(hu.grad, W.new_tensor(expected_u), rtol=0, atol=1e-8)
    assert not hc.grad[2].any()


def logprobs(hidden, targets):
    return linear_logprobs(hidden, W, targets)


def test_pairs_are_cut_to_the_shorter_response_wherever_it_stands():
    """The worked example, with prompts of other lengths, on either side of the padding."""
    for prompts in ((0, 0), (2, 1), (1, 3)):
        hidden = torch.zeros(2, 6, 3, dtype=torch.float64)
        labels = torch.full((2, 6), -100)
        for row, (h, y, start) in enumerate(zip((HC, HU), (YC, YU), prompts, strict=True)):
            hidden[row, start : start + len(h)] = h
            labels[row, start : start + len(y)] = y
        out = mix_pairs(hidden, labels, logprobs, lam=torch.tensor([0.3], dtype=torch.float64))
        assert out["mixup_losses"].item() == pytest.approx(0.80521348508294, rel=1e-10)
        assert out["mixed_tokens"].item() == 4
    # with the token mean of both rows' cross-entropy and weight 0.2, the method's loss
    nll = -torch.cat([logprobs(HC, YC), logprobs(HU, YU)])
    assert (nll.mean() + 0.2 * out["mixup_losses"]).item() == pytest.approx(0.8595440980552608)


def test_each_part_of_a_target_has_the_weight_of_its_token():
    """The worked example with weights .5 and 1, and a row of weight 0, of which nothing is left."""
    half = torch.full((2,), 0.5, dtype=torch.float64)
    loss = mixup_loss(HC[:2], HU, W, YC[:2], YU, 0.3, weights_a=half)
    assert loss.mean().item() == pytest.approx(0.50593146232, rel=1e-10)
    hidden = torch.stack([HC[:2], HU]).requires_grad_()
    labels, lam = torch.stack([YC[:2], YU]), torch.tensor([0.3], dtype=torch.float64)
    rows = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    out = mix_pairs(hidden, labels, logprobs, lam=lam, weigh=lambda values: values * rows)
    torch.testing.assert_close(out["mixup_losses"], loss.mean().unsqueeze(0))
    out = mix_pairs(hidden, labels, logprobs, lam=lam, weigh=lambda values: values * rows.round())
    expected = 0.7 * (0.25776397037 + 0.332662999796) / 2
    assert out["mixup_losses"].item() == pytest.approx(expected, rel=1e-10)


def test_each_pair_counts_alike_and_an_empty_one_adds_a_connected_zero():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(4, (6, 5), generator=generator)
    labels[1, 2:] = -100
    labels[4] = -100
    lam = torch.tensor([0.2, 0.7, 0.5], dtype=torch.float64)
    losses = mix_pairs(hidden, labels, logprobs, lam=lam)["mixup_losses"]
    first = mixup_loss(hidden[0, :2], hidden[1, :2], W, labels[0, :2], labels[1, :2], 0.2).mean()
    second = mixup_loss(hidden[2], hidden[3], W, labels[2], labels[3], 0.7).mean()
    torch.testing.assert_close(losses, torch.stack([first, second, first * 0]))
    losses[2].backward()
    assert not hidden.grad.any()


def test_confidence_is_minus_the_mean_perplexity():
    nlls = torch.tensor([[2, 1, 0.5], [1.5, 1.2, 1.1], [3, 2.9, 2.8], [0.7, 0.6, 0.9]]).T
    expected = [-3.918686399363274, -3.601990672340348, -18.234776354575924, -2.098491539672645]
    scores = confidence(nlls.double())
    torch.testing.assert_close(scores, scores.new_tensor(expected), rtol=1e-6, atol=0)
    assert confident_half(scores).tolist() == [False, True, False, True]
    # perplexity of the mean NLL, another definition, would order examples 0 and 1 the other way
    assert scores[0] < scores[1] and nlls.mean(0)[0] < nlls.mean(0)[1]


def test_confidence_of_a_hopeless_example_is_finite():
    assert confidence(torch.tensor([[100.0], [400.0]])).isfinite().all()
    with pytest.raises(ValueError, match=r"`mean_nlls` must be \(C, B\)"):
        confidence(torch.zeros(3))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mixup_alpha", 0.0, "`mixup_alpha` must be positive, got 0.0"),
        ("mixup_alpha", float("nan"), "`mixup_alpha` must be a finite number"),
        ("mixup_weight", -0.1, "`mixup_weight` must not be negative"),
        ("dco_n_samples", -1, "`dco_n_samples` must not be negative"),
        ("per_device_train_batch_size", 3, "`per_device_train_batch_size` must be even"),
        ("train_sampling_strategy", "group_by_length", "would break up the pairs"),
    ],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        SFTMixConfig("out", **{field: value})
