import logging
import math
import zlib

import numpy as np
import pytest

from llmmix.unlearning.evaluation.membership import (
    log_prob_moments,
    membership_auc,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
    relative_auc_difference,
    zlib_score,
)

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def no_warnings():
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        yield


@pytest.mark.parametrize(("k", "score"), [(0.2, 3.0), (0.4, 2.5), (1, 1.108333), (0.01, 3.0)])
def test_min_k_vectors(k, score):
    assert min_k([-0.1, -2, -0.5, -3, -0.05, -1], k) == pytest.approx(score, abs=5e-7)


def test_min_k_edges():
    logps = -np.arange(1.0, 101)
    assert min_k(logps, 0.29) == pytest.approx(logps[-29:].mean() * -1)  # 0.29 * 100 < 29
    assert min_k(logps) == min_k(logps, 0.4)
    assert min_k([-1.5]) == 1.5 and min_k([]) is None
    assert math.isnan(min_k([-1.0, NAN, -2.0], 0.1)) and min_k([-INF, -1.0]) == INF
    for k in (0, -0.1, 1.5, NAN):
        with pytest.raises(ValueError, match=r"`k` must lie in \(0, 1\], got"):
            min_k([], k)
    with pytest.raises(ValueError, match="`token_logps` must hold log-probabilities, got 2.0"):
        min_k([-1.0, 2.0])


LOGITS = np.array([[2.0, 1, 0, -1], [0, 0, 0, 0], [5, 0, 0, 0], [1, 3, 2, 0]])

TARGETS = [1, 2, 0, 3]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("k", "score"), [(0.25, 3.174423), (0.5, 1.900911), (1, 0.914912)])
def test_min_k_plus_plus_vectors(k, score):
    logps = log_softmax(LOGITS)[range(4), TARGETS]
    mean, variance = log_prob_moments(LOGITS)
    assert min_k_plus_plus(logps, mean, variance, k) == pytest.approx(score, abs=5e-7)


def test_min_k_plus_plus_of_each_token():
    logps = log_softmax(LOGITS)[range(4), TARGETS]
    mean, variance = log_prob_moments(LOGITS)
    alone = [min_k_plus_plus(logps[[i]], mean[[i]], variance[[i]]) for i in range(4)]
    np.testing.assert_allclose(alone, [0.627399, 0, -0.142175, 3.174423], atol=5e-7)
    assert min_k_plus_plus([-1.0], [-1.01], [1e-9]) == pytest.approx(-10)  # 1e-6 is the least
    assert min_k_plus_plus([], [], []) is None
    assert math.isnan(min_k_plus_plus([-1.0, -1.0], [NAN, 0], [1, 1]))
    with pytest.raises(ValueError, match="must hold the same tokens, got 2, 1 and 2"):
        min_k_plus_plus([-1.0, -1], [0.0], [1, 1])
    with pytest.raises(ValueError, match="`k` must lie in"):
        min_k_plus_plus([-1.0], [0.0], [1.0], 0)


def test_moments_with_entries_that_cannot_occur():
    padded = np.concatenate([LOGITS, np.full((4, 3), -INF)], axis=1)
    for got, expected in zip(log_prob_moments(padded), log_prob_moments(LOGITS), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-15)
    log_p = log_softmax(LOGITS)
    p = np.exp(log_p)
    mean, variance = log_prob_moments(LOGITS + 1e4)  # shifts do not matter
    np.testing.assert_allclose(mean, (p * log_p).sum(1), rtol=1e-10)
    np.testing.assert_allclose(variance, (p * log_p**2).sum(1) - mean**2, atol=1e-10)
    sure = log_prob_moments(np.array([0.0, -INF]))
    assert sure == (0, 0) and all(moment.shape == () for moment in sure)
    assert log_prob_moments(LOGITS.reshape(2, 2, 4))[0].shape == (2, 2)
    assert np.isnan(log_prob_moments([-INF, -INF])).all()
    peaked = log_prob_moments([0.0, -800.0])  # exp(-800) is 0 and its logarithm is not
    assert peaked == (0, 0)


def test_zlib_score():
    text = "The author was born in Karachi in 1975."
    assert len(zlib.compress(text.encode())) == 44, "another zlib than the vector's"
    assert zlib_score(1.5, text) == pytest.approx(0.034091, abs=5e-7)
    assert zlib_score(1.6, "") == pytest.approx(0.2)  # 8 bytes of no text
    assert zlib_score(1, "é" * 50) == 1 / len(zlib.compress(("é" * 50).encode("utf-8")))
    assert math.isnan(zlib_score(NAN, text))


def test_membership_auc_vector_and_ties():
    got = membership_auc([0.2, 0.3, 0.5, 0.9], [0.4, 0.8, 1, 1.2])
    assert got.value == 0.8125 and (got.n_forget, got.n_holdout, got.reason) == (4, 4, None)
    assert got.interval[0] < 0.8125 < got.interval[1] <= 1
    assert membership_auc([1, 1, 1], [1, 1]).value == 0.5
    rng = np.random.default_rng(0)
    forget, holdout = rng.integers(0, 6, 37), rng.integers(1, 8, 23)
    pairs = np.sign(holdout[None] - forget[:, None]) / 2 + 0.5
    assert membership_auc(forget, holdout).value == pytest.approx(pairs.mean(), rel=1e-12)
    assert membership_auc(holdout, forget).value == pytest.approx(1 - pairs.mean(), rel=1e-12)


def test_membership_auc_without_a_result():
    for forget, holdout, reason in [
        ([], [1.0], "`forget_scores` has 0 values"),
        ([1.0], [], "`holdout_scores` has 0 values"),
        ([1.0, 2.0], [1.0, None, NAN], "2 of the 3 values of `holdout_scores` are not finite"),
    ]:
        got = membership_auc(forget, holdout)
        assert got.value is got.interval is None and got.reason.startswith(reason)
        assert (got.n_forget, got.n_holdout) == (len(forget), len(holdout))
    one = membership_auc([1.0], [0.5, 2.0])
    assert one.value == 0.5 and one.interval is None and "class of one" in one.reason
    with pytest.raises(ValueError, match="`resamples` must be at least 1, got 0"):
        membership_auc([1, 2], [1, 2], resamples=0)


def test_interval_of_classes_that_do_not_overlap_has_a_width():
    low, high = membership_auc(np.arange(20), np.arange(30) + 50).interval
    assert low == pytest.approx(0.025 ** (1 / 20)) and high == 1
    low, high = membership_auc(np.arange(30) + 50, np.arange(20)).interval
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_interval_is_that_of_resampled_classes():
    rng = np.random.default_rng(1)
    forget, holdout = np.round(rng.normal(0, 1, 60), 1), np.round(rng.normal(0.7, 1, 45), 1)
    got = membership_auc(forget, holdout, resamples=4000)
    wins = np.sign(holdout[None] - forget[:, None]) / 2 + 0.5
    drawn = [
        wins[np.ix_(rng.integers(0, 60, 60), rng.integers(0, 45, 45))].mean() for _ in range(4000)
    ]
    np.testing.assert_allclose(got.interval, np.quantile(drawn, [0.025, 0.975]), atol=0.008)
    assert got == membership_auc(forget, holdout, resamples=4000)
    assert got.interval != membership_auc(forget, holdout, resamples=4000, seed=1).interval


@pytest.mark.slow
def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 0.5 * math.erfc(-0.8 / 2)  # P(N(0.8, 1) > N(0, 1))
    hits = 0
    for trial in range(300):
        got = membership_auc(rng.normal(0, 1, 50), rng.normal(0.8, 1, 40), seed=trial,
                             resamples=300)  # fmt: skip
        hits += got.interval[0] <= truth <= got.interval[1]
    assert 0.90 < hits / 300 < 0.98


@pytest.mark.parametrize(
    ("auc", "reference", "leakage", "difference"),
    [
        (0.9, 0.5, -80.0, 80.0),
        (0.5, 0.45, -9.090909, 11.111111),
        (0.1, 0.45, 63.636364, -77.777778),
        (0.98, 1.0, NAN, -2.0),
        (0.5, 0.0, -50.0, NAN),
        (0.5, 0.5, 0.0, 0.0),
    ],
)
def test_leakage_vectors(auc, reference, leakage, difference, caplog):
    with caplog.at_level(logging.WARNING):
        got = privacy_leakage(auc, reference), relative_auc_difference(auc, reference)
    assert got == pytest.approx((leakage, difference), abs=5e-7, nan_ok=True)
    assert len(caplog.records) == sum(map(math.isnan, got))


def test_leakage_defaults_and_refusals():
    assert privacy_leakage(0.9) == pytest.approx(-80)
    assert relative_auc_difference(0.9) == pytest.approx(80)
    for function in (privacy_leakage, relative_auc_difference):
        for bad in (None, NAN, -0.1, 1.1):
            with pytest.raises(ValueError, match=r"`auc` must lie in \[0, 1\], got"):
                function(bad)
            with pytest.raises(ValueError, match=r"`reference_auc` must lie in \[0, 1\]"):
                function(0.5, bad)
