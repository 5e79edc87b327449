import numpy as np
import pytest
from sklearn.cluster import DBSCAN

from llmmix.laws.simplex import (
    hull_distance,
    nearest_run,
    project,
    same_mixture,
    typical_spacing,
)


@pytest.mark.parametrize("k", [2, 5, 40])
def test_projection_meets_its_kkt_condition(k):
    rng = np.random.default_rng(k)
    lower = rng.uniform(0, 0.8 / k, k)
    upper = np.maximum(np.minimum(1, lower + rng.uniform(0.4, 5, k) / k), 1.2 / k)
    given = rng.normal(size=(7, 50, k)) * 10.0 ** rng.uniform(-3, 2, (7, 50, 1))
    got = project(given, lower, upper)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-12)
    assert (got >= lower).all() and (got <= upper).all()
    # given - got is the same t for shares between their bounds, at most t below, at least above
    shift = given - got
    most = np.where(got > lower + 1e-12, shift, np.inf).min(-1)
    least = np.where(got < upper - 1e-12, shift, -np.inf).max(-1)
    assert (most >= least - 1e-9).all()
    np.testing.assert_allclose(project(got, lower, upper), got, atol=1e-14)
    np.testing.assert_array_equal(project(given[2, 3], lower, upper), got[2, 3])


def test_projection_by_hand_and_what_it_refuses():
    np.testing.assert_allclose(project([0.6, 0.6], 0, 1), [0.5, 0.5])
    np.testing.assert_array_equal(project([2.0, 0.0, 0.0], 0, 1), [1, 0, 0])
    np.testing.assert_allclose(project([2.0, 0.0, 0.0], 0, 0.6), [0.6, 0.2, 0.2])
    with pytest.raises(ValueError, match="must leave a mixture"):
        project([0.5, 0.5], 0.6, 1)
    with pytest.raises(ValueError, match="`p` must be finite"):
        project([0.5, np.nan], 0, 1)


def test_nearest_run_by_hand():
    runs = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.2, 0.6]])
    index, distance = nearest_run(np.array([0.6, 0.3, 0.1]), runs)
    assert (index, distance) == (1, pytest.approx(0.2))


def test_hull_distance_by_hand():
    # Two domains: the hull is an interval of the first share
    runs = np.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    assert hull_distance(np.array([0.9, 0.1]), runs) == pytest.approx(0.3)
    assert hull_distance(np.array([0.4, 0.6]), runs) == pytest.approx(0, abs=1e-9)
    # Three: from a vertex to the segment between the others, every point is 1 away
    segment = np.array([[0, 1, 0], [0, 0, 1.0]])
    assert hull_distance(np.array([1, 0, 0.0]), segment) == pytest.approx(1)
    assert hull_distance(np.array([0.3, 0.5, 0.2]), segment) == pytest.approx(0.3)
    triangle = np.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    assert hull_distance(np.full(3, 1 / 3), triangle) == pytest.approx(0, abs=1e-9)
    assert hull_distance(np.array([0.1, 0.45, 0.45]), triangle) == pytest.approx(0.1)
    assert hull_distance(triangle[1], triangle[:1]) == pytest.approx(0.4)


def test_hull_distance_of_many_runs_is_at_most_that_to_the_nearest():
    rng = np.random.default_rng(0)
    runs = rng.dirichlet(np.full(40, 0.3), 1000)
    inside = rng.dirichlet(np.ones(1000)) @ runs
    assert hull_distance(inside, runs) < 1e-8
    for p in rng.dirichlet(np.full(40, 0.3), 2):
        assert 0 < hull_distance(p, runs) < nearest_run(p, runs)[1]
    with pytest.raises(ValueError):
        hull_distance(np.full(40, np.nan), runs)


def test_spacing_is_over_distinct_runs():
    runs = np.array([[1, 0], [1, 0], [0.9, 0.1], [0.5, 0.5], [0, 1]])
    # Distances to the nearest other: 0.1, 0.1, 0.4, 0.5; the repeated run counts once
    assert typical_spacing(runs) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="two that differ"):
        typical_spacing(runs[:2])


def test_sameness_does_not_hang_on_rounding():
    """Shares on both sides of where a rounding to 9 decimals would part them."""
    X = np.array([[0.1 + 4.9e-10, 0.9 - 4.9e-10], [0.1 + 5.1e-10, 0.9 - 5.1e-10], [0.5, 0.5]])
    a, b, c = same_mixture(X)
    assert a == b != c


def clusters(X):
    """Shares within 1e-9 of each other, numbered as they come."""
    return DBSCAN(eps=1e-9, min_samples=1, metric="chebyshev").fit_predict(X)


def test_the_same_mixture_has_one_number():
    rng = np.random.default_rng(0)
    X = np.repeat(rng.dirichlet(np.ones(4), 60).round(3), 3, 0) + 1e-4
    X = X / X.sum(1, keepdims=True) * (1 + 1e-15 * rng.integers(-3, 4, (180, 1)))
    found = same_mixture(X)
    runs, domains = rng.permutation(180), rng.permutation(4)
    permuted = np.empty_like(found)
    permuted[runs] = same_mixture(X[np.ix_(runs, domains)])
    for other in (clusters(X), permuted):
        pairs = set(zip(found.tolist(), other.tolist(), strict=True))
        assert len(pairs) == found.max() + 1 == other.max() + 1


def test_mixtures_are_numbered_by_their_shares_whatever_the_order():
    """The folds of a judgement follow the numbers."""
    rng = np.random.default_rng(1)
    X = np.repeat(rng.dirichlet(np.ones(4), 60), 3, 0)
    columns = np.lexsort(np.sort(X, 0)[::-1])
    order = np.lexsort(X[:, columns].T[::-1])
    found = same_mixture(X)
    np.testing.assert_array_equal(found[order], clusters(X[order]))
    runs, domains = rng.permutation(180), rng.permutation(4)
    np.testing.assert_array_equal(same_mixture(X[np.ix_(runs, domains)]), found[runs])
