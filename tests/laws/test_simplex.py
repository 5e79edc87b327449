import numpy as np
import pytest

from llmmix.laws.simplex import bounds_of, hull_distance, nearest_run, project, typical_spacing


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


def test_bounds_by_number_array_and_name():
    lower, upper = bounds_of(3)
    np.testing.assert_array_equal([lower, upper], [[0] * 3, [1] * 3])
    lower, upper = bounds_of(3, lower=0.1, upper=[0.5, 0.6, 0.7])
    np.testing.assert_array_equal([lower, upper], [[0.1] * 3, [0.5, 0.6, 0.7]])
    lower, upper = bounds_of(3, lower={"b": 0.2}, upper={"c": 0.3}, names=["a", "b", "c"])
    np.testing.assert_array_equal([lower, upper], [[0, 0.2, 0], [1, 1, 0.3]])
    given = np.array([1, 1, 0])  # integers of the caller's
    bounds_of(3, upper=given)[1][:] = 7
    np.testing.assert_array_equal(given, [1, 1, 0])


def test_epochs_cap_shares():
    _, upper = bounds_of(
        3, upper=0.9, available=[100, 1000, np.inf], tokens=2000, max_epochs=4, names=list("abc")
    )
    np.testing.assert_allclose(upper, [0.2, 0.9, 0.9])
    _, upper = bounds_of(2, available={"a": 10}, tokens=100, max_epochs=1, names=["a", "b"])
    np.testing.assert_allclose(upper, [0.1, 1.0])


def test_a_run_too_long_is_refused_with_the_one_that_is_not():
    plan = {"available": [100.0, 300.0, 50.0], "upper": [1, 0.5, 1], "names": ["a", "b", "c"]}
    with pytest.raises(ValueError) as caught:
        bounds_of(3, tokens=1000, max_epochs=2, **plan)
    message = str(caught.value)
    assert "`max_epochs`" in message and "'a' <= 0.2" in message and "'c' <= 0.1" in message
    # b is held by its own bound: 0.5 + 2 * 150 / D = 1 at D = 600, or e = 1000 * .5 / 150
    assert "plan at most 599 tokens" in message or "plan at most 600 tokens" in message
    assert "3.3334 epochs" in message
    bounds_of(3, tokens=599, max_epochs=2, **plan)
    bounds_of(3, tokens=1000, max_epochs=3.3334, **plan)
    with pytest.raises(ValueError, match="plan at most"):
        bounds_of(3, tokens=601, max_epochs=2, **plan)
    with pytest.raises(ValueError, match="cannot fill a run; raise `upper`"):
        bounds_of(2, upper=[0.5, 1], available=[9e9, 0], tokens=10, max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": [0.5, 0.1, 0.1], "upper": 0.4}, "`lower` of domain 0 is 0.5, above its upper"),
        ({"lower": {"b": 0.5}, "upper": 0.4, "names": list("abc")}, "`lower` of 'b' is 0.5, above"),
        ({"lower": 0.4}, "`lower` must sum to at most 1, got 1.2"),
        ({"upper": 0.3}, "`upper` must sum to at least 1, got 0.9"),
        ({"lower": -0.1}, r"`lower` must lie in \[0, 1\], got \{0: -0.1"),
        ({"upper": [1, np.nan, 1]}, r"`upper` must lie in \[0, 1\], got \{1: nan\}"),
        ({"upper": 1.5}, r"`upper` must lie in \[0, 1\]"),
        ({"lower": [0.1, 0.1]}, r"`lower` must be one number or 3, got shape \(2,\)"),
        ({"upper": {"z": 1}, "names": list("abc")}, r"`upper` names \['z'\], which are not among"),
        ({"upper": {"a": 1}}, "`upper` is given by name: pass `names`"),
        ({"names": ["a", "b"]}, "`names` must be 3 different names"),
        ({"names": ["a", "b", "b"]}, "`names` must be 3 different names"),
        ({"tokens": 10}, "pass `available` and `max_epochs` too"),
        ({"available": 5, "tokens": 10}, "pass `max_epochs` too"),
        ({"available": -1, "tokens": 10, "max_epochs": 1}, r"`available` must lie in \[0, inf\]"),
        ({"available": 1, "tokens": 0, "max_epochs": 1}, "`tokens` must be positive and finite"),
        ({"available": 1, "tokens": 9, "max_epochs": np.nan}, "`max_epochs` must be positive"),
        (
            {"lower": 0.3, "available": [1, 99, 99], "tokens": 10, "max_epochs": 1},
            "domain 0 is 0.3, above its upper bound 0.1, the cap of 1 epochs",
        ),
    ],
)
def test_bad_bounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bounds_of(3, **arguments)


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
