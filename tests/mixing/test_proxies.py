"""DoReMi and DoGE against numbers worked out by hand; see test_online.py for runs."""

import math

import numpy as np
import pytest

from llmmix.mixing.online import stratified
from llmmix.mixing.proxies import DoGE, DoGEConfig, DoReMi, DoReMiConfig, doge_scores, reweigh
from tests.mixing.test_online import ABC, observation, shares

# DoReMi


def test_reweigh_by_hand():
    logs = reweigh(np.log([0.5, 0.5]), np.log([3.0, 1.0]), smoothing=0.2)
    np.testing.assert_allclose(np.exp(logs), [0.8 * 0.75 + 0.1, 0.8 * 0.25 + 0.1])
    logs = reweigh(np.log([0.5, 0.5]), np.array([0.0, -2000.0]))
    np.testing.assert_allclose(logs, [0, -2000])  # no share to speak of, and still on its way


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


def test_an_average_is_over_steps():
    doremi = DoReMi(DoReMiConfig(smoothing=0, interval=3), ["a", "b"], [], [0.5, 0.5])
    doremi.observe(observation(steps=3, excess=(math.log(3), 0)))
    doremi.observe(observation(steps=1, excess=(0, math.log(3))))
    np.testing.assert_allclose(doremi.average, [(3 * 0.75 + 0.5) / 4, (3 * 0.25 + 0.5) / 4])


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


# DoGE


def test_doge_by_hand():
    products, norms = np.array([[1.0, 2.0], [-3.0, 1.0]]), np.array([2.0, 4.0])
    np.testing.assert_allclose(doge_scores(products, norms, 0.1), [0.1, 0], rtol=1e-6)
    bounded = doge_scores(products * 100, norms, 0.1, dw_min=-1)
    np.testing.assert_allclose(bounded, [0.5, -0.1])
    doge = DoGE(DoGEConfig(mu=0.1, max_grad_norm=5.0), ["a", "b"], ["x", "y"], [0.5, 0.5])
    # Four steps at a rate of 0.1 on average
    doge.observe(observation(steps=4, learning_rate=0.4, products=products, norms=norms))
    np.testing.assert_allclose(doge.weights, shares(math.e, 1), rtol=1e-6)
    np.testing.assert_allclose(doge.average, doge.weights)
    doge.observe(observation(steps=4, learning_rate=0.4, products=products[::-1], norms=norms))
    np.testing.assert_allclose(doge.weights, [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(doge.average, (shares(math.e, 1) + 0.5) / 2, rtol=1e-6)


def test_doge_clips_each_gradient():
    """As if they had been: <2u, 4v> of clipped norms 1 and 1 is <u, v>."""
    clipped, plain = (
        DoGE(DoGEConfig(mu=0.1, max_grad_norm=norm), ["a", "b"], [], [0.5, 0.5])
        for norm in (1.0, 100.0)
    )
    long = {"products": np.array([[4.0, 2.0], [2.0, 16.0]]), "norms": np.array([2.0, 4.0])}
    unit = {"products": np.array([[1.0, 0.25], [0.25, 1.0]]), "norms": np.array([1.0, 1.0])}
    clipped.observe(observation(steps=1, learning_rate=0.1, **long))
    plain.observe(observation(steps=1, learning_rate=0.1, **unit))
    np.testing.assert_allclose(clipped.weights, plain.weights, rtol=1e-12)
    assert clipped.weights[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("products", "norms", "rate", "skipped"),
    [
        ([[0, 0], [0, 0]], [0, 0], 1, 0),
        ([[1, math.nan], [0, 0]], [1, 1], 1, 1),
        ([[1, 0], [0, 0]], [math.inf, 1], 1, 1),
        ([[1, 0], [0, 0]], [1, 1], math.nan, 1),
    ],
)
def test_doge_keeps_its_weights(products, norms, rate, skipped):
    doge = DoGE(DoGEConfig(smoothing=0.1), ["a", "b"], ["a", "b"], [0.3, 0.7])
    doge.observe(observation(learning_rate=rate, products=products, norms=norms))
    assert doge.weights.tolist() == doge.average.tolist() == [0.3, 0.7]
    assert doge.record()["skipped"] == skipped


def test_doge_refuses_signals_of_other_shapes():
    doge = DoGE(DoGEConfig(), ABC, ABC, stratified(3))
    for products, norms in [(np.ones((2, 3)), np.ones(3)), (np.ones(3), np.ones(3))]:
        with pytest.raises(ValueError, match=r"signal\['products'\]"):
            doge.observe(observation(products=products, norms=norms))
    with pytest.raises(ValueError, match=r"signal\['norms'\]"):
        doge.observe(observation(products=np.ones((3, 3)), norms=np.ones(2)))
