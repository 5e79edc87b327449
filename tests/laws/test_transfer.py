import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau, spearmanr
from sklearn.base import clone

from llmmix.laws.law import Law
from llmmix.laws.transfer import TransferCalibrator, judge_transfer

SLOPES = np.array([[1.0, 3.0], [2.0, 2.5], [4.0, 1.0]])
OFFSET, SHRINK = np.array([-2.0, -1.0]), np.array([0.5, 0.25])


class TrueLaw(Law):
    """Knows how the small models' losses came about."""

    def _fit(self, X, Y):
        slopes = SLOPES[np.ix_(self._domains, self._targets)]
        self._plane = slopes
        return np.zeros(Y.shape[1])

    def _predict(self, X):
        return X @ self._plane


def named(X, Y):
    return pd.DataFrame(X, columns=["a", "b", "c"]), pd.DataFrame(Y, columns=["code", "math"])


def small(n=20):
    X = np.random.default_rng(0).dirichlet(np.ones(3), n)
    return X, X @ SLOPES


def large(n=40, noise=0.02, seed=1):
    rng = np.random.default_rng(seed)
    X = rng.dirichlet(np.ones(3), n)
    return X, OFFSET + SHRINK * (X @ SLOPES) + noise * rng.normal(size=(n, 2))


@pytest.fixture(scope="module")
def law():
    return TrueLaw().fit(*named(*small()))


def judge(*runs, **options):
    """Where calibration is not what is tested, few draws do."""
    return judge_transfer(*runs, **{"draws": 20} | options)


# -- the calibrator


def test_the_map_is_recovered():
    x = np.random.default_rng(0).normal(size=(2, 2))
    found = TransferCalibrator().fit(x, OFFSET + SHRINK * x)
    np.testing.assert_allclose(found.slope_, SHRINK)
    np.testing.assert_allclose(found.intercept_, OFFSET)
    assert found.monotone_.all()
    np.testing.assert_allclose(found.predict([[1, 1], [0, 2]]), OFFSET + SHRINK * [[1, 1], [0, 2]])


def test_it_is_least_squares():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = x + rng.normal(size=12)
    found = TransferCalibrator().fit(x, y)
    np.testing.assert_allclose([found.slope_[0], found.intercept_[0]], np.polyfit(x, y, 1))
    assert found.predict(x).shape == (12,)


@pytest.mark.parametrize("x", [[[3.0, 1.0]], [[3.0, 1.0]] * 4])
def test_what_tells_no_slope_tells_an_offset(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = TransferCalibrator().fit(x, np.array(x) - [1, 2])
    np.testing.assert_array_equal(found.slope_, [1, 1])
    np.testing.assert_allclose(found.intercept_, [-1, -2])
    assert found.monotone_.all()


def test_a_ranking_turned_round_gets_an_offset_and_is_said():
    x = np.array([[1.0, 1], [2, 2], [3, 3]])
    y = np.array([[5.0, 5], [4, 6], [4.5, 8]])
    with pytest.warns(UserWarning, match="1 of 2 targets fall where the law has them rise"):
        found = TransferCalibrator().fit(x, y)
    assert list(found.monotone_) == [False, True]
    assert found.slope_[0] == 1 and found.intercept_[0] == pytest.approx(2.5)
    assert found.slope_[1] == pytest.approx(1.5)


def test_a_flat_target_gets_an_offset_and_is_said():
    with pytest.warns(UserWarning, match="only an offset"):
        found = TransferCalibrator().fit([1.0, 2.0], [3.0, 3.0])
    assert not found.monotone_[0] and found.predict([1.5])[0] == pytest.approx(3)


def test_a_missing_loss_leaves_its_target_the_other_runs():
    x = np.random.default_rng(0).normal(size=(6, 2))
    y = x + np.random.default_rng(1).normal(size=(6, 2)) / 10
    holes = y.copy()
    holes[0, 1] = np.nan
    found, whole = TransferCalibrator().fit(x, holes), TransferCalibrator().fit(x, y)
    rest = TransferCalibrator().fit(x[1:], y[1:])
    assert found.slope_[0] == pytest.approx(whole.slope_[0])
    assert found.slope_[1] == pytest.approx(rest.slope_[1])
    assert found.intercept_[1] == pytest.approx(rest.intercept_[1])


def test_scikit_learns_manners():
    found = TransferCalibrator()
    assert found.fit([1.0, 2], [1.0, 2]) is found
    assert not hasattr(clone(found), "slope_")


def test_bad_calibrations():
    with pytest.raises(ValueError, match="call `fit` first"):
        TransferCalibrator().predict([1.0])
    with pytest.raises(ValueError, match="runs by targets, both"):
        TransferCalibrator().fit(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="`predicted` must be finite"):
        TransferCalibrator().fit([1, np.nan], [1, 2])
    with pytest.raises(ValueError, match="no run has a loss of 1"):
        TransferCalibrator().fit(np.ones((2, 2)), [[1, np.nan], [2, np.nan]])
    with pytest.raises(ValueError, match="must have 2 targets, got 3"):
        TransferCalibrator().fit(np.ones((2, 2)), np.ones((2, 2))).predict(np.ones((1, 3)))


# -- a law judged at another size


def test_agreement_by_hand(law):
    X, Y = large(noise=0.1)
    found = judge_transfer(law, *named(X, Y), objective={"code": 1, "math": 3})
    P, u = X @ SLOPES, np.array([0.25, 0.75])
    lines = [np.polyfit(P[:, i], Y[:, i], 1) for i in range(2)]
    fitted = np.array([np.polyval(line, P[:, i]) for i, line in enumerate(lines)]).T
    columns = [(each[:, 0], each[:, 1], each @ u) for each in (P, Y, fitted)]
    for i, (p, y, line) in enumerate(zip(*columns, strict=True)):
        scores = found.objective if i == 2 else [values[i] for values in found.by_target]
        rho, low, high, tau, mae, in_sample = scores
        assert rho == pytest.approx(spearmanr(p, y).statistic)
        assert low < rho < high
        assert tau == pytest.approx(kendalltau(p, y).statistic)
        assert mae == pytest.approx(np.abs(p - y).mean())
        assert in_sample == pytest.approx(np.abs(line - y).mean())
    assert (found.targets, found.runs, found.top, found.notes) == (["code", "math"], 40, 10, [])
    assert found.regret == pytest.approx((Y @ u)[(P @ u).argmin()] - (Y @ u).min())
    best = [set(np.argsort(values)[:10]) for values in (P @ u, Y @ u)]
    assert found.overlap == len(best[0] & best[1]) / 10


def test_where_sizes_differ_by_the_map_alone_two_runs_tell_it(law):
    found = judge_transfer(law, *named(*large(noise=0)))
    assert (found.by_target.spearman > 0.999).all() and found.by_target.mae.min() > 1
    assert found.by_target.mae_in_sample.max() < 1e-12
    for scores in found.calibrated.values():
        assert scores.mean_mae < 1e-12 and scores.objective_mae < 1e-12
        assert (scores.regret, scores.overlap, scores.not_monotone) == (0, 1, 0)


def test_more_runs_calibrate_better(law):
    found = judge_transfer(law, *named(*large(noise=0.1)))
    assert list(found.calibrated) == [2, 4, 8, 16]
    errors = [scores.objective_mae for scores in found.calibrated.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(found.objective.mae_in_sample, rel=0.2)
    assert found.calibrated[2].not_monotone > found.calibrated[16].not_monotone
    for scores in found.calibrated.values():
        assert scores.mae.shape == (2,)
        assert scores.mae.min() < scores.mean_mae < 1.2 * scores.mae.max()


def test_the_runs_calibrated_on_do_not_judge(law):
    """One run is far off. Where all but two calibrate, it seldom judges, and bends the slopes."""
    X, Y = large(12, noise=0)
    Y[3] += 50
    seen = judge_transfer(law, *named(X, Y), counts=(2,), draws=60).calibrated[2]
    assert seen.objective_mae > 50 / 11  # it judges, or calibrates
    assert judge_transfer(law, *named(X, Y)).objective.mae_in_sample > 1


def test_one_run_tells_an_offset(law):
    X, Y = large(12, noise=0)
    few = judge_transfer(law, *named(X, Y), counts=(1,), draws=2000).calibrated[1]
    left = Y - X @ SLOPES
    by_run = [np.abs(np.delete(left, i, 0) - left[i]).mean(0) for i in range(12)]
    np.testing.assert_allclose(few.mae, np.median(by_run, 0), rtol=0.1)
    assert few.not_monotone == 0


def test_calibration_by_target_mends_the_ranking_of_a_sum(law):
    """Large models differ in one target alone: a law that weighs both ranks by the wrong one."""
    X, _ = large()
    Y = X @ SLOPES * [0.01, 1]
    found = judge_transfer(law, *named(X, Y))
    assert found.objective.spearman < 0.9
    assert found.calibrated[2].overlap == 1 > found.overlap
    assert found.calibrated[2].regret == 0


def test_a_law_that_is_turned_round_is_seen(law):
    X, Y = large(noise=0)
    found = judge(law, *named(X, -Y))
    assert found.by_target.spearman == pytest.approx(-1) and found.objective.kendall < -0.8
    assert found.overlap == 0 and found.regret > 0.3
    assert all(scores.not_monotone == 1 for scores in found.calibrated.values())


def test_targets_are_matched_by_name(law):
    X, Y = large()
    whole = judge(law, *named(X, Y), objective="math")
    turned = np.c_[np.zeros(40), Y[:, ::-1]]
    found = judge(law, X, turned, targets=["law", "math", "code"], objective="math")
    assert found.targets == ["code", "math"]
    assert found.notes == ["The law has no target law: it is not judged."]
    np.testing.assert_allclose(found.by_target, whole.by_target)
    np.testing.assert_allclose(found.objective, whole.objective)
    frame = pd.DataFrame(turned, columns=["law", "math", "code"])
    assert judge(law, X, frame, objective="math").notes == found.notes


def test_a_target_without_large_runs_is_noted_and_its_weight_spread(law):
    X, Y = large()
    found = judge(law, X, Y[:, 1], targets=["math"])
    assert found.notes == [
        "The large runs have no loss of code: it is not judged.",
        "The targets in common are 50% of the objective's weight.",
    ]
    assert found.objective.mae == pytest.approx(found.by_target.mae[0])
    assert found.objective.mae == pytest.approx(np.abs(X @ SLOPES[:, 1] - Y[:, 1]).mean())
    with pytest.raises(ValueError, match="`objective`: the large runs have none of its targets"):
        judge(law, X, Y[:, 1], targets=["math"], objective="code")


def test_targets_that_do_not_match(law):
    X, Y = large()
    with pytest.raises(ValueError, match="no target of the law: it has .'law', 'art'."):
        judge_transfer(law, X, Y, targets=["law", "art"])
    with pytest.raises(ValueError, match="has 1 targets and the law 2"):
        judge_transfer(law, X, Y[:, 0])
    with pytest.raises(ValueError, match="a name twice"):
        judge_transfer(law, X, Y, targets=["math", "math"])
    with pytest.raises(ValueError, match="2 targets, and 1 names"):
        judge_transfer(law, X, Y, targets=["math"])
    with pytest.raises(ValueError, match="no target law"):
        judge_transfer(law, X, Y, objective="law")


def test_laws_without_names_and_of_one_target():
    X, Y = large()
    plain = TrueLaw().fit(*small())
    named_ = judge(TrueLaw().fit(*named(*small())), *named(X, Y))
    np.testing.assert_allclose(judge(plain, X, Y).by_target, named_.by_target)
    x, y = small()
    one = judge(TrueLaw().fit(x, y[:, 0]), X, Y[:, 0])
    assert one.targets == [0] and one.runs == 40
    assert one.objective.spearman == pytest.approx(spearmanr(X @ SLOPES[:, 0], Y[:, 0]).statistic)


def test_missing_losses_are_left_out_of_their_target_and_of_calibration(law):
    X, Y = large()
    holes = Y.copy()
    holes[:15, 0] = np.nan
    found = judge(law, *named(X, holes), objective="math")
    whole = judge(law, *named(X, Y), objective="math")
    P = X @ SLOPES
    assert found.by_target.mae[0] == pytest.approx(np.abs(P - Y)[15:, 0].mean())
    assert found.by_target.kendall[0] == pytest.approx(kendalltau(P[15:, 0], Y[15:, 0]).statistic)
    np.testing.assert_allclose(found.objective[0], whole.objective[0])
    assert found.notes == ["15 runs without all losses take no part in calibration."]
    assert found.regret == pytest.approx(whole.regret) and found.overlap == whole.overlap
    np.testing.assert_allclose(
        judge(law, *named(X[15:], Y[15:])).calibrated[4].mae, found.calibrated[4].mae
    )


def test_counts_that_leave_too_few_are_skipped_and_noted(law):
    found = judge(law, *named(*large(8)), counts=(16, 0, 6, 2, 7))
    assert list(found.calibrated) == [2, 6]
    assert [note.split()[0] for note in found.notes] == ["0", "7", "16"]
    assert found.top == 4 and found.calibrated[6].top == 1
    with pytest.raises(ValueError, match="3 large runs can be ranked, 2 cannot"):
        judge(law, *named(*large(2)))


def test_what_the_law_warns_of_is_noted():
    X, Y = small()
    held = TrueLaw()
    with pytest.warns(UserWarning, match="No run varied c"):
        held.fit(*named(np.c_[X[:, :2] / X[:, :2].sum(1, keepdims=True), np.zeros(20)], Y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = judge(held, *named(*large()))
    assert len(found.notes) == 1 and "vary c" in found.notes[0]


def test_runs_come_in_any_order_and_seeds_repeat(law):
    X, Y = large(noise=0.1)
    order = np.random.default_rng(0).permutation(40)
    a, b = judge(law, *named(X, Y)), judge(law, *named(X[order], Y[order]))
    np.testing.assert_allclose(a.by_target, b.by_target)
    np.testing.assert_allclose(a.calibrated[4].mae, b.calibrated[4].mae)
    other = judge(law, *named(X, Y), seed=1, counts=(2, 4))
    assert a.calibrated[4].objective_mae != other.calibrated[4].objective_mae
    assert a.objective == other.objective


def test_seeds_of_a_mixture_do_not_narrow_the_interval(law):
    X, Y = large(noise=0.3)
    once, tenfold = (
        judge_transfer(law, *named(np.repeat(X, n, 0), np.repeat(Y, n, 0)), counts=())
        for n in (1, 10)
    )
    assert tenfold.objective == pytest.approx(once.objective, abs=0.02)
