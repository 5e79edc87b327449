"""The arithmetic of drawing, without a sampler."""

import numpy as np
import pytest
from scipy.stats import chi2

from llmmix.mixing.draws import choose, shuffles, uniforms


def test_uniforms_by_place_are_slices_of_the_stream():
    whole = uniforms(7, "domains", 0, 5000)
    assert whole.shape == (5000,) and (whole >= 0).all() and (whole < 1).all()
    rng = np.random.default_rng(0)
    for start, count in [(0, 1), (3, 2), (4, 4), (4999, 1), *rng.integers(1, 2000, (50, 2))]:
        part = uniforms(7, "domains", int(start), int(count))
        assert np.array_equal(part, whole[start : start + count])
    assert uniforms(7, "domains", 10, 0).shape == (0,)
    # far out, where counting there would take forever
    far = 10**15 + 3
    assert np.array_equal(uniforms(7, "x", far, 9)[2:], uniforms(7, "x", far + 2, 7))


def test_uniforms_are_uniform():
    numbers = uniforms(0, "domains", 12345, 100_000)
    counts = np.histogram(numbers, 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < chi2.ppf(0.9999, 99)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / np.sqrt(1e5)


def test_streams_differ_by_seed_and_by_name():
    streams = [uniforms(s, n, 0, 2000) for s in (0, 1, 2**63) for n in ("a", "b", "rows of a, 0")]
    for i, first in enumerate(streams):
        for second in streams[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_shuffles_are_permutations_that_do_not_depend_on_the_passes_asked_for(size):
    many = shuffles(3, "rows of a, 0", size, 0, 9)
    assert many.shape == (10, size)
    assert np.array_equal(np.sort(many, axis=1), np.tile(np.arange(size), (10, 1)))
    for first, last in ((0, 0), (9, 9), (3, 7)):
        assert np.array_equal(
            shuffles(3, "rows of a, 0", size, first, last), many[first : last + 1]
        )


def test_shuffles_differ_by_pass_seed_and_name():
    orders = [
        *shuffles(3, "a", 50, 0, 3),
        *shuffles(4, "a", 50, 0, 0),
        *shuffles(3, "b", 50, 0, 0),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_each_row_comes_at_each_place_as_often():
    orders = shuffles(0, "a", 5, 0, 9999)
    for place in range(5):
        counts = np.bincount(orders[:, place], minlength=5)
        assert ((counts - 2000) ** 2 / 2000).sum() < chi2.ppf(0.9999, 4)


def test_choose_by_hand():
    weights = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, np.nextafter(1, 0)])
    assert choose(weights, numbers).tolist() == [1, 1, 3, 3, 4, 4]


def test_choose_never_gives_a_weight_of_zero_whatever_the_rounding():
    rng = np.random.default_rng(0)
    numbers = np.r_[0.0, rng.random(200), np.nextafter(1, 0)]
    for _ in range(500):
        weights = rng.dirichlet(np.full(7, 0.3)) * (rng.random(7) < 0.6)
        if weights.sum() == 0:
            continue
        weights = weights / weights.sum()
        drawn = choose(weights, numbers)
        assert (weights[drawn] > 0).all()
    # sums that fall short of one by a rounding
    assert choose(np.array([0.1] * 10 + [0.0]), np.array([np.nextafter(1, 0)])).tolist() == [9]


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.2, 0.1], [0.01, 0, 0.04, 0.45, 0.5]])
def test_choose_fits_its_weights(weights):
    weights = np.array(weights)
    counts = np.bincount(
        choose(weights, uniforms(1, "domains", 0, 100_000)), minlength=len(weights)
    )
    expected = weights[weights > 0] * 100_000
    statistic = ((counts[weights > 0] - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(0.9999, len(expected) - 1) and not counts[weights == 0].any()
