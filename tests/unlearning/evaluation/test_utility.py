import math

import numpy as np
import pytest

from llmmix.unlearning.evaluation.utility import model_utility

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def no_warnings():
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        yield


def test_model_utility():
    values = [0.9, 0.8, 0.4, 0.5, 0.9, 0.6, 0.45, 0.85, 0.55]
    got = model_utility(values)
    assert got.value == pytest.approx(0.605825, abs=5e-7)
    assert got.collapsed == () and got.least == "2" and list(got.components.values()) == values
    got = model_utility({"retain": 0.9, "rouge": 0.0, "facts": 0.005, "edge": 0.01})
    assert got.value == 0 and got.collapsed == ("rouge", "facts") and got.least == "rouge"
    assert model_utility(np.array([0.25])).value == 0.25
    assert model_utility([1e-320, 1]).value == 0  # 1/x overflows


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({}, "`components` must hold at least one value"),
        ([], "`components` must hold at least one value"),
        ({"a": 0.5, "b": NAN}, "Component `b` must be a number of at least 0, got nan"),
        ({"a": 0.5, "b": -0.1}, "Component `b` must be .* got -0.1"),
        ({"a": None}, "Component `a` must be .* got None"),
        ([0.5, INF], "Component `1` must be .* got inf"),
    ],
)
def test_model_utility_refusals(components, message):
    with pytest.raises(ValueError, match=message):
        model_utility(components)
