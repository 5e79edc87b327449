"""ODM and EXP3 against numbers worked out by hand; see test_controllers.py for runs."""

import math

import numpy as np
import pytest

from llmmix.mixing.odm import ODM, ODMConfig, exploration, explore
from llmmix.mixing.weights import stratified
from tests.mixing.test_controllers import ABC, check_simplex, observation, shares


def test_exploration_by_hand():
    assert all(m * exploration(1, m) <= 1 for m in range(2, 2000))  # no share below zero
    assert exploration(1, 3) == 1 / 3
    assert exploration(100, 3) == pytest.approx(math.sqrt(math.log(3) / 300))
    np.testing.assert_allclose(explore(np.log([1, 3]), 0.2), [0.3, 0.7])
    np.testing.assert_array_equal(explore(np.array([1e308, -1e308]), 0.2), [0.9, 0.1])


def test_odm_by_hand():
    bandit = ODM(ODMConfig(decay=0.5), ["a", "b"], [], [0.25, 0.75])
    bandit.observe(observation(step=100, train=(1, 3)))
    rate = math.sqrt(math.log(2) / 200)
    # R = .5 (1/.25, 3/.75), and E_(t-1) = 1/2 at first: no arm is ahead
    np.testing.assert_allclose(bandit.scores, [2, 2])
    np.testing.assert_allclose(bandit.weights, [0.5, 0.5])
    assert bandit.rate == pytest.approx(rate)
    bandit.observe(observation(step=101, train=(4, math.nan)))
    # R_a = .5 * 2 + .5 * 4 / .5, and b was absent
    np.testing.assert_allclose(bandit.scores, [5, 2])
    now = math.sqrt(math.log(2) / 202)
    tilted = (1 - 2 * now) * shares(math.exp(5 * rate), math.exp(2 * rate)) + now
    np.testing.assert_allclose(bandit.weights, tilted)
    assert bandit.skipped == 0


def test_full_information_does_not_divide_by_the_weights():
    for config, targets, signal in [
        (ODMConfig(full_information=True), [], {"train": (1, 3)}),
        (ODMConfig(reward="losses"), ["b", "a"], {"losses": (3, 1)}),  # by name, not by place
    ]:
        bandit = ODM(config, ["a", "b"], targets, [0.25, 0.75])
        bandit.observe(observation(step=100, **signal))
        np.testing.assert_allclose(bandit.scores, [0.1, 0.3])


def test_exp3_by_hand():
    config = ODMConfig(update="exp3", eta=0.2, gamma=0.4)
    bandit = ODM(config, ["a", "b"], [], [0.25, 0.75])
    bandit.observe(observation(train=(1, 3)))
    # both arms are paid .2 / 2 * 4
    np.testing.assert_allclose(bandit.weights, [0.6 * 0.25 + 0.2, 0.6 * 0.75 + 0.2])
    bandit.observe(observation(train=(0.7, math.nan)))
    arms = shares(math.exp(0.1 * 0.7 / 0.35), 3)
    np.testing.assert_allclose(bandit.weights, 0.6 * arms + 0.2)


def test_rewards_divided_by_the_weights_settle_in_proportion_and_stay_finite():
    """The published plugin gives NaN after 946 of these updates."""
    for update in ("exp3", "odm"):
        config = ODMConfig(update=update, reward="losses", full_information=False)
        bandit = ODM(config, ABC, ABC, stratified(3))
        for step in range(1, 5001):
            bandit.observe(observation(step=step, losses=(3, 2.5, 2)))
            check_simplex(bandit.weights)
        assert np.isfinite(bandit.scores).all()
        if update == "exp3":
            np.testing.assert_allclose(bandit.weights, [0.4, 1 / 3, 4 / 15], atol=1e-3)


@pytest.mark.parametrize("update", ["odm", "exp3"])
def test_equal_rewards_keep_even_weights(update):
    for full in (False, True):
        config = ODMConfig(update=update, full_information=full)
        bandit = ODM(config, ABC, [], stratified(3))
        for step in range(1, 200):
            bandit.observe(observation(step=step, train=(2, 2, 2)))
        np.testing.assert_allclose(bandit.weights, stratified(3), atol=1e-12)


@pytest.mark.parametrize("update", ["odm", "exp3"])
def test_rewards_that_are_huge_or_none(update):
    config = ODMConfig(update=update, eta=10)
    bandit = ODM(config, ["a", "b", "c"], [], [0.5, 0.5, 0])
    bandit.observe(observation(step=10, train=(1, 2, 1)))  # c has no share to be divided by
    before = bandit.scores.copy()
    bandit.observe(observation(step=11, train=(math.inf, math.nan, math.nan)))
    np.testing.assert_array_equal(bandit.scores, before)
    assert bandit.skipped == 1
    for step in range(12, 500):
        bandit.observe(observation(step=step, train=(1e308, 1e300, 1)))
        check_simplex(bandit.weights)
    assert not np.isnan(bandit.scores).any()


def test_a_broken_validation_loss_is_counted_and_an_absent_domain_is_not():
    bandit = ODM(ODMConfig(reward="losses"), ABC, ABC, stratified(3))
    bandit.observe(observation(losses=(1, math.nan, 1)))
    assert bandit.record() == {"skipped": 1}
    np.testing.assert_allclose(bandit.scores, [0.1, 0, 0.1])
    bandit = ODM(ODMConfig(), ABC, [], stratified(3))
    bandit.observe(observation(train=(1, math.nan, 1)))
    assert bandit.skipped == 0
    bandit.observe(observation(train=(math.nan,) * 3))
    assert bandit.skipped == 1


def test_a_bandit_warms_up_on_the_first_weights():
    first = [0.2, 0.3, 0.5]
    bandit = ODM(ODMConfig(), ABC, [], first)
    assert [s[1:3] for s in bandit.plan(0, 400)] == [(4, "train")]
    assert [s[1:3] for s in bandit.plan(1, 400)] == [(3, "train")]
    assert [s[1:3] for s in bandit.plan(4, 400)] == [(1, "train")]
    assert [s[1:3] for s in bandit.plan(399, 400)] == [(1, None)]
    np.testing.assert_array_equal(bandit.plan(0, 400)[0].weights, first)
    bandit = ODM(ODMConfig(reward="losses"), ABC, ABC, first)
    assert [bandit.plan(step, 1000)[0].steps for step in (0, 10, 20, 25)] == [10, 10, 10, 5]
    bandit = ODM(ODMConfig(interval=7), ABC, [], first)
    assert [bandit.plan(step, 1000)[0].steps for step in (0, 10, 12, 17)] == [10, 7, 5, 7]


def test_exploration_revives_what_had_no_share():
    bandit = ODM(ODMConfig(full_information=True), ABC, [], [1, 0, 0])
    bandit.observe(observation(step=50, train=(2, math.nan, math.nan)))
    assert (bandit.weights > 0.05).all()
