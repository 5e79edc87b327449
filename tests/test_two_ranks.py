"""Two ranks are one process: one launch of tests/two_ranks.py serves all of these tests."""

import json

import pytest
import torch

from tests.ranks import run_on_two_ranks
from tests.test_filtering import chain_of_thought, finish, make
from tests.test_invariants import METHODS, assert_same, run

__all__ = ["make", "run"]  # fixtures

pytestmark = pytest.mark.xdist_group("two ranks")  # on one worker, where workers take groups


@pytest.fixture(scope="module")
def launched(checkpoint, math_rows, preference_rows, tmp_path_factory):
    """The folder of what two ranks wrote, and what they printed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    math_rows.to_json(folder / "math.jsonl")
    preference_rows.to_json(folder / "preferences.jsonl")
    return folder, run_on_two_ranks("tests.two_ranks", checkpoint, folder).stdout


def read(folder, name):
    losses = json.loads((folder / f"{name}.json").read_text())
    return losses, torch.load(folder / f"{name}.pt", weights_only=True)


def test_two_processes_are_one(run, launched):
    """Two ranks of 2 rows and 2 micro-batches, against one process of 8 rows."""
    for name, (trainer, config, given) in METHODS.items():
        losses, weights = read(launched[0], name)
        one = run(trainer, config, per_device_train_batch_size=8, use_cpu=True, **given)
        assert_same(one, (torch.tensor(losses), weights))


def test_two_processes_filter_and_sample_as_one(make, launched):
    losses, weights = finish(chain_of_thought(make("one", use_cpu=True)))
    two, weights_of_two = read(launched[0], "filtered")
    assert two == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(weights_of_two, weights, rtol=1e-4, atol=1e-6)


def test_a_head_whose_weight_is_sharded_trains_as_on_one_process(launched):
    assert launched[1].count("fsdp2 ") == 7  # four kinds of head untied, three tied


def test_under_zero3_too():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    assert run_on_two_ranks("tests.sharded", "zero3").stdout.count("zero3 ") == 7
