"""Aioli's arithmetic against numbers worked out by hand."""

import math

import numpy as np
import pytest

from llmmix.mixing.influence import (
    InfluenceMatrix,
    normalize_matrix,
    probe_mixtures,
    solve_mixing_matrix,
    update_weights,
)


def test_probes_are_nearly_one_hot():
    np.testing.assert_allclose(probe_mixtures(2, 0.625), [[0.625, 0.375], [0.375, 0.625]])
    found = probe_mixtures(3, 0.5)
    np.testing.assert_allclose(found, [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    np.testing.assert_array_equal(probe_mixtures(4, 1), np.eye(4))
    np.testing.assert_array_equal(probe_mixtures(1, 1), [[1.0]])
    np.testing.assert_allclose(probe_mixtures(7, 0.75).sum(1), 1)


@pytest.mark.parametrize(
    ("count", "factor"),
    [(2, 0.5), (2, 0.52), (2, 0.3), (4, 0.25), (3, 0), (3, -0.5), (2, 1.01), (2, math.nan)],
)
def test_probes_that_tell_nothing_apart(count, factor):
    with pytest.raises(ValueError, match="`one_hot_factor` must lie above 1/"):
        probe_mixtures(count, factor)
    with pytest.raises(ValueError, match="`one_hot_factor`"):
        solve_mixing_matrix(np.ones((count, count)), factor)


def test_the_matrix_of_two_domains_by_hand():
    inverse = np.array([[2.5, -1.5], [-1.5, 2.5]])  # of the mixtures with f = .625
    np.testing.assert_allclose(solve_mixing_matrix(np.eye(2), 0.625), inverse, atol=1e-14)
    # Rows are targets: what a shed on the probes of a and b, then what b did
    gains = np.array([[0.5, 0.1], [0.2, 0.3]])
    matrix = solve_mixing_matrix(gains, 0.625)
    np.testing.assert_allclose(matrix, [[1.1, -0.5], [0.05, 0.45]], atol=1e-14)
    assert np.abs(matrix - solve_mixing_matrix(gains.T, 0.625).T).max() > 0.1
    np.testing.assert_array_equal(gains, [[0.5, 0.1], [0.2, 0.3]])


def test_targets_by_domains_and_not_the_other_way():
    matrix = np.array([[4.0, 0.0], [1.0, 2.0], [-1.0, 3.0]])  # 3 targets, 2 domains
    gains = matrix @ probe_mixtures(2, 0.75).T
    np.testing.assert_allclose(gains[1], [1.25, 1.75])  # 1 * .75 + 2 * .25, 1 * .25 + 2 * .75
    np.testing.assert_allclose(solve_mixing_matrix(gains, 0.75), matrix, atol=1e-12)
    wide = np.array([[4.0, 1.0, -1.0]])  # one target, three domains
    gains = wide @ probe_mixtures(3, 0.5)
    np.testing.assert_allclose(solve_mixing_matrix(gains, 0.5), wide, atol=1e-12)
    # Domain b has the column sum 5, a has 4
    moved = update_weights([0.5, 0.5], matrix, eta=1.0, normalize=False)
    np.testing.assert_allclose(moved, np.exp([4, 5]) / np.exp([4, 5]).sum())


def test_normalised_by_hand():
    np.testing.assert_allclose(normalize_matrix(np.array([[1, 3], [0, 4]])) * 8, [[1, 3], [0, 4]])
    given = np.array([[1.1, -0.5], [0.05, 0.45]])
    found = normalize_matrix(given)
    np.testing.assert_allclose(found, np.array([[1.6, 0], [0.55, 0.95]]) / 3.1)
    np.testing.assert_array_equal(given, [[1.1, -0.5], [0.05, 0.45]])
    np.testing.assert_allclose(normalize_matrix(3 * given), found)
    # The smallest entry is no longer the reference where nothing is negative
    assert normalize_matrix(np.array([[2.0, 1.0]])).min() > 0


@pytest.mark.parametrize("value", [0, 0.0, 0.2, -0.3, 7, -7])
@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (1, 4)])
def test_a_matrix_that_tells_nothing_apart(value, shape):
    matrix = np.full(shape, value)
    np.testing.assert_allclose(normalize_matrix(matrix), 1 / matrix.size)
    p = np.linspace(1, 2, shape[1]) / np.linspace(1, 2, shape[1]).sum()
    np.testing.assert_allclose(update_weights(p, matrix, eta=50.0), p, rtol=1e-12)


@pytest.mark.parametrize("value", [-0.1, -0.7])
def test_equal_losses_tell_nothing_apart_whatever_the_rounding(value):
    matrix = solve_mixing_matrix(np.full((3, 3), value), 0.75)
    np.testing.assert_allclose(normalize_matrix(matrix), 1 / 9, atol=1e-6)


def test_weights_by_hand():
    matrix = np.array([[0.3, 0.1], [0.2, 0.4]])  # of sum 1: normalising changes nothing
    for normalize in (True, False):
        moved = update_weights([0.5, 0.5], matrix, eta=2.0, normalize=normalize)
        np.testing.assert_allclose(moved, [0.5, 0.5])
        moved = update_weights([0.2, 0.8], matrix, eta=2.0, normalize=normalize)
        np.testing.assert_allclose(moved, [0.2, 0.8])
    # Only the first target counts: the log ratio moves by 2 * (.3 - .1)
    moved = update_weights([0.2, 0.8], matrix, eta=2.0, target_weights=[1, 0])
    assert math.log(moved[0] / moved[1]) == pytest.approx(math.log(0.25) + 0.4)
    # Columns [1.6 + .55, .95] / 3.1 once normalised, [1.15, -.05] as they are
    matrix = np.array([[1.1, -0.5], [0.05, 0.45]])
    moved = update_weights([0.5, 0.5], matrix, eta=0.2)
    assert math.log(moved[0] / moved[1]) == pytest.approx(0.2 * 1.2 / 3.1)
    moved = update_weights([0.5, 0.5], matrix, eta=0.2, normalize=False)
    assert math.log(moved[0] / moved[1]) == pytest.approx(0.2 * 1.2)


def test_whole_numbers_are_taken_and_nothing_is_changed_in_place():
    weights, matrix, u = np.array([1, 0]), np.array([[3, 1], [-2, 0]]), np.array([1, 2])
    kept = [x.copy() for x in (weights, matrix, u)]
    np.testing.assert_array_equal(update_weights(weights, matrix, eta=1, target_weights=u), [1, 0])
    np.testing.assert_allclose(normalize_matrix(matrix), [[5 / 10, 3 / 10], [0, 2 / 10]])
    solved = solve_mixing_matrix(matrix, 1)
    np.testing.assert_array_equal(solved, matrix)
    for now, before in zip((weights, matrix, u), kept, strict=True):
        np.testing.assert_array_equal(now, before)
        assert now.dtype == before.dtype
    solved[:] = 9
    np.testing.assert_array_equal(matrix, kept[1])


@pytest.mark.parametrize("eta", [1e5, 1e10, 1e300])
def test_a_huge_step_does_not_overflow(eta):
    with np.errstate(over="raise", invalid="raise"):
        moved = update_weights([0.5, 0.5], [[0.1, 0.2], [0.1, 0.2]], eta=eta)
        np.testing.assert_array_equal(moved, [0, 1])
        moved = update_weights([0.5, 0.5], [[-2.0, -3.0]], eta=eta, normalize=False)
        np.testing.assert_array_equal(moved, [1, 0])
        # What has no share gains none
        moved = update_weights([0.5, 0.5, 0.0], [[1.0, 2.0, 3.0]], eta=eta, normalize=False)
        np.testing.assert_array_equal(moved, [0, 1, 0])


def test_a_matrix_knows_its_axes():
    matrix = InfluenceMatrix(
        np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), tuple("xyz"), ("a", "b")
    )
    assert matrix.of("x", "b") == 2 and matrix.of("z", "a") == 5
    for shape in [(2, 3), (3, 3), (6,), (3, 2, 1)]:
        with pytest.raises(ValueError, match="`values` must be targets by domains, 3 x 2, got"):
            InfluenceMatrix(np.zeros(shape), tuple("xyz"), ("a", "b"))
    with pytest.raises(ValueError):
        matrix.of("a", "x")
