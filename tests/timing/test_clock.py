import pytest

from llmmix.timing import Case, measure, measure_apart


@pytest.mark.slow
def test_peak_memory_is_that_of_one_call():
    """A call that holds 64 MiB, in a process of its own."""
    row = measure_apart([Case("row", "contender", hold, {"mib": 64})], rounds=1, device="cpu")
    assert 60 < row["contenders"]["contender"]["peak_mib"] < 90


def hold(mib):
    import torch

    return lambda: torch.zeros(mib * 2**18).add_(1)


def test_contenders_take_turns_and_the_ratio_is_of_their_medians():
    calls = []

    def build(name):
        return lambda: calls.append(name)

    cases = [Case("row", name, build, {"name": name}) for name in ("ours", "theirs")]
    row = measure(cases, rounds=2, device="cpu", memory=False)
    assert calls == ["ours", "theirs"] * 3  # the first turn warms up
    ours, theirs = row["contenders"].values()
    assert row["row"] == "row" and ours["peak_mib"] is None
    assert theirs["time_ratio"] == ours["seconds"] / theirs["seconds"]
    assert ours["range"][0] <= ours["seconds"] <= ours["range"][1]
