"""What is killed goes on: random kills of every recipe, and cuts of every file of a checkpoint."""

import os

import pytest

from tests.kills import RUNS, Killer, differences, prepare

# For more: LLMMIX_KILLS=200 LLMMIX_KILL_SEED=7 pytest tests/test_kills.py -k doremi
KILLS = int(os.environ.get("LLMMIX_KILLS", "20"))
SEED = int(os.environ.get("LLMMIX_KILL_SEED", "0"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    prepare(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_killed_at_random_is_never_stopped(run, folder):
    killer = Killer(folder, run, SEED)
    assert killer.run_again == killer.never_stopped
    while killer.kills < KILLS:
        left = killer.life()
        assert left == killer.never_stopped, differences(left, killer.never_stopped)
    print(f"{run}, seed {SEED}: {killer.kills} kills in {killer.lives} lives")
