import pytest
import torch
from torch.utils.data import BatchSampler

from llmmix import SFTMixConfig, SFTMixTrainer
from llmmix.sftmix.pairing import PairSampler, confident_half, draw_shares

QUIET = {"bf16": False, "max_steps": 1, "disable_tqdm": True, "use_cpu": True}


def test_halves():
    assert confident_half(torch.tensor([1.0, 3.0, 2.0])).tolist() == [False, True, False]
    assert confident_half(torch.zeros(4)).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="1 NaN among 3 rows"):
        confident_half(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(ValueError, match="at least two, got 1"):
        confident_half(torch.tensor([1.0]))


@pytest.mark.parametrize("count", [2, 7, 8])
def test_every_even_batch_is_half_and_half_and_an_epoch_sees_every_row(count):
    confident = confident_half(torch.rand(count, generator=torch.Generator().manual_seed(1)))
    sampler = PairSampler(confident, seed=3, epoch=lambda: 0)
    order = list(sampler)
    assert len(order) == len(sampler) == count + count % 2
    assert set(order) == set(range(count))
    for rows in BatchSampler(sampler, 4, drop_last=False):
        assert [bool(confident[row]) for row in rows] == [True, False] * (len(rows) // 2)


def test_pairs_change_with_the_epoch_and_depend_on_nothing_else():
    confident = confident_half(torch.arange(40.0))
    epoch = 0
    sampler = PairSampler(confident, seed=3, epoch=lambda: epoch)
    first, again = list(sampler), list(sampler)
    epoch = 1
    assert first == again and list(sampler) != first


def test_a_share_depends_on_the_pairs_place_in_the_step_alone():
    whole = draw_shares(0.5, slice(0, 6), (1, 10))
    parts = [draw_shares(0.5, slice(start, start + 2), (1, 10)) for start in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole) and ((whole > 0) & (whole < 1)).all()
    assert not torch.equal(draw_shares(0.5, slice(0, 6), (1, 11)), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.remove_columns("confidence"), "has no `confidence` column"),
        (lambda rows: rows.select([0]), "at least two, got 1"),
        (
            lambda rows: rows.remove_columns("confidence").add_column(
                "confidence", [float("nan")] + [0.0] * 23
            ),
            "has 1 NaN among 24 rows",
        ),
        (
            lambda rows: rows.remove_columns("confidence").add_column(
                "confidence", [None, *[0.5] * 23]
            ),
            "has 1 NaN among 24 rows",  # as NaN arrives from a JSON file
        ),
        (lambda rows: rows.to_iterable_dataset(), "must be a map-style `Dataset`"),
    ],
)
def test_sftmix_needs_a_confidence_for_each_row(checkpoint, math_rows, change, message):
    with pytest.raises(ValueError, match=message):
        SFTMixTrainer(
            checkpoint, args=SFTMixConfig("out", **QUIET), train_dataset=change(math_rows)
        )


def test_halves_follow_their_rows_when_others_are_dropped(checkpoint, math_rows):
    """The rows that max_length empties leave the halves of the others where they belong."""
    trainer = SFTMixTrainer(
        checkpoint, args=SFTMixConfig("out", max_length=29, **QUIET), train_dataset=math_rows
    )
    kept = trainer.train_dataset
    assert 2 <= len(kept) < len(math_rows)
    order = list(trainer._get_train_sampler())
    confident = [kept["confidence"][i] for i in order[0::2]]
    unconfident = [kept["confidence"][i] for i in order[1::2]]
    assert min(confident) > max(unconfident)
