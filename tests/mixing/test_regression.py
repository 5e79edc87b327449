"""The influence matrix by least squares with forgetting, and how far its estimate is trusted."""

import json
import math

import numpy as np
import pytest

from llmmix.mixing.aioli import AioliConfig, RegressionAioli
from llmmix.mixing.controllers import Observation
from llmmix.mixing.regression import InfluenceRegression, advantage

# Loss a step: rows targets, columns domains
A = np.array([[0.30, 0.05, 0.00], [0.02, 0.10, 0.04], [0.04, -0.02, 0.20]])
OWN = np.arange(3)


def fed(
    matrix, own=OWN, count=100, noise=0.0, seed=0, memory=math.inf, transfer=1e3, into=None, step=0
):
    """A regression that has seen segments of ten steps on mixtures all over the simplex."""
    random, (n, m) = np.random.default_rng(seed), np.shape(matrix)
    regression = into or InfluenceRegression(own, m, memory, transfer)
    for _ in range(count):
        shares, steps = random.dirichlet(np.ones(m)), 10
        step += steps
        drops = matrix @ shares * steps + noise * random.standard_normal(n)
        regression.update(shares, steps, drops, step)
    return regression


# The matrix


@pytest.mark.parametrize(
    ("matrix", "own", "count", "error"),
    [
        (A, OWN, 1000, 1e-6),
        (A[[2, 0, 1]], [2, 0, 1], 1000, 1e-6),
        (A.T, OWN, 1000, 1e-6),
        (A[:, :2], [0, 1, -1], 4000, 2e-6),
        # Alone, a target without a domain: its prior is narrower, and its noise overrated
        (A[:1], [-1], 4000, 5e-4),
        (A[1:], [1, 2], 1000, 1e-6),
    ],
)
def test_what_is_drawn_without_error_is_found(matrix, own, count, error):
    mean, _ = fed(matrix, own, count).estimate()
    np.testing.assert_allclose(mean, matrix, atol=error)


def test_a_prior_that_is_wide_open_is_least_squares():
    matrix, noise = A, 0.05
    random = np.random.default_rng(4)
    regression = InfluenceRegression(OWN, 3, math.inf, 1e6)
    x, y = random.dirichlet(np.ones(3), 200) * 10, noise * random.standard_normal((200, 3))
    y += x @ matrix.T
    for shares, drops in zip(x / 10, y, strict=True):
        regression.update(shares, 10, drops, 10)
    found, *_ = np.linalg.lstsq(x, y, rcond=None)
    np.testing.assert_allclose(regression.estimate()[0], found.T, atol=1e-4)


def test_sums_by_hand():
    regression = InfluenceRegression([0, 1], 2, 0.75, 0.1)
    regression.update(np.array([0.5, 0.5]), 4, np.array([1.0, 2.0]), 30)
    # Ten steps, a third of three quarters of the forty so far
    regression.update(np.array([1.0, 0.0]), 10, np.array([3.0, -1.0]), 40)
    kept = 0.5 ** (1 / 3)
    np.testing.assert_allclose(regression.xx, [[4 * kept + 100, 4 * kept], [4 * kept, 4 * kept]])
    np.testing.assert_allclose(
        regression.xy, [[2 * kept + 30, 4 * kept - 10], [2 * kept, 4 * kept]]
    )
    np.testing.assert_allclose(regression.yy, [kept + 9, 4 * kept + 1])
    assert regression.count == pytest.approx(kept + 1)


def test_a_matrix_that_changes_is_followed():
    later = A[[1, 2, 0]]
    followed = fed(A, memory=0.1)
    kept = fed(A)
    np.testing.assert_allclose(followed.estimate()[0], A, atol=1e-4)
    distance = np.abs(later - A).max()
    for regression in (followed, kept):
        fed(later, count=100, seed=1, into=regression, step=1000)  # twice as many steps
    assert np.abs(followed.estimate()[0] - later).max() < 0.02 * distance
    assert np.abs(kept.estimate()[0] - later).max() > 0.3 * distance
    assert np.abs(kept.estimate()[0] - (A + later) / 2).max() < 0.2 * distance


def test_a_segment_counts_half_after_a_share_of_the_steps():
    regression = fed(A, count=1)
    before, regression.memory = regression.xx.copy(), 0.3
    for step, updates, left in [(100, 3, 1 / 2), (200, 6, 1 / 4), (400, 12, 1 / 8)]:
        for _ in range(updates):
            regression.update(np.zeros(3), 10, np.zeros(3), step)
        np.testing.assert_allclose(regression.xx, left * before)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_error_shrinks_as_more_is_seen(noise):
    errors = []
    for count in (5, 20, 80, 320, 1280):
        _, covariance = fed(A, count=count, noise=noise).estimate()
        np.testing.assert_allclose(covariance, covariance.transpose(0, 2, 1))
        assert np.linalg.eigvalsh(covariance).min() > 0
        errors.append(np.trace(covariance, axis1=1, axis2=2))
    assert (np.diff(errors, axis=0) < 0).all()
    assert (errors[-1] < errors[1] / 30).all()  # 64 times as many segments


def test_the_error_is_what_it_says():
    """With errors of measurement that dwarf the mixture's own effect: no wider, and no narrower."""
    scores = []
    for seed in range(60):
        mean, covariance = fed(A, count=60, noise=1.0, seed=seed).estimate()
        scores.append((mean - A) ** 2 / np.diagonal(covariance, axis1=1, axis2=2))
    assert 0.7 < np.mean(scores) < 1.3
    # And never too narrow
    for noise in (0.0, 0.01, 0.1):
        scores = []
        for seed in range(20):
            mean, covariance = fed(A, count=60, noise=noise, seed=seed).estimate()
            scores.append((mean - A) ** 2 / np.diagonal(covariance, axis1=1, axis2=2))
        assert np.mean(scores) < 1.3


def test_without_variety_the_prior_decides():
    """All on one mixture: a target's drop is put down to its own domain."""
    regression = InfluenceRegression(OWN, 3, math.inf, 0.1)
    for _ in range(50):
        regression.update(np.full(3, 1 / 3), 10, np.array([1.0, 0.5, 0.0]), 10)
    mean, _ = regression.estimate()
    own = mean.diagonal()
    np.testing.assert_allclose(own, [0.3, 0.15, 0.0], atol=0.02)
    assert np.abs(mean - np.diag(own)).max() < 0.005
    # A target without a domain: to all alike
    other = InfluenceRegression([-1], 3, math.inf, 0.1)
    random = np.random.default_rng(0)
    for _ in range(50):
        other.update(np.full(3, 1 / 3), 10, 1 + 0.01 * random.standard_normal(1), 10)
    mean, _ = other.estimate()
    np.testing.assert_allclose(mean, 0.1, rtol=0.01)


def test_transfer_is_how_much_others_may_help():
    found = {}
    for transfer in (1e-6, 0.1, 10.0):
        regression = fed(A, count=20, noise=0.2, transfer=transfer)
        mean, _ = regression.estimate()
        found[transfer] = np.abs(mean - np.diag(mean.diagonal())).sum()
    assert found[1e-6] < 1e-6 < found[0.1] < found[10.0]


@pytest.mark.parametrize("own", [OWN, [-1, -1, -1]])
def test_before_anything_is_seen(own):
    regression = InfluenceRegression(own, 3, 0.1, 0.1)
    mean, covariance = regression.estimate()
    np.testing.assert_array_equal(mean, np.zeros((3, 3)))
    assert np.isfinite(covariance).all()
    regression.update(
        np.array([1.0, 0, 0]), 10, np.zeros(3), 10
    )  # two domains have never been drawn
    mean, covariance = regression.estimate()
    np.testing.assert_array_equal(mean, np.zeros((3, 3)))
    assert np.isfinite(covariance).all()


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 1, 0]])
def test_permuted_domains_permute_the_matrix(order):
    random = np.random.default_rng(0)
    one, other = (InfluenceRegression(OWN, 3, 0.3, 0.3) for _ in range(2))
    targets = InfluenceRegression(np.array(order), 3, 0.3, 0.3)
    for step in range(10, 410, 10):
        shares = random.dirichlet(np.ones(3))
        drops = A @ shares * 10 + 0.1 * random.standard_normal(3)
        one.update(shares, 10, drops, step)
        other.update(shares[order], 10, drops[order], step)
        targets.update(shares, 10, drops[order], step)
    mean, covariance = one.estimate()
    found, error = other.estimate()
    np.testing.assert_allclose(found, mean[np.ix_(order, order)], rtol=1e-9)
    np.testing.assert_allclose(error, covariance[np.ix_(order, order, order)], rtol=1e-9)
    np.testing.assert_allclose(targets.estimate()[0], mean[order], rtol=1e-9)


@pytest.mark.parametrize("unit", [1e-3, 7.0])
def test_the_unit_of_the_loss_does_not_matter(unit):
    mean, covariance = fed(A, noise=0.1, transfer=0.1).estimate()
    scaled, error = fed(unit * A, noise=unit * 0.1, transfer=0.1).estimate()
    np.testing.assert_allclose(scaled, unit * mean, rtol=1e-7)
    np.testing.assert_allclose(error, unit**2 * covariance, rtol=1e-7)


def test_a_state_goes_on_where_it_was():
    whole = fed(A, noise=0.1, memory=0.2)
    other = InfluenceRegression(OWN, 3, 0.2, 1e3)
    state = whole.state_dict()
    other.load_state_dict(json.loads(json.dumps(state)))
    for regression in (whole, other):
        fed(A, count=5, seed=1, into=regression, step=1000)
    for one, another in zip(whole.estimate(), other.estimate(), strict=True):
        np.testing.assert_array_equal(one, another)
    assert state != whole.state_dict()  # no view


def test_what_is_given_is_not_changed():
    shares, drops = np.array([0.5, 0.5, 0.0]), np.array([1, 2, 3])
    regression = InfluenceRegression(OWN, 3, 0.5, 0.1)
    regression.update(shares, 10, drops, 10)
    regression.update(shares, 10, drops, 20)
    regression.estimate()
    assert shares.tolist() == [0.5, 0.5, 0.0] and drops.tolist() == [1, 2, 3]


# How far it is trusted

SURE, EVEN = np.zeros((2, 2)), np.array([0.5, 0.5])


def test_advantage_by_hand():
    # Domain a sheds 3 and b 1, the mixture 2: an excess of 1, half of the mixture's
    np.testing.assert_allclose(advantage(EVEN, np.array([3.0, 1.0]), SURE), [0.5, -0.5])
    # Its variance is .25 * 2 + .25 * 2 = 1: one standard error, of which half is believed
    np.testing.assert_allclose(advantage(EVEN, np.array([3.0, 1]), 2 * np.eye(2)), [0.25, -0.25])
    # What both share does not blur their difference
    np.testing.assert_allclose(
        advantage(EVEN, np.array([3.0, 1]), 9 * np.ones((2, 2))), [0.5, -0.5]
    )
    # Three quarters on a: the mixture sheds 2.5, more than the mean of 2
    found = advantage(np.array([0.75, 0.25]), np.array([3.0, 1.0]), SURE)
    np.testing.assert_allclose(found, [0.2, -0.6])
    # Where the mixture sheds next to nothing, the mean of the sizes is the measure
    np.testing.assert_allclose(advantage(EVEN, np.array([1.0, -1.0]), SURE), [1, -1])
    np.testing.assert_allclose(advantage(EVEN, np.array([-1.0, -3.0]), SURE), [0.5, -0.5])


def test_advantage_is_limited():
    gains = np.zeros(10)
    gains[3] = 1.0  # nine times the mixture's more than it
    even, sure = np.full(10, 0.1), np.zeros((10, 10))
    found = advantage(even, gains, sure)
    assert found[3] == 2 and found[0] == pytest.approx(-1)
    assert advantage(even, gains, sure, limit=0.5).tolist() == [-0.5] * 3 + [0.5] + [-0.5] * 6
    assert advantage(even, gains, sure, limit=20.0)[3] == pytest.approx(9)


def test_nothing_is_gained_where_all_help_alike():
    for gains in ([0.0, 0.0], [2.0, 2.0], [-1.0, -1.0]):
        for covariance in (SURE, np.eye(2)):
            np.testing.assert_allclose(advantage(EVEN, np.array(gains), covariance), 0, atol=1e-12)
    np.testing.assert_array_equal(advantage(np.ones(1), np.array([2.0]), np.ones((1, 1))), [0])


@pytest.mark.parametrize("seed", range(5))
def test_advantage_whatever_the_numbers(seed):
    random = np.random.default_rng(seed)
    m = int(random.integers(2, 7))
    weights, gains = random.dirichlet(np.ones(m)), random.standard_normal(m)
    root = random.standard_normal((m, m))
    covariance = root @ root.T
    found = advantage(weights, gains, covariance)
    excess = gains - weights @ gains
    assert (np.sign(found) == np.sign(excess)).all() and (np.abs(found) <= 2).all()
    for unit in (1e-6, 10.0, 1e6):
        same = advantage(weights, unit * gains, unit**2 * covariance)
        np.testing.assert_allclose(same, found, rtol=1e-9)
    order = random.permutation(m)
    permuted = advantage(weights[order], gains[order], covariance[np.ix_(order, order)])
    np.testing.assert_allclose(permuted, found[order], rtol=1e-9)
    # Less sure, less far: down to nothing
    sizes = [np.abs(advantage(weights, gains, s * covariance)) for s in (0, 0.1, 1, 10, 1e12)]
    assert (np.diff(sizes, axis=0) <= 1e-12).all() and sizes[-1].max() < 1e-6


# As a controller


def observed(controller, drops, count, seed=0):
    """Feed a controller segments whose losses fall by `drops` of (shares, steps)."""
    random, losses, step = np.random.default_rng(seed), np.full(3, 50.0), 0
    history = [controller.weights]
    for _ in range(count):
        for weights, steps, measure, _ in controller.plan(step, 4000):
            step += steps
            shares = random.multinomial(16 * steps, weights) / max(16 * steps, 1)
            losses = losses - drops(shares, steps)
            if measure:
                signal = {"losses": losses}
                controller.observe(Observation(step, steps, shares, 1.0, signal))
                history.append(controller.weights)
    return np.array(history)


def made(**options):
    config = AioliConfig(estimator="regression", first_step=0, **options)
    return RegressionAioli(config, list("abc"), list("abc"), np.full(3, 1 / 3))


def test_it_goes_where_most_is_to_be_had():
    matrix = np.diag([0.010, 0.005, 0.001])
    controller = made(min_share=0.3)
    history = observed(controller, lambda shares, steps: matrix @ shares * steps, 40)
    assert history[2].tolist() == [1 / 3] * 3  # one segment says nothing of its error
    np.testing.assert_allclose(controller.weights, [0.8, 0.1, 0.1], atol=0.02)
    assert (history >= 0.1 - 1e-12).all()
    np.testing.assert_allclose(controller.matrix, matrix, atol=3e-4)


def test_a_step_of_the_weights_is_bounded():
    for eta, bound in [(None, 0.5 * 4), (0.05, 0.05 * 4)]:
        controller = made(min_share=0.0, eta=eta)
        history = observed(controller, lambda s, n: np.array([5.0, 0.0, -1.0]) * s * n, 80)
        logs = np.log(history)
        moved = np.diff(logs - logs.mean(1, keepdims=True), axis=0)
        assert np.ptp(moved, axis=1).max() <= bound + 1e-9
        assert history[-1][0] > 0.8


def test_eta_none_moves_nothing():
    history = observed(made(eta=0.0), lambda s, n: np.array([5.0, 0.0, -1.0]) * s * n, 10)
    np.testing.assert_allclose(history, 1 / 3, atol=1e-12)
