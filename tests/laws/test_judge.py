import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, spearmanr
from sklearn.metrics import mean_absolute_error

from llmmix.laws import EffectiveDataLaw
from llmmix.laws.held_out import folds_of
from llmmix.laws.judge import best_of, compare, cross_validate, error_difference
from tests.laws.planes import NanLaw, Nearest, PlaneLaw, plane

# -- a judgement


def test_predictions_are_of_fits_to_the_other_folds():
    X, Y = plane()
    found = cross_validate(PlaneLaw(), X, Y, seed=4)
    for train, test in folds_of(X, 0.2, 4):
        fitted = PlaneLaw().fit(X[train], Y[train])
        predicted, std = fitted.predict(X[test], return_std=True)
        np.testing.assert_allclose(found.predictions[test], predicted)
        np.testing.assert_allclose(found.stds[test], std)


def test_scores_by_hand():
    X, Y = plane()
    found = cross_validate(PlaneLaw(), X, Y, objective=[1, 3], seed=4)
    means = np.empty_like(Y)
    for train, test in folds_of(X, 0.2, 4):
        means[test] = Y[train].mean(0)
    P = found.predictions
    rmse = np.sqrt(((P - Y) ** 2).mean(0))
    np.testing.assert_allclose(found.mae, mean_absolute_error(Y, P, multioutput="raw_values"))
    np.testing.assert_allclose(found.rmse, rmse)
    np.testing.assert_allclose(found.r2, 1 - ((P - Y) ** 2).sum(0) / ((means - Y) ** 2).sum(0))
    ranks = [spearmanr(P[:, i], Y[:, i]).statistic for i in range(2)]
    np.testing.assert_allclose(found.spearman, ranks)
    assert found.error == pytest.approx((rmse / Y.std(0)).mean())
    u = np.array([0.25, 0.75])
    assert found.objective_mae == pytest.approx(np.abs((P - Y) @ u).mean())
    left = (((P - Y) @ u) ** 2).sum() / (((means - Y) @ u) ** 2).sum()
    assert found.objective_r2 == pytest.approx(1 - left)
    estimate, low, high = found.objective_spearman
    assert estimate == pytest.approx(spearmanr(P @ u, Y @ u).statistic)
    assert low < estimate < high
    assert found.regret == pytest.approx((Y @ u)[(P @ u).argmin()] - (Y @ u).min())
    for level, share in found.coverage.items():
        inside = np.abs(P - Y) <= norm.ppf(0.5 + level / 2) * found.stds
        assert share == inside.mean()
    assert list(found.coverage) == [0.5, 0.9] and found.seconds > 0 and not found.problems


def test_a_true_law_covers_what_it_says():
    found = cross_validate(PlaneLaw(), *plane(600, 0.2))
    assert found.coverage[0.5] == pytest.approx(0.5, abs=0.06)
    assert found.coverage[0.9] == pytest.approx(0.9, abs=0.04)


def test_no_seed_of_a_mixture_gives_it_away():
    rng = np.random.default_rng(0)
    X = np.repeat(rng.dirichlet(np.ones(8), 20), 4, 0)
    Y = np.repeat(rng.normal(size=(20, 1)), 4, 0)  # no law: mixtures are labels
    assert cross_validate(Nearest(), X, Y).error > 0.8
    X += 1e-6 * rng.random(X.shape)
    assert cross_validate(Nearest(), X / X.sum(1, keepdims=True), Y).error < 0.3


def test_scores_do_not_depend_on_the_order_of_the_runs():
    X, Y = plane()
    order = np.random.default_rng(7).permutation(len(X))
    a, b = cross_validate(PlaneLaw(), X, Y), cross_validate(PlaneLaw(), X[order], Y[order])
    np.testing.assert_allclose(b.predictions, a.predictions[order])
    assert b.error == pytest.approx(a.error)
    assert b.objective_spearman == pytest.approx(a.objective_spearman)


def test_the_law_given_is_left_alone():
    law = PlaneLaw().fit(*plane(20, seed=5))
    before = law._plane.copy()
    cross_validate(law, *plane())
    np.testing.assert_array_equal(law._plane, before)


def test_missing_losses_are_left_out_of_their_target_alone():
    X, Y = plane()
    holes = Y.copy()
    holes[:10, 1] = np.nan
    whole, found = cross_validate(PlaneLaw(), X, Y), cross_validate(PlaneLaw(), X, holes)
    assert (found.mae[0], found.r2[0]) == pytest.approx((whole.mae[0], whole.r2[0]))
    errors = np.abs(found.predictions - Y)[10:, 1]
    assert found.mae[1] == pytest.approx(errors.mean())
    total, true = found.predictions[10:].mean(1), Y[10:].mean(1)
    assert found.objective_mae == pytest.approx(np.abs(total - true).mean())
    assert np.isfinite(cross_validate(PlaneLaw(), X, holes, objective={0: 1}).regret)


def test_a_target_that_a_fold_does_not_know_is_said():
    X, Y = plane(20)
    rare = folds_of(X, 0.2, 0)[0][1]
    holes = np.full(20, np.nan)
    holes[rare] = np.arange(len(rare))
    losses = pd.DataFrame({"code": Y[:, 0], "math": holes})
    found = cross_validate(PlaneLaw(), X, losses)
    assert found.problems == ["in 1 of 5 folds no run fitted to has a loss of math"]
    assert np.isnan(found.predictions[rare, 1]).all() and np.isfinite(found.mae[0])
    assert found.error == pytest.approx(found.rmse[0] / Y[:, 0].std())


def test_a_constant_target_has_no_score_and_does_not_count():
    X, Y = plane()
    alone = cross_validate(PlaneLaw(), X, Y[:, :1])
    found = cross_validate(PlaneLaw(), X, np.c_[Y[:, 0], np.full(60, 2.0)])
    for score in (found.mae, found.rmse, found.r2, found.spearman):
        assert np.isfinite(score[0]) and np.isnan(score[1])
    assert found.error == pytest.approx(alone.error)
    assert found.coverage == alone.coverage
    assert np.isfinite(found.objective_mae)


def test_names_and_one_target_alone():
    X, Y = plane()
    named = pd.DataFrame(X, columns=["a", "b", "c"]), pd.DataFrame(Y, columns=["code", "math"])
    found = cross_validate(PlaneLaw(), *named, objective="math")
    assert found.targets == ["code", "math"]
    plain = cross_validate(PlaneLaw(), X, Y, objective=[0, 1])
    assert found.objective_mae == pytest.approx(plain.objective_mae)
    assert plain.objective_mae == pytest.approx(plain.mae[1])
    for losses in (Y[:, 0], pd.Series(Y[:, 0])):
        assert cross_validate(PlaneLaw(), X, losses).predictions.shape == (60, 1)
    with pytest.raises(ValueError, match="no target law"):
        cross_validate(PlaneLaw(), *named, objective="law")


def test_problems_are_counted_and_no_warning_gets_out():
    X, Y = plane(20)
    X = np.c_[X * 0.9, np.full(20, 0.1), np.zeros(20)]
    X[0] = [0.2, 0.3, 0.3, 0.1, 0.1]  # the only run with the last domain
    X = pd.DataFrame(X, columns=list("abcde"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cross_validate(PlaneLaw(stuck=True), X, Y)
    assert sorted(found.problems) == [
        "in 1 of 5 folds no run fitted to varies e",
        "in 5 of 5 folds no run fitted to varies d",
        "in 5 of 5 folds the fit did not converge",
    ]


def test_without_levels_no_deviation_is_asked_for():
    class Costly(PlaneLaw):
        def _spread(self, X):
            raise AssertionError("asked")

    found = cross_validate(Costly(), *plane(), levels=())
    assert np.isnan(found.stds).all() and found.coverage == {}
    assert found.error == cross_validate(PlaneLaw(), *plane()).error


# -- laws compared


def test_the_right_law_wins_and_the_difference_says_so():
    X, Y = plane()
    judged = compare({"near": Nearest(), "plane": PlaneLaw()}, X, Y)
    assert list(judged) == ["near", "plane", "mean"]
    assert best_of(judged) == "plane"
    assert judged["plane"].error < 0.3 and judged["mean"].error == pytest.approx(1, abs=0.1)
    a, b = judged["plane"], judged["near"]
    found, back = error_difference(a, b), error_difference(b, a)
    assert found.low < found.estimate < found.high < 0
    assert found.estimate == pytest.approx((a.standardized**2 - b.standardized**2).mean())
    assert found.estimate == pytest.approx(
        ((a.rmse / Y.std(0)) ** 2).mean() - (b.standardized**2).mean()
    )
    assert back.estimate == -found.estimate and back.low == pytest.approx(-found.high)
    assert error_difference(a, a) == (0, 0, 0)


def test_laws_that_are_as_good_differ_by_nothing():
    class Other(PlaneLaw):
        def _predict(self, X):
            return super()._predict(X) + 0.05 * np.sin(1e4 * X[:, :1])

    judged = compare({"a": PlaneLaw(), "b": Other()}, *plane(40, 0.5))
    found = error_difference(judged["a"], judged["b"])
    assert found.low < 0 < found.high


def test_the_mean_ranks_nothing():
    X, Y = plane()
    mean = compare({}, X, Y, objective=[1, 0])["mean"]
    assert np.isnan(mean.spearman).all() and np.isnan(mean.objective_spearman).all()
    assert mean.regret == pytest.approx(Y[:, 0].mean() - Y[:, 0].min())
    assert mean.r2 == pytest.approx([0, 0]) and mean.objective_r2 == pytest.approx(0)
    assert 0.8 < mean.coverage[0.9] <= 1


def test_a_law_that_cannot_be_fitted_says_why():
    judged = compare(
        {"greedy": PlaneLaw(fewest=50), "nan": NanLaw(), "plane": PlaneLaw()}, *plane()
    )
    assert judged["greedy"] == "PlaneLaw takes 50 runs, got 48."
    assert judged["nan"] == "NanLaw predicts losses that are not finite."
    assert best_of(judged) == "plane"
    with pytest.raises(ValueError, match="no law with an error"):
        best_of({"greedy": "too few", "mean": judged["mean"]})


def test_comparisons_that_make_no_sense():
    X, Y = plane()
    with pytest.raises(ValueError, match="'mean' names the baseline"):
        compare({"mean": PlaneLaw()}, X, Y)
    with pytest.raises(ValueError, match="`holdout`"):
        compare({"plane": PlaneLaw()}, X, Y, holdout=0.7)
    with pytest.raises(ValueError, match="judge other runs"):
        error_difference(cross_validate(PlaneLaw(), X, Y), cross_validate(PlaneLaw(), X, Y + 1))


def test_the_default_law_beats_the_mean_on_its_own_curve():
    rng = np.random.default_rng(0)
    X = rng.dirichlet(np.ones(4), 30)
    Y = 2 + (0.1 + np.sqrt(X) @ rng.uniform(0.2, 2, (4, 2))) ** -0.5
    judged = compare({"effective": EffectiveDataLaw(components=1)}, X, Y)
    assert judged["effective"].error < 0.2 < judged["mean"].error
