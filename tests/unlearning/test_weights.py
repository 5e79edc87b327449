"""Weights of rows under the unlearning losses: what they multiply, and what they leave alone."""

import pytest
import torch
from datasets import Dataset

from llmmix.unlearning.loss_table import LOSSES
from tests.unlearning.runs import (
    FORGET,
    RETAIN,
    WEIGHED,
    assert_same,
    by_path,
    finish,
    logged,
)

pytestmark = pytest.mark.usefixtures("quick_collections")


def weighed(rows, *weights):
    return rows.add_column("weight", [float(w) for w in weights])


def batch_of(trainer, rows):
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    return {name: x.to(trainer.args.device) for name, x in batch.items()}


def gradient(trainer, rows):
    """The loss of one batch, and its gradient."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows))
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().flatten(), *grads])


def mean_of_rows(trainer, part, by_row, weights):
    """The same, of the rows one by one, each with its weight and over counts."""
    found, counted = 0, 0
    for row, weight in enumerate(weights):
        labels = batch_of(trainer, [row])["labels"].chunk(len(trainer.parts))
        place = [p for p in ("template", "forget", "retain") if p in trainer.parts].index(part)
        count = 1 if by_row else int((labels[place] != -100).sum())
        found = found + weight * count * gradient(trainer, [row])
        counted += count
    return found / counted


def assert_close(found, expected):
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


FORGET_WEIGHTS = [1, 2.5, 0.5, 4, 1, 1, 0.25, 1, 3, 1]


@pytest.mark.parametrize("name", by_path([*LOSSES, "flat"]))
def test_the_forget_term_of_a_row_is_multiplied_by_its_weight(make, name):
    """Over counts of rows or tokens, whatever the weights are."""
    given = {} if name == "flat" else {"retain_weight": 0.0, "reference": "copy"}
    plain = make(name, **given)
    trainer = make(name, rows=weighed(FORGET, *FORGET_WEIGHTS), **given)
    assert "weight" not in batch_of(plain, [0])
    by_row = name == "flat" or not LOSSES[name].token_mean
    subject = "forget" if name == "flat" else LOSSES[name].subject
    expected = mean_of_rows(plain, subject, by_row, FORGET_WEIGHTS)
    assert_close(gradient(trainer, range(10)), expected)
    assert (expected - mean_of_rows(plain, subject, by_row, [1] * 10)).abs().max() > 1e-4


@pytest.mark.parametrize("name", by_path(["grad_diff", "npo-kl", "rmu", "idk"]))
def test_the_retain_term_of_a_row_is_multiplied_by_its_own_weight(make, name):
    given = {"forget_weight": 0.0, "reference": "copy", "learning_rate": 1.0}
    rows = weighed(RETAIN, 1, 2, 0.5, 3, 1, 4, 0.25)
    plain, trainer = make(name, **given), make(name, retain=rows, **given)
    for moved in (plain, trainer):  # away from the reference, of which the retain term may be
        torch.manual_seed(0)
        with torch.no_grad():
            for p in moved.model.parameters():
                p.add_(0.05 * torch.randn_like(p).mul(p.requires_grad))
    drawn = [trainer.train_dataset[row]["retain_weight"] for row in range(10)]
    assert len(set(drawn)) > 2
    expected = mean_of_rows(plain, "retain", name == "rmu", drawn)
    assert_close(gradient(trainer, range(10)), expected)


def test_the_retain_term_of_flat_has_its_weights(make):
    rows = weighed(RETAIN, 1, 2, 0.5, 3, 1, 4, 0.25)
    plain, trainer = make("flat-retain"), make("flat-retain", retain=rows)
    drawn = [trainer.train_dataset[row]["retain_weight"] for row in range(10)]
    none = make("flat-retain", retain=weighed(RETAIN, *[1e-30] * 7))
    whole, apart = gradient(plain, range(10)), gradient(none, range(10))
    of_rows = [gradient(plain, [row]) - gradient(none, [row]) for row in range(10)]
    counts = [
        len(e.ids) - e.prompt_length
        for e in (trainer.train_dataset[r]["retain"] for r in range(10))
    ]
    mean = sum(w * n * g for w, n, g in zip(drawn, counts, of_rows, strict=True)) / sum(counts)
    assert_close(gradient(trainer, range(10)) - apart, mean)
    assert (whole - apart - mean).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["flat", "npo", "grad_diff"])
def test_weights_of_one_change_nothing_to_the_last_digit(plain_run, run, name):
    ones = weighed(FORGET, *[1] * 10), weighed(RETAIN, *[1] * 7)
    assert_same(plain_run(name), run(name, rows=ones[0], retain=ones[1]), 0)


@pytest.mark.parametrize("name", ["flat-retain", "npo"])
def test_a_row_of_weight_zero_is_absent(make, caplog, name):
    rows = weighed(FORGET, 0, 1, 2, 1, 0, 1, 1, 0.5, 1, 1)
    retain = weighed(RETAIN, 1, 0, 1, 3, 1, 1, 0)
    zeros = finish(make(name, rows=rows, retain=retain))
    told = caplog.text
    assert "Dropped 2 of 10 rows of `train_dataset`" in told
    assert "Dropped 2 of 7 rows of `retain_dataset`" in told
    kept = rows.select([1, 2, 3, 5, 6, 7, 8, 9]), retain.select([0, 2, 3, 4, 5])
    assert_same(zeros, finish(make(name, rows=kept[0], retain=kept[1])), 0)


@pytest.mark.parametrize("name", ["flat-retain", "npo", "kl"])
def test_micro_batches_of_weighed_rows_are_one_batch(run, name):
    rows, retain = WEIGHED
    whole = run(name, rows=rows, retain=retain, max_steps=3)
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert_same(whole, run(name, rows=rows, retain=retain, max_steps=3, **given))


def test_weights_are_logged_and_evaluated(make):
    rows, retain = WEIGHED
    given = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 10}
    given |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = make("grad_diff", rows=rows, retain=retain, eval_dataset=rows, **given)
    trainer.train()
    (loss,), (mean,) = logged(trainer, "loss"), logged(trainer, "weight/mean")
    assert mean == pytest.approx(sum(1 if w is None else w for w in rows["weight"]) / 10)
    drawn = [trainer.train_dataset[row]["retain_weight"] for row in range(10)]
    assert logged(trainer, "weight/retain_mean") == pytest.approx([sum(drawn) / 10])
    assert logged(trainer, "eval_loss") == pytest.approx([loss], rel=1e-4)
    assert logged(trainer, "eval_weight/mean") == pytest.approx([mean])
    unweighted = trainer.evaluate(FORGET.add_column("weight", [1.0] * 10))
    assert abs(unweighted["eval_loss"] - loss) > 1e-3
    assert unweighted["eval_weight/mean"] == 1
    given = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    for weighs, evaluates in ((FORGET, rows), (rows, FORGET)):  # one of the two alone has weights
        trainer = make("npo", rows=weighs, eval_dataset=evaluates, **given)
        trainer.train()
        for key, given_to in (("weight/mean", weighs), ("eval_weight/mean", evaluates)):
            assert bool(logged(trainer, key)) == ("weight" in given_to.column_names)


def test_the_pieces_of_a_text_have_its_weight(make):
    text = Dataset.from_dict({"text": ["1+1=2 " * 20, "the second text"], "weight": [3.0, None]})
    rows = make("grad_ascent", rows=text, max_length=24).train_dataset
    assert len(rows) > 3 and rows.weights == [3.0] * (len(rows) - 1) + [1.0]


MESSAGES = [
    {"role": "user", "content": "hi", "weight": None},
    {"role": "assistant", "content": "ho", "weight": 0.5},
]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("npo", {"rows": weighed(FORGET, *[1] * 9, -1)}, "`train_dataset`, row 9: `weight` is -1"),
        ("flat", {"rows": weighed(FORGET, *[0] * 10)}, "`train_dataset`: `weight` is 0 in all"),
        (
            "npo",
            {"retain": weighed(RETAIN, *[float("nan")] * 7)},
            "`retain_dataset`, row 0: `weight` is nan",
        ),
        (
            "flat",
            {"rows": FORGET.add_column("weight", ["0"] * 10)},
            "row 0: `weight` is '0', of type str",
        ),
        (
            "flat",
            {"rows": weighed(FORGET, *[1] * 10), "batch_reduction": "batch_scalar"},
            "`train_dataset` has a column `weight`, and `batch_reduction='batch_scalar'`.*"
            "Set it to 'per_sequence'; or remove the column",
        ),
        (
            "pdu",
            {"retain": weighed(RETAIN, *[2] * 7)},
            "`retain_dataset` has a column `weight`, and the budget `epsilon` of pdu.*another loss",
        ),
        (
            "npo",
            {"rows": FORGET.add_column("token_weights", [[1.0]] * 10)},
            "`train_dataset` has a column `token_weights`",
        ),
        (
            "npo",
            {"rows": Dataset.from_dict({"messages": [MESSAGES]})},
            "row 0: `weight` of message 1 of `messages` is 0.5",
        ),
    ],
    ids=["negative", "zeros", "nan", "text", "batch-scalar", "pdu", "tokens", "messages"],
)
def test_weights_that_cannot_be_are_refused(make, name, change, message):
    with pytest.raises(ValueError, match=message):
        make(name, **change)
