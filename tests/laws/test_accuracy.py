import numpy as np
import pytest
from scipy.stats import norm, spearmanr
from sklearn.metrics import r2_score

from llmmix.laws.accuracy import bootstrap, coverage_of, r2, regret_of, spearman


def test_r2_is_out_of_sample():
    rng = np.random.default_rng(0)
    y, p = rng.normal(size=(2, 30))
    assert r2(observed=y, predicted=p, baseline=y.mean()) == pytest.approx(r2_score(y, p))
    assert r2(observed=y, predicted=y, baseline=0.3) == 1
    assert r2(observed=y, predicted=np.full(30, 0.3), baseline=0.3) == 0
    # 1 - (0.25 + 0) / (1 + 4); the runs with a NaN count in neither sum
    o, q = np.array([1, 2, np.nan, 9]), np.array([1.5, 2, 5, np.nan])
    assert r2(observed=o, predicted=q, baseline=0) == pytest.approx(0.95)
    base = np.array([0, 0, np.nan])
    assert r2(observed=[1, 2, 3], predicted=[1.5, 2, 9], baseline=base) == pytest.approx(0.95)
    assert np.isnan(r2(observed=np.ones(4), predicted=np.zeros(4), baseline=1))
    two = r2(observed=np.c_[y, y], predicted=np.c_[p, y], baseline=np.array([0.0, 1.0]))
    assert two.shape == (2,) and two[1] == 1
    with pytest.raises(TypeError):
        r2(y, p, 0)


@pytest.mark.parametrize("digits", [9, 1, 0])
def test_spearman_is_scipys_also_of_draws_and_ties(digits):
    rng = np.random.default_rng(1)
    x = rng.normal(size=40).round(digits)
    y = (x + rng.normal(size=40)).round(digits)
    counts = rng.multinomial(40, np.full(40, 1 / 40), 20)
    found = spearman(x, y, counts)
    for drawn, value in zip(counts, found, strict=True):
        rows = np.repeat(np.arange(40), drawn)
        assert value == pytest.approx(spearmanr(x[rows], y[rows]).statistic, abs=1e-12)
    y[:5] = np.nan
    assert spearman(x, y)[0] == pytest.approx(spearmanr(x[5:], y[5:]).statistic, abs=1e-12)


def test_spearman_of_nothing_is_nan():
    assert np.isnan(spearman(np.ones(5), np.arange(5.0))).all()
    assert np.isnan(spearman(np.array([1.0, 2, np.nan]), np.arange(3.0))).all()


def test_bootstrap_draws_mixtures_and_not_runs():
    """Ten seeds a mixture say no more than one: the interval is that of the mixtures."""
    y = np.random.default_rng(0).normal(size=50)

    def mean_of(values):
        return lambda counts: counts @ values / counts.sum(1)

    once = bootstrap(mean_of(y), np.arange(50))
    tenfold = bootstrap(mean_of(np.repeat(y, 10)), np.repeat(np.arange(50), 10))
    assert tenfold == pytest.approx(once)
    assert once.high - once.low == pytest.approx(2 * 1.96 * y.std() / np.sqrt(50), rel=0.1)
    assert np.isnan(bootstrap(mean_of(y), np.arange(50), 0).low)


def test_regret_counts_ties_as_chance():
    assert regret_of(np.array([3.0, 1, 2]), np.array([5.0, 9, 1])) == 1
    assert regret_of(np.array([3.0, 1, 2]), np.zeros(3)) == 1
    assert regret_of(np.array([np.nan, 1, 2]), np.array([0.0, 3, 2])) == 1


def test_coverage_is_of_the_central_interval():
    errors, stds = np.array([0.6, -0.6, 2.0, np.nan]), np.array([1.0, 0.8, 1.0, 1.0])
    assert norm.ppf(0.75) == pytest.approx(0.674, abs=1e-3)
    assert coverage_of(errors, stds, 0.5) == pytest.approx(1 / 3)
    assert coverage_of(errors, stds, 0.99) == 1
