"""Two ranks are one process: one launch of tests/two_ranks.py serves all tests that ask."""

import json

import pytest
import torch

from tests.ranks import run_on_two_ranks
from tests.test_filtering import chain_of_thought, finish, make
from tests.test_invariants import METHODS, assert_same, run

__all__ = ["make", "run"]  # fixtures


def read(folder, name):
    losses = json.loads((folder / f"{name}.json").read_text())
    return losses, torch.load(folder / f"{name}.pt", weights_only=True)


def test_two_processes_are_one(run, two_ranks):
    """Two ranks of 2 rows and 2 micro-batches, against one process of 8 rows."""
    for name, (trainer, config, given) in METHODS.items():
        losses, weights = read(two_ranks, name)
        one = run(trainer, config, per_device_train_batch_size=8, use_cpu=True, **given)
        assert_same(one, (torch.tensor(losses), weights))


def test_two_processes_filter_and_sample_as_one(make, two_ranks):
    losses, weights = finish(chain_of_thought(make("one", use_cpu=True)))
    two, weights_of_two = read(two_ranks, "filtered")
    assert two == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(weights_of_two, weights, rtol=1e-4, atol=1e-6)


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
