"""Weights of rows and tokens: what is refused, and how they reach a batch and a loss."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llmmix.rows.weights import (
    Weighing,
    Weights,
    as_weight,
    check_row_weights,
    drop_weightless,
    take_weights,
)

COLLATE = DataCollatorForLanguageModeling(pad_token_id=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, 0.0), (1.5, 1.5), (True, 1.0), (False, 0.0), (None, 1.0), (np.float32(0.25), 0.25)],
    ids=str,
)
def test_numbers_and_bools_are_weights_and_nothing_is_one(given, expected):
    assert as_weight(given, "`weight`") == expected


BAD = [
    ([1.0, math.nan], "row 1: `weight` is nan. Give a finite number"),
    ([math.inf, 1.0], "row 0: `weight` is inf"),
    ([1.0, 1e39], "row 1: `weight` is 1e\\+39, and fp32 ends at 3.4e\\+38"),
    ([1.0, 1.0, -0.5], "row 2: `weight` is -0.5.*train with `UnlearnTrainer`"),
    (["0", "1"], "row 0: `weight` is '0', of type str"),
    ([[1.0], [1.0]], "row 0: `weight` is .1.0., of type list"),
    ([0, 0.0, False], "`weight` is 0 in all of its 3 rows"),
]


@pytest.mark.parametrize(("column", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_what_is_no_weight_is_refused_with_its_row(column, message):
    rows = Dataset.from_dict({"text": ["x"] * len(column), "weight": column})
    with pytest.raises(ValueError, match=message):
        check_row_weights(rows, "train_dataset")
    if "all of" not in message:  # which a stream does not know
        with pytest.raises(ValueError, match=message):
            list(check_row_weights(rows.to_iterable_dataset(), "train_dataset"))


def test_rows_of_weight_0_are_dropped_and_counted(caplog):
    rows = Dataset.from_dict({"text": list("abcd"), "weight": [0, None, 0.0, 2]})
    with caplog.at_level(logging.WARNING):
        kept = drop_weightless(check_row_weights(rows, "train_dataset"), "train_dataset")
    assert kept["text"][:] == ["b", "d"]
    assert "multiplied by its `weight` (mean 0.75)" in caplog.text
    assert "Dropped 2 of 4 rows of `train_dataset`: their weights leave no token" in caplog.text
    assert [r["text"] for r in drop_weightless(rows.to_iterable_dataset(), "x")] == ["b", "d"]


def test_a_stream_tells_its_weights_and_is_refused_where_all_are_0(caplog):
    rows = Dataset.from_dict({"text": ["a", "b"], "weight": [0, 0]}).to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        rows = check_row_weights(rows, "train_dataset")
    assert "`train_dataset`: the loss of a row is multiplied by its `weight`." in caplog.text
    with pytest.raises(ValueError, match="`train_dataset`: the weights leave no token to score"):
        drop_weightless(rows, "train_dataset")


def rows_of_tokens(**first):
    return [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "weight": 0.5, **first},
        {"input_ids": [8, 9], "labels": [-100, 9], "weight": None, "token_weights": [1.0, 2.0]},
        {"input_ids": [4], "labels": [4], "weight": 0},
    ]


@pytest.mark.parametrize(("keep_end", "kept"), [(False, [1, 2, 0]), (True, [2, 0, 4])])
def test_weights_are_cut_and_padded_as_the_tokens_are(keep_end, kept):
    """Of a row of four tokens TRL has left three, at its start or its end."""
    batch = Weighing(COLLATE, keep_end)(rows_of_tokens(token_weights=[1.0, 2.0, 0.0, 4.0]))
    assert batch["weight"].tolist() == [0.5, 1.0, 0.0]
    assert batch["token_weights"].tolist() == [kept, [1, 2, 0], [1, 0, 0]]
    labels = [label if weight else -100 for label, weight in zip([5, 6, 7], kept, strict=True)]
    assert batch["labels"].tolist() == [labels, [-100, 9, -100], [-100] * 3]
    rest, weights = take_weights(batch)
    assert rest.keys() == COLLATE([{"input_ids": [1]}]).keys()
    assert weights.given and "weight" in batch
    assert not take_weights(rest)[1].given


def test_weights_stand_where_a_collator_puts_the_tokens():
    def on_the_left(rows):
        return {name: value.flip(1) for name, value in COLLATE(rows).items()}

    batch = Weighing(on_the_left)(rows_of_tokens()[:2])
    assert batch["token_weights"].tolist() == [[1, 1, 1], [0, 1, 2]]
    with pytest.raises(ValueError, match="5 tokens of a batch"):
        Weighing(COLLATE)(rows_of_tokens(token_weights=[1.0])[:2])
    with pytest.raises(ValueError, match="no `attention_mask`"):
        Weighing(lambda rows: {"labels": None})(rows_of_tokens()[:2])


def test_losses_are_divided_by_counts():
    """The vector of two rows, of three tokens and two; a row of weight 0 is as one that is absent.

    A row twice is a row of weight 2, but for the count, which knows of one row more.
    """
    nll = torch.tensor([[0.4, 0.2, 0.6], [1.0, 3.0, 0.0]], dtype=torch.float64)
    scored = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()

    def mean(*rows):
        weights = Weights(torch.tensor(rows))
        assert [x.item() for x in weights.mean(scored)["weight/mean"]] == [
            3 * rows[0] + 2 * rows[1],
            5,
        ]
        return (weights.times(nll).sum() / scored.sum()).item()

    assert mean(1.0, 0.5) == pytest.approx(0.64, rel=1e-12)
    assert mean(1.0, 1.0) == pytest.approx(1.04, rel=1e-12)
    assert mean(2.0, 1.0) * 5 == pytest.approx(torch.cat([nll, nll[:1]]).sum().item(), rel=1e-12)
    batch = Weighing(COLLATE)([{"input_ids": [1] * 4, "weight": w} for w in (1.0, 0.0)])
    assert (batch["labels"] != -100).sum(1).tolist() == [4, 0]
    assert Weights().times(nll) is nll and Weights().mean(scored) == {}


def test_weights_of_rows_and_tokens_are_one_product():
    tokens = torch.tensor([[9.0, 1.0, 2.0], [9.0, 0.5, 0.0]])
    weights = Weights(torch.tensor([0.5, 2.0]), tokens)
    assert weights.times(torch.ones(2, 2)).tolist() == [[0.5, 1.0], [1.0, 0.0]]
    # Two virtual tokens of an adapter stand before the row
    assert weights.of_tokens(torch.ones(2, 4))[:, 2:].tolist() == [[0.5, 1.0], [1.0, 0.0]]
    assert weights.times(torch.ones(2)).tolist() == [0.5, 2.0]  # of rows
