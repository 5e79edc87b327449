"""Every loss of the table: its first step by hand, and how losses are related."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch

from llmmix.unlearning.config import UnlearnConfig
from llmmix.unlearning.loss_table import LOSSES
from llmmix.unlearning.losses import nll_loss, sequence_probs
from llmmix.unlearning.objective import Loss
from tests.unlearning.runs import METHODS, assert_same, finish, logged, naive, weights_of

pytestmark = pytest.mark.usefixtures("quick_collections")

ONE = {"max_steps": 1, "per_device_train_batch_size": 10}  # all of one epoch in one step


BY_HAND = [n for n in METHODS if n not in ("rmu", "flat", "flat-retain", "undial-retain")]


def of_each_row(model, trainer, part):
    """Logits, labels and log-probabilities of the answers of a part, row by row."""
    pairs = [naive(model, trainer.train_dataset[row][part]) for row in range(10)]
    logps = [z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) for z, y in pairs]
    return pairs, logps


def cross_entropy(pairs, change):
    """To what the logits say when the answers' own are changed; the mean over tokens."""
    found = []
    for z, y in pairs:
        target = z.clone()
        rows = torch.arange(len(y))
        target[rows, y] = change(target[rows, y])
        found.append(-(target.softmax(-1) * z.log_softmax(-1)).sum(-1))
    return torch.cat(found).mean()


def expected_of(name, model, pairs, rows):
    """The forget term of the first step, from plain forwards of single rows."""
    logps = torch.cat(rows)
    p = logps.exp()
    by_row = torch.stack([row.mean() for row in rows])
    if name in ("grad_ascent", "grad_diff", "kl"):
        return logps.clamp(min=-math.log(model.config.vocab_size)).mean()
    if name in ("npo", "npo-kl", "dpo"):
        return 20 * math.log(2)
    return {
        "simnpo": lambda: (4 * (1 + (0.5 * by_row).exp()).log()).mean(),
        "undial": lambda: cross_entropy(pairs, lambda own: own - 10),
        "ceu": lambda: cross_entropy(pairs, lambda own: torch.full_like(own, -torch.inf)),
        "wga": lambda: (p * logps).mean(),
        "satimp": lambda: (p**0.2 * (1 - p) * logps).mean(),
        "pdu": lambda: torch.cat([(z.amax(-1) - z.mean(-1)) ** 2 for z, _ in pairs]).mean(),
        "idk": lambda: -logps.mean(),
    }[name]()


@pytest.mark.parametrize("name", BY_HAND)
def test_the_first_loss_by_hand(make, model, name):
    trainer = make(name, **ONE)
    trainer.train()
    first, args = trainer.state.log_history[0], trainer.args
    part = "template" if name == "idk" else "forget"
    pairs, logps = of_each_row(model, trainer, part)
    forget = float(expected_of(name, model, pairs, logps))
    assert first["unlearn/forget_loss"] == pytest.approx(forget, rel=1e-4, abs=1e-6)
    total = args.forget_weight * forget
    if "retain" in trainer.parts:
        retain = -torch.cat(of_each_row(model, trainer, "retain")[1]).mean().item()
        retain = 0 if args.retain_loss == "kl" else retain
        assert first["unlearn/retain_loss"] == pytest.approx(retain, rel=1e-4, abs=1e-5)
        total += args.retain_weight * (retain - (1.0 if name == "pdu" else 0.0))
    assert first["loss"] == pytest.approx(total, rel=1e-4, abs=1e-5)
    mean = sum(row.exp().mean().item() for row in logps) / 10
    assert first[f"unlearn/{part}_prob"] == pytest.approx(mean, rel=1e-4)
    assert ("unlearn/capped" in first) == (name in ("grad_ascent", "grad_diff", "kl"))
    if "unlearn/capped" in first:
        share = (torch.cat(logps) < -math.log(model.config.vocab_size)).double().mean().item()
        assert 0 < share < 1 and first["unlearn/capped"] == pytest.approx(share, abs=1e-6)


def test_no_weight_on_retained_rows_is_no_retained_rows(run):
    assert_same(run("grad_diff", retain_weight=0.0), run("grad_ascent"), 0)
    assert_same(run("kl", retain_weight=0.0), run("grad_ascent"), 0)


def test_wga_of_beta_zero_is_ascent_without_a_cap(run):
    given = {"retain_weight": 0.0, "max_steps": 3}
    assert_same(
        run("wga", beta=0.0, **given), run("grad_ascent", ascent_cap=math.inf, max_steps=3), 1e-6
    )
    assert_same(run("satimp", beta=0.0, beta2=0.0, **given), run("wga", beta=0.0, **given), 1e-6)


def test_a_weight_scales_its_term(run):
    given = {"max_steps": 1, "retain_weight": 0.0}
    for name in ("npo", "ceu", "rmu"):
        one = run(name, forget_weight=1.0, **given)[0]
        three = run(name, forget_weight=3.0, **given)[0]
        torch.testing.assert_close(3 * one, three, rtol=1e-5, atol=1e-6)

    # the step of plain descent is the sum of the steps of the two terms
    def step(forget_weight, retain_weight):
        given = {"forget_weight": forget_weight, "retain_weight": retain_weight}
        return run("wga", max_steps=1, learning_rate=1.0, **given)[1]

    start = step(0.0, 0.0)
    together = step(2.0, 0.5) - start
    apart = 2 * (step(1.0, 0.0) - start) + 0.5 * (step(0.0, 1.0) - start)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_npo_of_vanishing_beta_goes_the_way_of_ascent(make, run):
    """One row a step: NPO sums over its tokens what ascent takes the mean of."""
    given = {"max_steps": 1, "retain_weight": 0.0, "per_device_train_batch_size": 1}
    given |= {"learning_rate": 1e-2}
    trainer = make("npo", beta=1e-6, **given)
    start = weights_of(trainer)
    row = next(iter(trainer._get_train_sampler()))
    encoded = trainer.train_dataset.forget[row]
    tokens = len(encoded.ids) - encoded.prompt_length
    npo = finish(trainer)[1] - start
    ascent = run("grad_ascent", ascent_cap=math.inf, **given)[1] - start
    assert tokens > 1
    torch.testing.assert_close(npo, tokens * ascent, rtol=1e-3, atol=1e-6)


def test_the_cap_ends_the_push(make):
    """With a cap below what every token has, nothing moves."""
    trainer = make("grad_ascent", ascent_cap=1e-3, learning_rate=1.0)
    before = weights_of(trainer)
    steps, weights = finish(trainer)
    assert torch.equal(before, weights) and (steps[:, 1] == 0).all()
    assert steps[:, 0].tolist() == pytest.approx([-1e-3] * 4)
    assert logged(trainer, "unlearn/capped") == [1.0] * 4
    free = make("grad_ascent", ascent_cap=math.inf)
    finish(free)
    assert "unlearn/capped" not in free.state.log_history[0]


def test_mean_probability_is_sequence_probs(make):
    trainer = make("idk", max_steps=1, per_device_train_batch_size=10)
    trainer.train()
    first = trainer.state.log_history[0]
    assert "unlearn/template_prob" in first and "unlearn/forget_prob" not in first
    logps = torch.tensor([[-1.0, -2.0]])
    assert sequence_probs(logps, logps < 0).item() == pytest.approx(
        (math.exp(-1) + math.exp(-2)) / 2
    )


def test_another_loss_is_a_function_and_a_row(make, monkeypatch):
    def forget(step, beta2):
        return step.by_token(beta2 * nll_loss(*step.parts["template"]), "template")

    row = Loss(forget, reads=("template",), settings=("beta2",), retain_weight=0.0)
    monkeypatch.setitem(LOSSES, "another", row)
    monkeypatch.setitem(METHODS, "another", {"loss": "another", "beta2": 3.0})
    ours, idk = make("another"), make("idk", retain_weight=0.0)
    assert ours.parts == idk.parts == ("template",)
    (found, _), (plain, _) = finish(ours), finish(idk)
    torch.testing.assert_close(found, 3 * plain, rtol=1e-2, atol=1e-3)


def test_a_reference_that_a_row_does_not_name_is_told(make, monkeypatch):
    row = Loss(lambda step: step.by_row(step.ref_logps("forget")), retain_weight=0.0)
    monkeypatch.setitem(LOSSES, "another", row)
    monkeypatch.setitem(METHODS, "another", {"loss": "another"})
    with pytest.raises(ValueError, match="no reference: name one in its row of `LOSSES`"):
        make("another").train()


def test_no_name_of_a_loss_is_compared_outside_the_table():
    """What a loss needs is told by its row. `kl` is a retain term and a divergence too."""
    root, names = Path(__file__).parents[2], set(LOSSES) - {"kl", "dpo"}
    for path in (
        p for folder in ("llmmix", "recipes", "eval") for p in (root / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                said = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not said & names, f"{path.name}:{node.lineno} {said & names}"


def rows_of_the_page(header: str) -> list[list[str]]:
    """The cells of the rows below a header of a table in docs/methods/unlearning.md."""
    page = Path(__file__).parents[2] / "docs" / "methods" / "unlearning.md"
    _, below = page.read_text(encoding="utf-8").split(header + "\n", 1)
    lines = below.split("\n\n", 1)[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_states_the_tables_defaults():
    weights = rows_of_the_page("| `loss` | forget term | needs | weights (forget, retain); beta |")
    stated = {}
    for name, _, _, cell in weights:
        numbers = [float(x) for x in re.findall(r"[0-9.]+", cell)]
        stated[name.strip("`")] = (*numbers, None)[:3]
    assert stated == {
        name: (loss.forget_weight, loss.retain_weight, loss.beta) for name, loss in LOSSES.items()
    }
    options = {
        name: default for name, default, _ in rows_of_the_page("| option | default | meaning |")
    }
    given = ("delta", "beta2", "skip_tokens", "steering", "dual_step", "dual_warmup_epochs")
    defaults = {name: getattr(UnlearnConfig, name) for name in given}
    assert {name: float(options[f"`{name}`"]) for name in given} == defaults


def test_the_page_says_whose_each_default_is():
    """No loss is missing, and none has nothing said of it."""
    whose = rows_of_the_page("| `loss` | authors' | OpenUnlearning's | ours |")
    named = [name for cell, *_ in whose for name in re.findall("`(.*?)`", cell)]
    assert sorted(named) == sorted(LOSSES)
    assert all(any(cells) for _, *cells in whose)
