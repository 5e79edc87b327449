"""What a `MixtureSampler` draws depends on the seed, the place and the weights decided for it."""

import itertools
import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from llmmix.mixing import MixtureSampler
from llmmix.mixing.draws import choose, shuffles, uniforms

SIZES = {"a": 7, "b": 20, "c": 3}
FIRST = {"a": 0, "b": 7, "c": 27}
METHODS = ("multinomial", "even")


def make(weights=(0.5, 0.2, 0.3), sizes=SIZES, **options):
    return MixtureSampler({name: range(n) for name, n in sizes.items()}, weights, **options)


def one_by_one(sampler, count):
    return list(itertools.islice(sampler, count))


def in_chunks(sampler, count, chunks):
    """The same draws ahead of time, with `take`, and used piece by piece."""
    first = np.concatenate([[0], np.cumsum(sampler.sizes)[:-1]])
    rows, sizes = [], itertools.cycle(chunks)
    while len(rows) < count:
        block = sampler.take(min(next(sizes), count - len(rows)))
        if block is None:
            break
        rows += (first[block.domains] + block.rows).tolist()
        sampler.use(len(block.rows))
    return rows


def domains_of(rows, sizes=SIZES):
    edges = np.cumsum(list(sizes.values()))
    return np.searchsorted(edges, rows, side="right")


def again(sampler, **options):
    """Another sampler that goes on from the state of this one, as a checkpoint has it."""
    other = make(**options)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    return other


# Draw i depends on the seed, on i and on the weights decided for it


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunks", [[1], [2, 1, 5], [64], [500], [7, 300]])
def test_draws_are_the_same_one_by_one_and_in_chunks(method, chunks):
    expected = one_by_one(make(seed=3, method=method), 500)
    assert in_chunks(make(seed=3, method=method), 500, chunks) == expected
    assert len(set(expected)) == 30


@pytest.mark.parametrize("method", METHODS)
def test_draws_are_the_same_taken_ahead_and_used_in_part(method):
    expected = one_by_one(make(seed=3, method=method), 100)
    sampler, used = make(seed=3, method=method), 0
    rng = np.random.default_rng(0)
    while used < 100:
        blocks = [sampler.take(int(n)) for n in rng.integers(1, 9, 3)]  # a loader's look-ahead
        rows = np.concatenate([b.rows for b in blocks])
        domains = np.concatenate([b.domains for b in blocks])
        use = min(int(rng.integers(0, len(rows) + 1)), 100 - used)
        found = [FIRST["abc"[d]] + r for d, r in zip(domains[:use], rows[:use], strict=True)]
        assert found == expected[used : used + use]
        sampler.use(use)
        used += use
        assert sampler.position == used and sum(sampler.counts.values()) == used
        if rng.random() < 0.5:
            sampler.rewind()
        else:
            sampler.set_weights(sampler.weights)


def test_draws_differ_by_seed_and_not_by_run():
    draws = {seed: tuple(one_by_one(make(seed=seed), 100)) for seed in (0, 1, 2)}
    assert len(set(draws.values())) == 3
    assert tuple(one_by_one(make(seed=1), 100)) == draws[1]
    sampler = make(seed=1)
    one_by_one(sampler, 41)
    sampler.reset()
    assert tuple(one_by_one(sampler, 100)) == draws[1] and sampler.position == 100


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [1, 37, 99])
def test_weights_set_at_a_draw_leave_those_before_it(method, place):
    before = one_by_one(make(seed=3, method=method), 200)
    sampler, rows = make(seed=3, method=method), []
    for row in sampler:  # by whoever reads, in the middle of an iteration
        rows.append(row)
        if len(rows) == place:
            sampler.set_weights({"c": 1, "a": 0, "b": 1})
        if len(rows) == 200:
            break
    assert rows[:place] == before[:place]
    assert set(domains_of(rows[place:])) == {1, 2}
    ahead = make(seed=3, method=method)
    assert in_chunks(ahead, place, [8]) == before[:place]
    ahead.take(64)
    ahead.set_weights([0, 1, 1])
    assert in_chunks(ahead, 200 - place, [5]) == rows[place:]


def test_what_was_decided_before_does_not_matter():
    """The number of a draw says which domain; how often that one came, which row."""
    sampler, other = make(seed=5), make(seed=5)
    one_by_one(sampler, 50)
    for _ in range(50):
        other.set_weights([0.2, 0.3, 0.5])
        other.set_weights([0.5, 0.2, 0.3])
        one_by_one(other, 1)
    assert one_by_one(sampler, 100) == one_by_one(other, 100)
    # numbers of the stream belong to places: a draw under its own weights is not moved
    left, right = make(seed=5, weights=(1, 0, 0)), make(seed=5, weights=(0, 0, 1))
    for s in (left, right):
        in_chunks(s, 64, [64])
        s.set_weights([0.5, 0.2, 0.3])
    assert np.array_equal(left.take(300).domains, right.take(300).domains)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1, 29, 30, 31, 63, 64, 150])
def test_a_state_goes_on_at_any_draw(method, place):
    """In the middle of a block and of a plan too, through JSON."""
    options = {"seed": 3, "method": method}
    plan = [((1, 1, 1), 30), ((0, 0.5, 0.5), 34), ((0.7, 0.2, 0.1), None)]

    def planned():
        sampler = make(**options)
        sampler.set_plan(plan)
        return sampler

    whole = planned()
    expected = one_by_one(whole, 250)
    assert set(domains_of(expected[30:64])) == {1, 2}
    stopped = planned()
    assert one_by_one(stopped, place) == expected[:place]
    ahead = planned()
    in_chunks(ahead, place, [11])
    ahead.take(100)  # drawn and not used: not part of the state
    for one in (stopped, ahead):
        resumed = again(one, **options)
        assert resumed.position == place
        assert resumed.weights.tolist() == one.weights.tolist()
        assert in_chunks(resumed, 250 - place, [9, 1]) == expected[place:]
        assert resumed.counts == whole.counts
        assert resumed.position == whole.position


def test_a_state_does_not_change_with_the_sampler_or_the_other_way_round():
    sampler = make(seed=3)
    state = sampler.state_dict()
    kept = json.dumps(state)
    one_by_one(sampler, 10)
    sampler.set_weights([1, 0, 0])
    assert json.dumps(state) == kept
    sampler.take(5)
    sampler.load_state_dict(state)
    assert one_by_one(sampler, 50) == one_by_one(make(seed=3), 50)
    assert json.dumps(state) == kept


def test_the_draws_are_those_that_the_streams_say():
    """Number i of one stream is the domain of draw i, another the order of a domain's rows."""
    rows = one_by_one(make(seed=5), 300)
    domains = choose(np.array([0.5, 0.2, 0.3]), uniforms(5, "domains", 0, 300))
    assert domains_of(rows).tolist() == domains.tolist()
    orders = shuffles(5, "rows of a, 0", 7, 0, 50).ravel()
    own = np.array(rows)[domains == 0]
    assert own.tolist() == orders[: len(own)].tolist()


# Passes and counts


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


@pytest.mark.parametrize("weights", [[0.5, 0.2, 0.3], [0.98, 0.02, 0], [1, 1, 1]])
def test_independent_draws_fit_their_weights(weights):
    sampler = make(weights, seed=0)
    rows = in_chunks(sampler, 20_000, [8192])
    counts = np.bincount(domains_of(rows), minlength=3)
    assert list(sampler.counts.values()) == counts.tolist()
    p = np.array(weights) / np.sum(weights)
    expected = 20_000 * p[p > 0]
    assert not counts[p == 0].any()
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(0.9999, len(expected) - 1)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10, 30])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_even_draws_are_within_two_of_their_share_at_every_draw(k, spread):
    rng = np.random.default_rng(k)
    for seed in range(20):
        weights = rng.dirichlet(np.full(k, spread))
        sampler = make(weights, {str(j): 50 for j in range(k)}, seed=seed, method="even")
        counts = np.cumsum(np.eye(k)[sampler.take(400).domains], axis=0)
        assert np.abs(counts - np.arange(1, 401)[:, None] * weights).max() < 2


@pytest.mark.parametrize("k", [2, 3, 5, 10])
def test_even_draws_stay_within_two_of_their_share_when_weights_change_often(k):
    rng = np.random.default_rng(k)
    for seed in range(3):
        sampler = make(None, {str(j): 50 for j in range(k)}, seed=seed, method="even")
        share, counts = np.zeros(k), np.zeros(k)
        for _ in range(300):
            weights = rng.dirichlet(np.full(k, 0.5))
            sampler.set_weights(weights)
            block = sampler.take(int(rng.integers(1, 9)))
            sampler.use(len(block.domains))
            for domain in block.domains:
                share += weights
                counts[domain] += 1
                assert np.abs(counts - share).max() < 2


def test_even_draws_are_spaced():
    rows = one_by_one(make([0.75, 0.25, 0], seed=3, method="even"), 2000)
    assert set(np.diff(np.flatnonzero(domains_of(rows) == 1))) == {4}
    assert 2 not in domains_of(rows)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_the_unit_by_the_mean_of_each_domain(method):
    tokens = {"a": 10.0, "b": 40.0, "c": 5.0}
    sampler = make(seed=3, unit="tokens", tokens_per_row=tokens, method=method)
    in_chunks(sampler, 20_000, [4000])
    drawn = np.array([sampler.counts[name] * tokens[name] for name in "abc"])
    assert drawn / drawn.sum() == pytest.approx([0.5, 0.2, 0.3], abs=0.01)
    assert sampler.weights.tolist() == pytest.approx([0.5, 0.2, 0.3])  # as they were given


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


# Plans


def test_a_plan_ends_the_draws_and_another_lets_them_go_on():
    sampler = make(seed=3)
    sampler.set_plan([([1, 0, 0], 5), ([0, 1, 0], 3)])
    assert sampler.remaining == 8
    assert domains_of(list(sampler)).tolist() == [0] * 5 + [1] * 3
    assert sampler.remaining == 0 and list(sampler) == [] and sampler.take(4) is None
    assert sampler.weights.tolist() == [0, 1, 0]  # of the last draw decided
    sampler.set_plan([([0, 0, 1], 4)])
    assert sampler.take(100).domains.tolist() == [2] * 4 and sampler.take(1) is None
    sampler.use(1)
    assert sampler.position == 9 and sampler.remaining == 3
    # a plan begins at the first draw that was not used
    sampler.set_plan([([1, 0, 0], 2), ([0, 1, 0], None)])
    assert domains_of(one_by_one(sampler, 6)).tolist() == [0, 0, 1, 1, 1, 1]
    assert sampler.remaining == float("inf")
    assert sampler.counts == {"a": 7, "b": 7, "c": 1}


def test_a_draw_ahead_ends_where_the_weights_change():
    sampler = make(seed=3)
    sampler.set_plan([([1, 0, 0], 5), ([0, 1, 0], 3), ([0, 0, 1], None)])
    assert [len(sampler.take(100).rows) for _ in range(3)] == [5, 3, 100]
    assert sampler.position == 0 and sampler.weights.tolist() == [1, 0, 0]


def test_a_new_plan_raises_the_version():
    sampler = make(seed=3)
    versions = [sampler.version]
    for change in (
        lambda: sampler.set_weights([1, 0, 0]),
        lambda: sampler.set_plan([([1, 0, 0], 3)]),
        lambda: sampler.load_state_dict(sampler.state_dict()),
        sampler.reset,
    ):
        change()
        versions.append(sampler.version)
    assert versions == sorted(set(versions))
    one_by_one(sampler, 10)
    assert sampler.version == versions[-1]


def test_weights_are_a_copy():
    given = np.array([1, 2, 1])
    sampler = make(given, seed=3)
    sampler.weights[:] = 0
    sampler.set_weights(given)
    assert given.tolist() == [1, 2, 1] and given.dtype == int
    given[:] = 0
    assert sampler.weights.tolist() == [0.25, 0.5, 0.25]


def test_weights_go_by_name():
    expected = [0.5, 0.2, 0.3]
    by_name = {"c": 0.3, "a": 0.5, "b": 0.2}
    assert make(by_name).weights.tolist() == pytest.approx(expected)
    assert make(pd.Series(by_name)).weights.tolist() == pytest.approx(expected)
    sampler = make(None)
    assert sampler.weights.tolist() == pytest.approx([1 / 3] * 3)
    sampler.set_plan([(by_name, 3)])
    assert sampler.weights.tolist() == pytest.approx(expected)


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


# What cannot be


@pytest.mark.parametrize(
    "weights",
    [
        [-0.1, 0.6, 0.5],
        [float("nan"), 1, 1],
        [float("inf"), 1, 1],
        [0, 0, 0],
        [],
        [0.5, 0.5],
        [0.25] * 4,
        [[1, 1, 1]],
        1.0,
        {"a": 1, "b": 1},
        {"a": 1, "b": 1, "c": 1, "d": 1},
        {"a": 1, "b": 1, "d": 1},
        {},
        ["a", "b", "c"],
        ["0.5", "0.2", "0.3"],
        "abc",
        [None, 1, 1],
        [[1], [2, 3], [4]],
    ],
)
def test_weights_that_are_none_are_refused(weights):
    sampler = make()
    for give in (make, sampler.set_weights, lambda w: sampler.set_plan([([1, 0, 0], 5), (w, 3)])):
        with pytest.raises(ValueError, match="`weights`"):
            give(weights)


def test_refused_weights_leave_what_was_drawn_ahead():
    """The version says that it stands, and a loader goes on to use it."""
    expected = one_by_one(make(seed=3), 60)
    sampler = make(seed=3)
    sampler.take(10)
    sampler.use(4)
    version = sampler.version
    for change in (sampler.set_weights, lambda w: sampler.set_plan([([1, 0, 0], 5), (w, None)])):
        with pytest.raises(ValueError, match="`weights`"):
            change([1, -1, 1])
    assert sampler.version == version
    sampler.use(6)
    assert sampler.position == 10 and sum(sampler.counts.values()) == 10
    assert one_by_one(sampler, 50) == expected[10:]


def test_huge_and_tiny_weights_are_weights():
    assert make([1e308, 1e308, 0]).weights.tolist() == [0.5, 0.5, 0]
    assert make([5e-324, 5e-324, 0]).weights.tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("domains", "match"),
    [
        ({}, "`domains` must map"),
        ([range(3)], "`domains` must map"),
        (None, "`domains` must map"),
        ({"a": [], "b": range(3)}, "`domains`: 'a' has no rows"),
        ({"b": range(3), "a": []}, "`domains`: 'a' has no rows"),
    ],
)
def test_domains_that_are_none_are_refused(domains, match):
    with pytest.raises(ValueError, match=match):
        MixtureSampler(domains)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": -1}, "`seed`"),
        ({"seed": 1.5}, "`seed`"),
        ({"seed": "1"}, "`seed`"),
        ({"seed": 2**64}, "`seed`"),
        ({"unit": "rows"}, "`unit` must be one of"),
        ({"method": "exact"}, "`method` must be one of"),
        ({"exhausted": "repeat"}, "`exhausted` must be one of"),
        ({"max_epochs": 2}, "`max_epochs=2` needs `exhausted`"),
        ({"max_epochs": 0, "exhausted": "stop"}, "`max_epochs` must be positive"),
        ({"max_epochs": -1.0, "exhausted": "spill"}, "`max_epochs` must be positive"),
        ({"max_epochs": float("nan"), "exhausted": "stop"}, "`max_epochs` must be positive"),
        ({"max_epochs": {"a": 0}, "exhausted": "stop"}, "`max_epochs` must be positive"),
        ({"max_epochs": {"z": 1}, "exhausted": "stop"}, r"`max_epochs` names \['z'\]"),
        ({"max_epochs": [1, 2], "exhausted": "stop"}, "`max_epochs`"),
        ({"max_epochs": "one", "exhausted": "stop"}, "`max_epochs`"),
    ],
)
def test_options_that_are_none_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize(
    "tokens",
    [
        {"a": 1.0, "b": 2.0},
        {"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0},
        {"a": 0.0, "b": 2.0, "c": 1.0},
        {"a": -1.0, "b": 2.0, "c": 1.0},
        {"a": float("nan"), "b": 2.0, "c": 1.0},
        None,
    ],
)
def test_means_of_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(ValueError, match="`tokens_per_row`"):
        make(unit="tokens", tokens_per_row=tokens).take(10)


@pytest.mark.parametrize(
    "segments", [[], [([1, 1, 1], -3)], [([1, 1, 1], 2.5)], [([1, 1, 1], None), ([1, 0, 0], 3)]]
)
def test_plans_that_are_none_are_refused(segments):
    with pytest.raises(ValueError, match="`segments`"):
        make().set_plan(segments)


def test_a_stratum_without_rows_is_refused():
    with pytest.raises(ValueError, match="`domains`: 'b' has no rows in one of its strata"):
        make().bind({"a": [3, 4], "b": [20, 0], "c": [1, 2]})


def test_a_domain_without_a_length_has_no_indices():
    sampler = MixtureSampler({"a": iter([]), "b": range(3)})
    with pytest.raises(ValueError, match="without a length has no indices"):
        next(iter(sampler))
    block = sampler.take(100)
    assert block.rows[block.domains == 0].tolist() == list(range((block.domains == 0).sum()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sizes": {"a": 7, "b": 20}, "weights": None}, "`domains`"),
        ({"sizes": {"a": 7, "b": 20, "c": 4}}, "`domains`"),
        ({"sizes": {"b": 20, "a": 7, "c": 3}}, "`domains`"),
        ({"sizes": {"a": 7, "b": 20, "d": 3}}, "`domains`"),
        ({"seed": 4}, "`seed`"),
        ({"method": "even"}, "`method`"),
        ({"exhausted": "stop"}, "`exhausted`"),
        ({"exhausted": "stop", "max_epochs": 2}, "`exhausted`|`max_epochs`"),
        ({"unit": "tokens", "tokens_per_row": {"a": 1, "b": 2, "c": 3}}, "`unit`"),
    ],
)
def test_a_state_of_other_domains_or_settings_is_refused(options, match):
    sampler = make(seed=3)
    one_by_one(sampler, 10)
    with pytest.raises(ValueError, match=match):
        again(sampler, **{"seed": 3, **options})


def test_a_state_of_other_limits_or_token_means_is_refused():
    with pytest.raises(ValueError, match="`max_epochs`"):
        again(make(exhausted="stop"), exhausted="stop", max_epochs=2)
    tokens = {"a": 1.0, "b": 2.0, "c": 3.0}
    sampler = make(unit="tokens", tokens_per_row=tokens)
    with pytest.raises(ValueError, match="`tokens_per_row`"):
        again(sampler, unit="tokens", tokens_per_row={**tokens, "a": 10.0})


@pytest.mark.parametrize("version", [0, 2, None])
def test_a_state_of_another_version_is_refused(version):
    state = {**make().state_dict(), "version": version}
    with pytest.raises(ValueError, match="version"):
        make().load_state_dict(state)
    with pytest.raises(ValueError, match="version"):
        make().load_state_dict({})
