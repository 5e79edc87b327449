import math

import numpy as np
import pytest
from scipy.stats import ks_2samp

from llmmix.unlearning.evaluation.truth import (
    TRUTH_RATIOS,
    forget_quality,
    option_probability,
    truth_ratio,
)
from llmmix.unlearning.evaluation.vectors import mean_of

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
