"""DoGE against numbers worked out by hand; see test_controllers.py for runs."""

import math

import numpy as np
import pytest

from llmmix.mixing.doge import DoGE, DoGEConfig, doge_scores
from llmmix.mixing.weights import stratified
from tests.mixing.test_controllers import ABC, observation, shares


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


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
def test_doge_refuses_a_norm_that_clips_everything(norm):
    with pytest.raises(ValueError, match="`max_grad_norm` must be positive"):
        DoGEConfig(max_grad_norm=norm)


def test_doge_refuses_signals_of_other_shapes():
    doge = DoGE(DoGEConfig(), ABC, ABC, stratified(3))
    for products, norms in [(np.ones((2, 3)), np.ones(3)), (np.ones(3), np.ones(3))]:
        with pytest.raises(ValueError, match=r"signal\['products'\]"):
            doge.observe(observation(products=products, norms=norms))
    with pytest.raises(ValueError, match=r"signal\['norms'\]"):
        doge.observe(observation(products=np.ones((3, 3)), norms=np.ones(2)))
