"""What a `MixtureSampler` draws depends on the seed, the place and the weights decided for it."""

import json

import numpy as np
import pytest
from scipy.stats import chi2

from llmmix.mixing import MixtureSampler
from llmmix.mixing.draws import choose, shuffles, uniforms
from tests.mixing.samplers import FIRST, METHODS, again, domains_of, in_chunks, make, one_by_one

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


# Shares


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
        ({"unit": "rows"}, r"`weight_unit` \(`unit`\) must be one of"),
        ({"method": "exact"}, r"`draws` \(`method`\) must be one of"),
        ({"exhausted": "repeat"}, "`exhausted` must be one of"),
        ({"max_epochs": 2}, "`max_epochs=2` needs `exhausted`"),
        ({"max_epochs": 0, "exhausted": "stop"}, "`max_epochs` must be positive"),
        ({"max_epochs": -1.0, "exhausted": "spill"}, "`max_epochs` must be positive"),
        ({"max_epochs": float("nan"), "exhausted": "stop"}, "`max_epochs` must be positive"),
        ({"max_epochs": {"a": 0}, "exhausted": "stop"}, "`max_epochs` must be positive"),
        ({"max_epochs": {"z": 1}, "exhausted": "stop"}, r"`max_epochs`: no domain \['z'\]"),
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
