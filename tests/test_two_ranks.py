"""Two ranks are one process: one launch of tests/two_ranks.py serves all tests that ask."""

import pytest
import torch

from tests import uneven
from tests.ranks import run_on_two_ranks


@pytest.fixture
def one(checkpoint, uneven_rows, tmp_path):
    """The trainer of a run of tests/uneven.py, on one process."""

    def one(name, accumulation, **given):
        rows = uneven_rows["preferences" if name.startswith("rpo") else "math"]
        return uneven.make(name, accumulation, checkpoint, tmp_path, rows, 1, **given)

    return one


@pytest.fixture(scope="module")
def two(two_ranks):
    """Log and weights of a run on two ranks."""
    found = torch.load(two_ranks / "found.pt", weights_only=True)
    return lambda *run: found[run]


def assert_same(one, two):
    assert list(uneven.differences(one[0], two[0])) == []
    torch.testing.assert_close(one[1], two[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        pytest.param(*run, marks=pytest.mark.slow) if "-" in run[0] else run  # the variants
        for run in uneven.RUNS
    ],
)
def test_two_processes_count_each_row_once(one, two, name, accumulation):
    """Weights, and all that is logged in training and evaluation."""
    assert_same(uneven.finish(one(name, accumulation)), two(name, accumulation))


@pytest.mark.parametrize(("name", "accumulation"), uneven.SAMPLED)
def test_two_processes_filter_and_sample_as_one(one, two, name, accumulation):
    assert_same(uneven.finish(one(name, accumulation)), two(name, accumulation))


@pytest.mark.parametrize("name", ["dco", "sftmix", "rpo"])
@pytest.mark.parametrize(("rows", "accumulation"), [(32, 1), (4, 8)])
def test_a_step_is_the_same_in_micro_batches_of_any_size(one, two, name, rows, accumulation):
    """Two ranks of 8 rows and 2 micro-batches, against one process; five rows are 4 and 1 there."""
    log, weights = two(name, 2)
    trainer = one(
        name,
        2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=7,
    )
    other, other_weights = uneven.finish(trainer)
    torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=1e-6)
    keys = {"loss", "grad_norm", "num_tokens"} | ({"eval_loss"} if name != "sftmix" else set())
    for entry, expected in zip(other, log, strict=True):
        for key in keys & entry.keys():  # an evaluation's mean over tokens is taken batch by batch
            assert entry[key] == pytest.approx(expected[key], rel=1e-5), key


def test_every_rank_resumes_where_the_main_one_does(two_ranks):
    """Though the other sees no files."""
    newest = max((two_ranks / "mixing/moving").glob("checkpoint-*"), key=lambda path: path.name)
    assert (two_ranks / "printed.txt").read_text().count(f"resumed from {newest}\n") == 4


def test_a_head_whose_weight_is_sharded_trains_as_on_one_process(two_ranks):
    assert (two_ranks / "printed.txt").read_text().count(
        "fsdp2 "
    ) == 7  # four kinds of head untied, three tied


def test_under_zero3_too():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    assert run_on_two_ranks("tests.sharded", "zero3").stdout.count("zero3 ") == 7
