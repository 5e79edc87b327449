import logging
import math
import zlib

import numpy as np
import pytest
from scipy.stats import ks_2samp

from llmmix.unlearning.evaluation.metrics import (
    TRUTH_RATIOS,
    exact_memorization,
    extraction_strength,
    forget_quality,
    log_prob_moments,
    mean_of,
    membership_auc,
    min_k,
    min_k_plus_plus,
    model_utility,
    option_probability,
    privacy_leakage,
    relative_auc_difference,
    truth_ratio,
    zlib_score,
)

CORRECT = [0.5, 2, 1]
WRONG = [[1, 2, 3], [1.5, 1, 2], [1, 1, 1]]
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def no_warnings():
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        yield


@pytest.mark.parametrize(
    ("definition", "value"),
    [("closer_to_1_better", 0.609887), ("true_better", 0.258957), ("prob_mean", 0.565038)],
)
def test_truth_ratio_vectors(definition, value):
    got = truth_ratio(CORRECT, WRONG, definition)
    np.testing.assert_allclose(got.ratios, [0.223130, 1.648721, 1.0], atol=5e-7)
    assert got.value == pytest.approx(value, abs=5e-7)
    assert got.value == pytest.approx(got.scores.mean())
    assert (got.definition, got.dropped, got.wrong_mean) == (definition, 0, "geometric")
    assert got.scores.shape == got.ratios.shape == (3,)


def test_truth_ratio_scores_are_those_of_the_formulas():
    s = truth_ratio(CORRECT, WRONG).ratios
    formulas = [np.minimum(s, 1 / s), np.maximum(0, 1 - s), 1 / (1 + s)]
    for definition, expected in zip(TRUTH_RATIOS, formulas, strict=True):
        got = truth_ratio(CORRECT, WRONG, definition)
        np.testing.assert_allclose(got.scores, expected, rtol=1e-12)
        np.testing.assert_array_equal(got.ratios, s)  # the ratios do not know the definition
    assert truth_ratio(CORRECT, WRONG).definition == "closer_to_1_better"


def test_truth_ratio_with_the_arithmetic_mean_of_tofu():
    got = truth_ratio(CORRECT, WRONG, wrong_mean="arithmetic")
    np.testing.assert_allclose(got.ratios, [0.303915, 1.789001, 1.0], atol=5e-7)
    assert got.wrong_mean == "arithmetic"
    one = [truth_ratio([1.0], [[2.0]], wrong_mean=m).ratios for m in ("geometric", "arithmetic")]
    assert one[0] == pytest.approx(one[1])


def test_truth_ratio_of_ragged_and_missing_items():
    got = truth_ratio([1.0, 1, NAN, 1, None, 1], [[1, 3], [], [1], [1, NAN], [1], None])
    np.testing.assert_allclose(got.ratios, [math.exp(-1), *[NAN] * 5])
    np.testing.assert_array_equal(np.isnan(got.scores), np.isnan(got.ratios))
    assert got.dropped == 5 and got.value == pytest.approx(math.exp(-1))
    none = truth_ratio([1.0, 2.0], [[], []], "prob_mean")
    assert none.value is None and none.dropped == 2
    empty = truth_ratio([], [])
    assert empty.value is None and empty.dropped == 0 and empty.ratios.shape == (0,)
    flat = truth_ratio(np.array([1.0, 2.0]), np.array([2.0, 2.0]))  # one wrong answer an item
    np.testing.assert_allclose(flat.ratios, [math.exp(-1), 1])


@pytest.mark.parametrize("wrong_mean", ["geometric", "arithmetic"])
def test_truth_ratio_where_probabilities_underflow(wrong_mean):
    got = truth_ratio([900, 800, 5000, 1, INF], [[899], [801], [1], [5000], [1]],
                      wrong_mean=wrong_mean)  # fmt: skip
    np.testing.assert_allclose(got.ratios[:2], [math.e, 1 / math.e])
    assert np.isfinite(got.ratios).all() and (got.ratios > 0).all()
    assert got.ratios[2] > 1e300 and got.ratios[3] < 1e-300 and got.ratios[4] > 1e300
    for definition, expected in zip(TRUTH_RATIOS, [0.0, 1.0, 1.0], strict=True):
        score = truth_ratio([1], [[5000]], definition, wrong_mean=wrong_mean).value
        assert score == pytest.approx(expected, abs=1e-300)
    impossible = truth_ratio([INF, 1], [[INF, INF], [INF, 1]], wrong_mean=wrong_mean)
    assert math.isnan(impossible.ratios[0]) and impossible.dropped == 1
    mean = 0.5 if wrong_mean == "arithmetic" else 0.0
    assert impossible.ratios[1] == pytest.approx(mean, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (([1.0], [[1.0]], "closer"), {}, "`definition` must be one of closer_to_1_better, true_"),
        (([1.0], [[1.0]]), {"wrong_mean": "median"}, "`wrong_mean` must be one of geometric, ar"),
        (([1.0, 2.0], [[1.0]]), {}, "`wrong_nlls` must hold one sequence for each of the 2"),
        (([-1.0], [[1.0]]), {}, "`correct_nlls` must hold negative log-likelihoods, got -1.0"),
        (([1.0, 1], [[1.0], [2, -3.0]]), {}, r"`wrong_nlls\[1\]` must hold .* got -3.0"),
        (([[1.0]], [[1.0]]), {}, r"`correct_nlls` must hold one number an item, got shape \(1, 1"),
        ((["a"], [[1.0]]), {}, "`correct_nlls` must hold one number an item: could not convert"),
    ],
)
def test_truth_ratio_refusals(given, options, message):
    with pytest.raises(ValueError, match=message):
        truth_ratio(*given, **options)


def test_rounding_of_a_certain_answer_is_no_misuse():
    assert truth_ratio([-1e-6], [[1.0]]).ratios == pytest.approx(math.exp(-1), rel=1e-5)


A = [0.1, 0.4, 0.35, 0.8, 0.9, 0.55]
B = [0.2, 0.5, 0.45, 0.95, 1.2, 0.7, 0.6, 0.65]


@pytest.mark.parametrize(
    ("a", "b", "statistic", "p"),
    [
        (A, B, 0.375, 0.637363),
        (np.linspace(0, 1, 40), np.linspace(0.3, 1.3, 40), 0.3, 0.054141),
        *((np.arange(n), np.arange(n) + n, 1.0, p)
          for n, p in [(40, 1.860340e-23), (200, 1.942643e-119), (400, 1.063590e-239)]),
    ],
)  # fmt: skip
def test_forget_quality_vectors(a, b, statistic, p):
    got = forget_quality(a, b)
    assert got.p_value == pytest.approx(p, rel=2e-6)
    assert got.log10_p == pytest.approx(math.log10(p), abs=1e-6)
    assert got.statistic == pytest.approx(statistic, rel=1e-12)
    assert (got.n, got.n_retain, got.reason) == (len(a), len(b), None)


def test_forget_quality_does_not_see_monotone_maps():
    plain, inverted = forget_quality(A, B), forget_quality(1 / np.array(A), 1 / np.array(B))
    assert plain.p_value == pytest.approx(inverted.p_value, rel=1e-12)
    assert plain.p_value == pytest.approx(ks_2samp(A, B).pvalue, rel=1e-12)
    assert forget_quality(A, A).p_value == 1 and forget_quality(A, A).log10_p == 0


def test_forget_quality_takes_the_ratios_and_not_the_scores():
    nll = np.linspace(0.1, 1.9, 50)  # ratios s and 1/s, whose min(s, 1/s) are the same
    wrong = 2 * np.ones((50, 1))
    nlls = [nll, 4 - nll]
    sides = [truth_ratio(nll, wrong) for nll in nlls]
    expected = ks_2samp(sides[0].ratios, sides[1].ratios).pvalue
    assert forget_quality(*sides).p_value == pytest.approx(expected)
    assert forget_quality(sides[0], sides[1].ratios).p_value == pytest.approx(expected)
    assert expected < 1e-20 and ks_2samp(sides[0].scores, sides[1].scores).pvalue > 0.9


def test_forget_quality_where_p_underflows():
    got = forget_quality(np.arange(700), np.arange(700) + 700)
    assert got.p_value < 1e-300 and got.log10_p == -300 and got.statistic == 1


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([], B, "`unlearned` has 0 values, and at least 2 are needed"),
        (A, [1.0], "`retrained` has 1 values"),
        ([*A, NAN], B, "1 of the 7 values of `unlearned` are not finite"),
        (A, [None, INF, *B], "2 of the 10 values of `retrained` are not finite"),
    ],
)
def test_forget_quality_without_a_result(a, b, reason):
    got = forget_quality(a, b)
    assert got.p_value is got.log10_p is got.statistic is None
    assert (got.n, got.n_retain) == (len(a), len(b)) and got.reason.startswith(reason)


def test_forget_quality_refuses_two_definitions():
    closer, prob = (truth_ratio(CORRECT, WRONG, d) for d in ("closer_to_1_better", "prob_mean"))
    with pytest.raises(ValueError, match="one definition, got closer_to_1_better .* prob_mean"):
        forget_quality(closer, prob)
    with pytest.raises(ValueError, match="with geometric and closer_to_1_better with arithmetic"):
        forget_quality(closer, truth_ratio(CORRECT, WRONG, wrong_mean="arithmetic"))
    assert forget_quality(closer, closer).p_value == 1
    dropped = truth_ratio([1.0, 2, 3], [[1.0], [1.0], []])
    assert "1 of the 3 values of `unlearned`" in forget_quality(dropped, closer).reason


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


def test_option_probability():
    got = [option_probability(c, w) for c, w in zip(CORRECT, WRONG, strict=True)]
    np.testing.assert_allclose(got, [0.523082, 0.157060, 0.25], atol=5e-7)
    assert mean_of(got)[0] == pytest.approx(0.310047, abs=5e-7)
    assert option_probability(900.0, [900.0, 901.0]) == pytest.approx(1 / (2 + math.exp(-1)))
    assert option_probability(1.0, [5000.0]) == 1 and option_probability(5000, [1.0]) == 0
    assert option_probability(INF, [1.0, INF]) == 0
    undefined = [(1.0, []), (1.0, [NAN]), (None, [1.0]), (INF, [INF])]
    assert all(math.isnan(option_probability(*given)) for given in undefined)
    with pytest.raises(ValueError, match="`wrong_nlls` must hold negative log-likelihoods"):
        option_probability(1.0, [-2.0])
    with pytest.raises(ValueError, match="`correct_nll` must hold one number"):
        option_probability([1.0, 2.0], [1.0])


MEMORISED = [
    ([3, 4, 1, 2], [3, 0, 1, 2], 0.75, 0.5),
    ([2, 3], [2, 3], 1, 1),
    ([4, 4, 3], [1, 1, 1], 0, 0),
    ([4, 4, 3], [4, 4, 1], 2 / 3, 0),  # nothing at the end, whatever came before
    ([4, 4, 3], [1, 1, 3], 1 / 3, 1 / 3),
    ([7], [7], 1, 1),
    ([7], [8], 0, 0),
    ([], [], None, None),
]


@pytest.mark.parametrize(("labels", "predictions", "exact", "strength"), MEMORISED)
def test_memorisation_vectors(labels, predictions, exact, strength):
    for got, expected in [
        (exact_memorization(labels, predictions), exact),
        (extraction_strength(np.array(labels), np.array(predictions)), strength),
    ]:
        assert got is None if expected is None else got == pytest.approx(expected)


def test_means_of_the_memorisation_vectors():
    for function, column, mean in (
        (exact_memorization, 2, 0.583333),
        (extraction_strength, 3, 0.5),
    ):
        got = [function(row[0], row[1]) for row in MEMORISED[:3]]
        assert got == pytest.approx([row[column] for row in MEMORISED[:3]])
        assert mean_of([*got, function([], [])]) == (pytest.approx(mean, abs=5e-7), 1)


def test_only_a_true_end_of_sequence_is_dropped():
    labels, predictions = [5, 6, 2], [5, 0, 2]
    for eos, exact, strength in ((None, 2 / 3, 1 / 3), (2, 0.5, 0), (9, 2 / 3, 1 / 3)):
        assert exact_memorization(labels, predictions, eos_token_id=eos) == pytest.approx(exact)
        assert extraction_strength(labels, predictions, eos_token_id=eos) == pytest.approx(strength)
    assert exact_memorization(labels, predictions, eos_token_id=[9, 2]) == 0.5
    assert exact_memorization([0, 1], [3, 1], eos_token_id=0) == 0.5  # the first stays
    assert extraction_strength([0], [0], eos_token_id=0) is None
    assert exact_memorization([], [], eos_token_id=0) is None


@pytest.mark.parametrize("function", [exact_memorization, extraction_strength])
def test_memorisation_refusals(function):
    with pytest.raises(ValueError, match=r"one length, got shapes \(2,\) and \(1,\)"):
        function([1, 2], [1])
    with pytest.raises(ValueError, match="give one answer at a time"):
        function([[1, 2]], [[1, 2]])
    with pytest.raises(ValueError, match="the answer's ids alone, got -100"):
        function([-100, 2], [1, 2])


def test_mean_of():
    assert mean_of([1, None, NAN, 3, INF]) == (2.0, 3)
    assert mean_of([None]) == (None, 1) and mean_of([]) == (None, 0)


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
