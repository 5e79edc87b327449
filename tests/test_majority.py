"""The loss of a majority vote: its table, its numerics, and DCOTrainer with `votes`."""

import math

import pytest
import torch
from datasets import Dataset

from llmmix import DCOConfig, DCOTrainer, attach_head
from llmmix.dco import dco_loss
from llmmix.filtering import LikelihoodFilter
from llmmix.majority import majority_loss, majority_weight

P = [1e-30, 0.01, 0.1, 0.25, 0.5, 0.9]
TABLE = {  # N and k: the losses, the weights, and p at which the weight is k / 2
    (8, 3): (
        [203.2073067, 9.827762067, 3.267756506, 1.134891775, 0.1561057147, 2.341027402e-5],
        [3, 2.962293529, 2.604296621, 1.93781744, 0.7671232877, 0.001224748671],
        0.34182063,
    ),
    (16, 4): (
        [268.8036194, 11.01029515, 2.682292196, 0.5191722099, 0.01069233581, 4.18105e-11],
        [4, 3.903589496, 3.005703883, 1.513910498, 0.1122781042, 4.776408e-9],
        0.19917231,
    ),
    (64, 26): (
        [1755.078073, 79.16373291, 22.76458225, 5.442402753, 0.0530959067, 3.092824247e-23],
        [26, 25.63070261, 21.97852595, 14.34248707, 0.8941086274, 1.010545783e-20],
        0.27280155,
    ),
}
table = pytest.mark.parametrize(("n", "k"), TABLE)


def logs(*p):
    return torch.tensor([math.log(each) for each in p], dtype=torch.float64)


@table
def test_loss_and_weight_match_the_table(n, k):
    losses, weights, half = TABLE[n, k]
    digits = [1e-9] * 5 + [1e-6]  # the last column is printed with fewer
    for got, expected in (
        (majority_loss(logs(*P), n, k), losses),
        (majority_weight(logs(*P), n, k), weights),
    ):
        for value, wanted, rel in zip(got.tolist(), expected, digits, strict=True):
            assert value == pytest.approx(wanted, rel=rel)
    assert majority_weight(logs(half), n, k).item() == pytest.approx(k / 2, rel=1e-7)


def test_chances_of_more_and_more_votes_differ_by_those_of_exactly_so_many():
    """From DCO at k = 1 to p^N at k = N, on both sides of the change of tail."""
    n, logps = 7, logs(1e-3, 0.05, 0.14, 0.3, 0.5, 0.62, 0.9, 0.99)
    p = logps.exp()
    assert torch.equal(majority_loss(logps, n, 1), dco_loss(logps, n))
    chances = [torch.exp(-majority_loss(logps, n, k)) for k in range(1, n + 1)] + [p * 0]
    for k, (some, more) in enumerate(zip(chances, chances[1:], strict=False), start=1):
        exactly = math.comb(n, k) * p**k * (1 - p) ** (n - k)
        torch.testing.assert_close(some - more, exactly, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(chances[-2], p**n, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "k"), [*TABLE, (5, 5), (64, 2), (64, 63)])
def test_the_gradient_is_minus_the_weight(n, k):
    cut = math.log(k / (n + 1))
    logps = torch.tensor([-0.02, cut + 0.01, cut - 0.01, -3, -9], dtype=torch.float64)
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: majority_loss(x, n, k), logps)
    majority_loss(logps, n, k).sum().backward()
    assert torch.equal(logps.grad, -majority_weight(logps, n, k))


@pytest.mark.parametrize(("n", "k"), [*TABLE, (64, 64), (4096, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_extremes(n, k, dtype):
    logps = torch.tensor([-1e4, -math.inf, 0, -1e-30, 1e-7], dtype=dtype, requires_grad=True)
    loss = majority_loss(logps, n, k)
    loss.nan_to_num(0, 0).sum().backward()
    most = k * 1e4 - math.log(math.comb(n, k))
    assert loss.tolist() == pytest.approx([most, math.inf, 0, 0, 0], rel=1e-6, abs=1e-20)
    sure = k if k == n else 0  # p^N alone is not flat at 1
    weights = majority_weight(logps, n, k)
    assert weights.tolist() == pytest.approx([k, k, sure, sure, sure], abs=1e-20)
    assert loss.dtype == weights.dtype == dtype and logps.grad.isfinite().all()
    assert majority_loss(torch.full((1,), math.nan), n, k).isnan().all()


@pytest.mark.parametrize(("n", "k"), [*TABLE, (64, 2), (512, 200)])
def test_fp32_has_its_digits(n, k):
    """Over six hundred nats, and on both sides of the change of tail."""
    cut = math.log(k / (n + 1))
    logps = -torch.logspace(-6, math.log10(600), 200)
    logps = torch.cat([logps, torch.tensor([cut - 1e-6, cut + 1e-6])])
    exact = logps.double()
    for function in (majority_loss, majority_weight):
        rough = function(logps, n, k)
        torch.testing.assert_close(rough.double(), function(exact, n, k), rtol=6e-5, atol=1e-30)
    assert majority_loss(logps.bfloat16(), n, k).dtype == torch.float32


def test_weight_falls_with_p_and_rises_with_the_votes():
    logps = torch.linspace(-12, -0.01, 50, dtype=torch.float64)
    weights = torch.stack([majority_weight(logps, 16, k) for k in range(1, 17)])
    assert (weights[:-1].diff(dim=1) < 0).all() and (weights.diff(dim=0) > 0).all()


@pytest.mark.parametrize("votes", [0, -1, 9])
def test_votes_out_of_range_are_refused(votes):
    told = f"`votes` must lie between 1 and `n_samples`, got {votes} of 8"
    for call in (
        lambda: majority_loss(torch.zeros(1), 8, votes),
        lambda: majority_weight(torch.zeros(1), 8, votes),
        lambda: DCOConfig("out", n_samples=8, votes=votes),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    with pytest.raises(ValueError, match="`n_samples` must be at least 1, got 0"):
        majority_loss(torch.zeros(1), 0, votes)


ONE_TOKEN = Dataset.from_dict(  # p near 1 / vocabulary: weights between 0 and `votes`
    {
        "input_ids": [[5, 6 + i, 9 + i] for i in range(8)],
        "labels": [[-100, -100, 9 + i] for i in range(8)],
    }
)
N = 2200
QUIET = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def make(checkpoint, tmp_path):
    def make(**given):
        args = DCOConfig(str(tmp_path), **{**QUIET, **given})
        return DCOTrainer(checkpoint, args=args, train_dataset=ONE_TOKEN)

    return make


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_a_step_is_that_of_the_loss_by_hand(make, reduction):
    """In two micro-batches; a row has one token, so that both reductions have one gradient."""
    trainer = make(n_samples=N, votes=3, reduction=reduction)
    twin = make().model
    attach_head(twin)
    batch = trainer.data_collator([ONE_TOKEN[row] for row in range(8)])
    output = twin(**{k: v.to(twin.device) for k, v in batch.items()}, fused_lm_head=True)
    logps = output.log_probs.sum(1)
    weights = majority_weight(logps, N, 3)
    braked = (weights < 0.3).float().mean().item()
    assert (weights < 0.1).float().mean() < braked < 1  # the share is of 3, not of 1
    majority_loss(logps, N, 3).mean().backward()
    loss = majority_loss(logps, N, 3) if reduction == "sum" else weights * -logps
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert logged["dco/weight"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert logged["dco/braked"] == pytest.approx(braked)
    for ours, before in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, before - before.grad, rtol=1e-5, atol=1e-6)


def test_a_warning_says_when_every_weight_is_the_largest(make, caplog):
    full = make(n_samples=2, votes=2, max_steps=3)  # every weight is 2, whatever p is
    full.train()
    assert full.state.log_history[0]["dco/weight"] == 2 and "far less likely" not in caplog.text
    unlikely = make(n_samples=3, votes=2, max_steps=3)
    unlikely.train()
    assert "above 1.98, so this is 2 times cross-entropy so far" in caplog.text
    assert "less likely than votes/N = 2/3" in caplog.text


def test_the_filter_goes_by_the_share_of_the_largest_weight(make):
    trainer = make(n_samples=512, votes=3)
    kept = LikelihoodFilter(trainer, threshold=0.5)
    rows = list(range(8))
    assert (kept.n_samples, kept.votes) == (512, 3)
    batch = trainer.data_collator([ONE_TOKEN[row] for row in rows])
    with torch.no_grad():
        logps = trainer.model(
            **{k: v.to(trainer.args.device) for k, v in batch.items()}, fused_lm_head=True
        )
    share = majority_weight(logps.log_probs.sum(1), 512, 3) / 3
    kept.threshold = share.median().item()
    assert torch.equal(kept(rows), share > kept.threshold)
    assert LikelihoodFilter(trainer, n_samples=2).votes == 1  # F of an N of its own


def test_the_card_names_the_paper_of_what_was_trained(make, tmp_path):
    for votes, paper in ((1, "2502.07154"), (2, "2604.24957")):
        make(n_samples=8, votes=votes).create_model_card("mine")
        assert paper in (tmp_path / "README.md").read_text(encoding="utf-8")
