"""The rows that the draws of a domain come to, and where they end."""

import json
import tracemalloc

import numpy as np
import pytest

from llmmix.mixing import MixtureSampler
from tests.mixing.samplers import (
    FIRST,
    METHODS,
    SIZES,
    again,
    domains_of,
    in_chunks,
    make,
    one_by_one,
)

# Pass after pass


@pytest.mark.parametrize("method", METHODS)
def test_a_pass_over_a_domain_visits_every_row_once_in_an_order_of_its_own(method):
    sampler = make(seed=3, method=method)
    rows = np.array(one_by_one(sampler, 600))
    for number, (name, size) in enumerate(SIZES.items()):
        own = rows[domains_of(rows) == number] - FIRST[name]
        assert len(own) == sampler.counts[name]
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert len(whole) > 4
        assert np.array_equal(np.sort(whole, 1), np.tile(np.arange(size), (len(whole), 1)))
        if size > 3:
            assert len({tuple(order) for order in whole}) == len(whole)
    assert list(sampler.counts) == ["a", "b", "c"] and sum(sampler.counts.values()) == 600


def test_the_rows_of_a_domain_come_in_one_order_whatever_the_weights():
    own = []
    for weights in ([0.9, 0.05, 0.05], [0.1, 0.8, 0.1]):
        rows = np.array(one_by_one(make(weights, seed=3), 900))
        own.append(rows[domains_of(rows) == 0][:50].tolist())
    assert own[0] == own[1] and len(own[0]) == 50


def test_passes_are_told():
    sampler, seen = make(seed=3), {}
    while sampler.position < 300:
        block = sampler.take(13)
        sampler.use(len(block.rows))
        for d, r, p in zip(block.domains, block.rows, block.passes, strict=True):
            seen.setdefault((d, p), []).append(r)
    for (d, p), rows in seen.items():
        size = list(SIZES.values())[d]
        last = p == max(q for e, q in seen if e == d)
        assert len(set(rows)) == len(rows) and (last or len(rows) == size)


@pytest.mark.parametrize("method", METHODS)
def test_strata_take_turns_draw_by_draw(method):
    sampler = make(seed=3, method=method)
    sampler.bind({"a": [2, 5], "b": [15, 5], "c": [1, 2]})
    assert sampler.sizes.tolist() == [7, 20, 3]
    rows = np.array(one_by_one(sampler, 400))
    strata = np.array([[0] * 2 + [1] * 5 + [0] * 15 + [1] * 5 + [0] + [1] * 2])[0]
    assert np.array_equal(strata[rows], np.arange(400) % 2)
    # each stratum has passes of its own
    own = rows[(domains_of(rows) == 0) & (strata[rows] == 1)] - 2
    whole = own[: len(own) // 5 * 5].reshape(-1, 5)
    assert np.array_equal(np.sort(whole, 1), np.tile(np.arange(5), (len(whole), 1)))
    other = make(seed=3, method=method)
    other.bind({"a": [2, 5], "b": [15, 5], "c": [1, 2]})
    assert in_chunks(other, 400, [3, 8]) == rows.tolist()
    stopped = make(seed=3, method=method)
    stopped.bind({"a": [2, 5], "b": [15, 5], "c": [1, 2]})
    one_by_one(stopped, 77)  # an odd place
    other.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert one_by_one(other, 323) == rows[77:].tolist()


def test_memory_does_not_grow_with_the_draws():
    sampler = make(seed=3, sizes={"a": 1000, "b": 50, "c": 20_000})
    in_chunks(sampler, 100_000, [8192])
    tracemalloc.start()
    for chunk, count in ((8192, 123), (512, 200)):  # and the steps of a trainer
        for step in range(count):
            if step % 50 == 0:
                sampler.set_weights([0.5, 0.2, 0.3])
            sampler.use(len(sampler.take(chunk).rows))
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sampler.position > 1_200_000
    # a pass of the largest domain is kept, and two are made at once
    assert current < 1_000_000 and peak < 5_000_000
    assert len(json.dumps(sampler.state_dict())) < 1000


# The end of a domain


def passes_of(rows, name):
    first = FIRST[name]
    own = [row for row in rows if first <= row < first + SIZES[name]]
    return len(own), np.bincount(np.array(own, dtype=int) - first, minlength=SIZES[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_epochs", [None, 2, 1.5, {"c": 2, "a": 4}])
def test_stop_ends_the_draws_before_a_domain_is_drawn_once_too_often(method, max_epochs):
    options = {"seed": 3, "method": method, "exhausted": "stop", "max_epochs": max_epochs}
    sampler = make(**options)
    rows = list(sampler)
    free = one_by_one(make(seed=3, method=method), len(rows) + 1)
    assert rows == free[:-1]
    capacity = sampler.capacity
    limits = max_epochs if isinstance(max_epochs, dict) else dict.fromkeys("abc", max_epochs or 1)
    for name, size in SIZES.items():
        assert capacity[name] == (int(limits[name] * size) if name in limits else np.inf)
    last = "abc"[domains_of(free)[-1]]
    assert sampler.counts[last] == capacity[last]  # it is what ends the draws
    assert all(sampler.counts[name] <= capacity[name] for name in "abc")
    assert list(sampler) == []
    for chunks in ([1], [4], [1000]):
        assert in_chunks(make(**options), 10**6, chunks) == rows
    stopped = make(**options)
    one_by_one(stopped, 3)
    assert list(again(stopped, **options)) == rows[3:]
    # a domain without a share does not end anything
    sampler.set_weights({name: float(name != last) for name in "abc"})
    assert list(sampler)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_epochs", [None, 2, {"a": 1, "b": 3, "c": 1}])
def test_spill_draws_all_that_the_domains_allow(method, max_epochs):
    options = {"seed": 3, "method": method, "exhausted": "spill", "max_epochs": max_epochs}
    sampler = make(**options)
    rows = list(sampler)
    limits = max_epochs if isinstance(max_epochs, dict) else dict.fromkeys("abc", max_epochs or 1)
    for name in "abc":
        count, times = passes_of(rows, name)
        assert count == limits[name] * SIZES[name] == sampler.counts[name] == sampler.capacity[name]
        assert set(times) == {limits[name]}
    for chunks in ([1], [4], [1000]):
        assert in_chunks(make(**options), 10**6, chunks) == rows
    for place in (5, 20, len(rows) - 1):
        stopped = make(**options)
        one_by_one(stopped, place)
        assert list(again(stopped, **options)) == rows[place:]


def test_spill_gives_a_share_to_the_others_in_proportion():
    sampler = make([0.5, 0.375, 0.125], {"a": 50, "b": 9000, "c": 9000}, exhausted="spill")
    in_chunks(sampler, 8000, [8192])
    counts = sampler.counts
    assert counts["a"] == 50
    assert counts["b"] / (counts["b"] + counts["c"]) == pytest.approx(0.75, abs=0.025)


def test_spill_leaves_a_domain_without_a_share_alone():
    sampler = make([0.5, 0, 0.5], exhausted="spill", seed=3)
    assert len(list(sampler)) == 10 and sampler.counts == {"a": 7, "b": 0, "c": 3}


def test_reshuffle_knows_no_end():
    sampler = make([0, 0, 1], seed=3)
    assert len(one_by_one(sampler, 1000)) == 1000 and sampler.capacity["c"] == np.inf


# What cannot be


def test_a_stratum_without_rows_is_refused():
    with pytest.raises(ValueError, match="`domains`: 'b' has no rows in one of its strata"):
        make().bind({"a": [3, 4], "b": [20, 0], "c": [1, 2]})


def test_a_domain_without_a_length_has_no_indices():
    sampler = MixtureSampler({"a": iter([]), "b": range(3)})
    with pytest.raises(ValueError, match="without a length has no indices"):
        next(iter(sampler))
    block = sampler.take(100)
    assert block.rows[block.domains == 0].tolist() == list(range((block.domains == 0).sum()))


@pytest.mark.parametrize("size", [100, 1000, 10**6])
def test_a_fraction_of_the_rows_is_not_one_short(size):
    """0.29 * 100 is 28.999..., and 1.1 * 100 is 110.000...01."""
    found = {}
    for passes in (0.29, 0.57, 0.58, 1.1, 2.3, 0.005):
        sampler = MixtureSampler({"a": range(size)}, max_epochs=passes, exhausted="stop")
        found[passes] = sampler.capacity["a"]
    assert found == {passes: int(round(passes * size, 6)) for passes in found}
