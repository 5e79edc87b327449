"""DoReMi against numbers worked out by hand; see test_controllers.py for runs."""

import math

import numpy as np

from llmmix.mixing.doremi import DoReMi, DoReMiConfig
from llmmix.mixing.weights import stratified
from tests.mixing.test_controllers import ABC, observation, shares


def test_doremi_by_hand():
    config = DoReMiConfig(eta=2, smoothing=0.1)
    doremi = DoReMi(config, ["a", "b"], [], [0.5, 0.5])
    np.testing.assert_array_equal(doremi.average, [0.5, 0.5])
    doremi.observe(observation(excess=(math.log(3) / 2, 0)))
    first = np.array([0.9 * 0.75 + 0.05, 0.9 * 0.25 + 0.05])
    np.testing.assert_allclose(doremi.weights, first)
    np.testing.assert_allclose(doremi.average, first)
    # b is absent and keeps lambda 0; a has no excess left
    doremi.observe(observation(excess=(0, math.nan)))
    second = 0.9 * first + 0.05
    np.testing.assert_allclose(doremi.weights, second)
    np.testing.assert_allclose(doremi.average, (first + second) / 2)
    assert doremi.record() == {"average": doremi.average.tolist(), "skipped": 0}


def test_doremi_keeps_the_last_lambda_of_an_absent_domain():
    doremi = DoReMi(DoReMiConfig(smoothing=0), ["a", "b"], [], [0.5, 0.5])
    doremi.observe(observation(excess=(math.log(2), 0)))
    doremi.observe(observation(excess=(math.nan, 0)))
    np.testing.assert_allclose(doremi.weights, [0.8, 0.2])
    doremi.observe(observation(excess=(math.nan, math.nan)))
    np.testing.assert_allclose(doremi.weights, [0.8, 0.2])
    assert doremi.skipped == 1
    doremi.observe(observation(excess=(math.inf, math.log(4))))
    np.testing.assert_allclose(doremi.weights, shares(4 * 2, 4))
    assert doremi.skipped == 2


def test_no_excess_leaves_the_even_weights():
    doremi = DoReMi(DoReMiConfig(), ABC, [], stratified(3))
    for _ in range(50):
        doremi.observe(observation(excess=(0, 0, 0)))
    np.testing.assert_allclose(doremi.weights, stratified(3), atol=1e-14)


def test_smoothing_is_a_floor():
    doremi = DoReMi(DoReMiConfig(smoothing=0.03), ABC, [], [1, 0, 0])
    for _ in range(2000):
        doremi.observe(observation(excess=(5, 0, 0)))
    np.testing.assert_allclose(doremi.weights, [0.98, 0.01, 0.01], atol=1e-3)
