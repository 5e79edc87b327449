"""What DoReMi and DoGE share, against numbers worked out by hand."""

import math

import numpy as np

from llmmix.mixing.doremi import DoReMi, DoReMiConfig
from llmmix.mixing.proxies import reweigh
from tests.mixing.test_controllers import observation


def test_reweigh_by_hand():
    logs = reweigh(np.log([0.5, 0.5]), np.log([3.0, 1.0]), smoothing=0.2)
    np.testing.assert_allclose(np.exp(logs), [0.8 * 0.75 + 0.1, 0.8 * 0.25 + 0.1])
    logs = reweigh(np.log([0.5, 0.5]), np.array([0.0, -2000.0]))
    np.testing.assert_allclose(logs, [0, -2000])  # no share to speak of, and still on its way


def test_an_average_is_over_steps():
    doremi = DoReMi(DoReMiConfig(smoothing=0, interval=3), ["a", "b"], [], [0.5, 0.5])
    doremi.observe(observation(steps=3, excess=(math.log(3), 0)))
    doremi.observe(observation(steps=1, excess=(0, math.log(3))))
    np.testing.assert_allclose(doremi.average, [(3 * 0.75 + 0.5) / 4, (3 * 0.25 + 0.5) / 4])
