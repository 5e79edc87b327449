"""Mixtures that stay, and the floor under one."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from llmmix.mixing.weights import proportional, stratified, with_floor


def test_stratified_and_proportional():
    np.testing.assert_array_equal(stratified(4), [0.25] * 4)
    np.testing.assert_allclose(proportional([1, 3]), [0.25, 0.75])
    np.testing.assert_allclose(proportional([1, 4], alpha=0.5), [1 / 3, 2 / 3])
    np.testing.assert_allclose(proportional([1, 0, 9], alpha=0), [0.5, 0, 0.5])
    np.testing.assert_allclose(proportional([1e300, 1e300], alpha=3), [0.5, 0.5])


@pytest.mark.parametrize(
    ("sizes", "alpha", "match"),
    [
        ([1, -1], 1, "sizes"),
        ([0, 0], 1, "sizes"),
        ([1, math.nan], 1, "sizes"),
        ([1, 2], -1, "alpha"),
        ([1, 2], math.nan, "alpha"),
    ],
)
def test_sizes_that_are_none(sizes, alpha, match):
    with pytest.raises(ValueError, match=f"`{match}`"):
        proportional(sizes, alpha)


def test_no_domain_at_all():
    with pytest.raises(ValueError, match="`m` must be at least 1"):
        stratified(0)


def test_a_floor_by_hand():
    np.testing.assert_allclose(with_floor(np.array([0.6, 0.3, 0.1]), 0.05), [0.6, 0.3, 0.1])
    np.testing.assert_allclose(with_floor(np.array([0.6, 0.4, 0.0]), 0.1), [0.54, 0.36, 0.1])
    # Lifting c takes b below the floor too: clipping once would leave it there
    np.testing.assert_allclose(with_floor(np.array([0.89, 0.11, 0.0]), 0.1), [0.8, 0.1, 0.1])
    np.testing.assert_allclose(with_floor(np.array([1.0, 0, 0, 0]), 0.25), [0.25] * 4)
    np.testing.assert_allclose(with_floor(np.array([1.0, 0]), np.array([0, 0.3])), [0.7, 0.3])
    np.testing.assert_array_equal(with_floor(np.array([1.0, 0, 0]), 0.0), [1, 0, 0])
    given = np.array([0.98, 0.01, 0.01])
    with_floor(given, 0.1)
    np.testing.assert_array_equal(given, [0.98, 0.01, 0.01])


@pytest.mark.parametrize("seed", range(20))
def test_a_floor_is_the_nearest_point(seed):
    random = np.random.default_rng(seed)
    m = int(random.integers(2, 7))
    w = random.dirichlet(np.full(m, 0.5)).clip(1e-4)
    w = w / w.sum()
    floor = random.uniform(0, 1 / m, m) if seed % 2 else np.full(m, random.uniform(0, 1 / m))
    found = with_floor(w, floor)
    assert found.sum() == pytest.approx(1, abs=1e-12) and (found >= floor - 1e-12).all()
    for divergence in (
        lambda q: np.sum(q * np.log(q / w)),  # KL(q || w); the other way round it is the same
        lambda q: np.sum(w * np.log(w / q)),
    ):
        start = floor + (1 - floor.sum()) / m
        nearest = minimize(
            divergence,
            start,
            method="SLSQP",
            bounds=[(low, 1) for low in np.maximum(floor, 1e-9)],
            constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert divergence(found.clip(1e-9)) <= nearest.fun + 1e-9
        np.testing.assert_allclose(found, nearest.x, atol=2e-4)
