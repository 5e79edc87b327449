import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from llmmix.grading.estimators import bootstrap_interval, maj_at_n, paired_difference, pass_at_n

VECTORS = [
    (20, 3, 5, 0.6008771929824561),
    (1024, 1, 256, 0.25),
    (1024, 16, 64, 0.6467259827267744),
    (4096, 1, 4096, 1.0),
    (64, 0, 16, 0.0),
    (10, 10, 3, 1.0),
    (4096, 7, 256, 0.36371698275212794),
    (1024, 40, 64, 0.9281886834862474),
]


@pytest.mark.parametrize(("samples", "correct", "n", "expected"), VECTORS)
def test_vectors_and_not_the_plug_in(samples, correct, n, expected):
    got = pass_at_n(samples, correct, n)
    assert isinstance(got, float) and got == pytest.approx(expected, rel=1e-12)
    assert math.copysign(1, got) == 1  # no -0.0
    plug_in = 1 - (1 - correct / samples) ** n
    assert got == plug_in or abs(got - plug_in) > 1e-4


def test_arrays():
    samples, correct, n, expected = map(np.array, zip(*VECTORS, strict=True))
    np.testing.assert_allclose(pass_at_n(samples, correct, n), expected, rtol=1e-12)
    assert pass_at_n(64, [0, 1, 64], 1) == pytest.approx([0, 1 / 64, 1])
    assert pass_at_n(64, [[0], [3]], [1, 64]).shape == (2, 2)
    assert pass_at_n([], [], 1).shape == (0,)


@pytest.mark.parametrize(
    ("c", "n"), [(1, 10**6), (1234, 5000), (5, 500_000), (999_000, 900), (700_000, 1), (400_000, 3)]
)
def test_a_million_samples(c, n):
    m = 10**6
    few, many = sorted((c, n))  # C(n-c, N) / C(n, N) is symmetric in c and N
    if m - c < n:
        expected = 1.0
    elif few < 50:
        miss = math.prod(Fraction(m - many - i, m - i) for i in range(few))
        expected = float(1 - miss)
    else:
        log_miss = math.fsum(math.log1p(-many / i) for i in range(m - few + 1, m + 1))
        expected = -math.expm1(log_miss)
    assert pass_at_n(m, c, n) == pytest.approx(expected, rel=1e-12)


def test_estimate_is_the_mean_over_subsets():
    for c in range(7):
        right = [i < c for i in range(6)]
        for n in range(1, 7):
            truth = np.mean([any(drawn) for drawn in combinations(right, n)])
            assert pass_at_n(6, c, n) == pytest.approx(truth)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((10, 1, 11), "`n` must lie between 1 and the 10 samples"),
        ((10, 1, 0), "`n` must lie"),
        ((10, 11, 1), "`n_correct` must lie"),
        ((10, -1, 1), "`n_correct` must lie"),
        ((10, 0.5, 1), "`n_correct` must hold whole numbers"),
        ((10, float("nan"), 1), "`n_correct` must hold whole numbers"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        pass_at_n(*given)


def test_majority_vote_is_the_mean_over_subsets():
    answers = ["right"] * 3 + ["a"] * 2 + ["b"] * 2 + [None]

    def share(drawn):
        votes = [a for a in drawn if a is not None]
        counts = {a: votes.count(a) for a in votes}
        top = [a for a in counts if counts[a] == max(counts.values())]
        return ("right" in top) / max(1, len(top))

    for n in (1, 2, 3, 5, 8):
        truth = np.mean([share(drawn) for drawn in combinations(answers, n)])
        got = maj_at_n([2, 2], 3, n, n_silent=1, resamples=40_000)
        assert got == pytest.approx(truth, abs=0.01)
    assert maj_at_n([], 0, 2, n_silent=2) == 0 and maj_at_n([], 2, 2) == 1
    with pytest.raises(ValueError, match="`n` must lie between 1 and the 8 samples"):
        maj_at_n([2, 2], 3, 9, n_silent=1)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.beta(1, 3, size=60), resamples=500, seed=trial)
        hits += low <= 0.25 <= high
    assert 0.90 < hits / 300 < 0.98


def test_interval_of_several_quantities_and_its_edges():
    values = np.random.default_rng(0).random((40, 3))
    low, high = bootstrap_interval(values)
    assert low.shape == (3,) and (low < values.mean(0)).all() and (values.mean(0) < high).all()
    again = bootstrap_interval(values[:, 1])
    assert (low[1], high[1]) == again  # one seed, whatever stands beside it
    none, some = bootstrap_interval(np.zeros(20))
    assert none == 0 and some == pytest.approx(1 - 0.025 ** (1 / 20))
    some, all_ = bootstrap_interval(np.ones(20))
    assert all_ == 1 and some == pytest.approx(0.025 ** (1 / 20))
    assert all(math.isnan(bound) for bound in bootstrap_interval([0.5]))
    low, high = bootstrap_interval([0.5] * 3)
    assert low == pytest.approx(0.5 * 0.025 ** (1 / 3)) and low + high == pytest.approx(1)
    assert bootstrap_interval([2.0] * 3) == (2, 2)  # not bounded: nothing is known
    low, high = bootstrap_interval([[1, math.nan], [2, 3], [3, 4]])
    assert low[0] < 2 < high[0] and math.isnan(low[1]) and math.isnan(high[1])


def test_intervals_shrink_by_no_step_where_all_problems_are_solved():
    """pass@4 of nearly 1 is no surer than pass@64 of exactly 1, over the same problems."""
    values = pass_at_n(64, np.array([60, 50, 64, 63] * 4)[:, None], [4, 64])
    assert (values[:, 0] < 1).any() and (values[:, 1] == 1).all()
    low, high = bootstrap_interval(values)
    assert low[0] <= low[1] == pytest.approx(0.025 ** (1 / 16)) and low[0] > 0.79
    mirrored = bootstrap_interval(1 - values)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-9)


def test_paired_interval_is_narrower_than_its_parts():
    rng = np.random.default_rng(0)
    hard = rng.random(50)
    a, b = (np.clip(hard + shift + 0.02 * rng.random(50), 0, 1) for shift in (0.0, 0.03))
    mean, low, high = paired_difference(b[:, None], a[:, None])
    assert 0 < low < mean < high and mean == pytest.approx((b - a).mean())
    single = bootstrap_interval(a)
    assert high - low < (single[1] - single[0]) / 3
    with pytest.raises(ValueError, match="the same problems"):
        paired_difference(a, b[:-1])
