import numpy as np
import pytest

from llmmix.laws.budget import learning_curve, runs_needed
from tests.laws.planes import PlaneLaw, plane


def test_a_curve_falls_and_ends_at_four_fifths():
    curve = learning_curve(PlaneLaw(), *plane(100, 0.3))
    assert [point["runs"] for point in curve] == [8, 16, 32, 64, 80]
    assert curve[0]["error"] > curve[-1]["error"] > 0
    assert curve[0]["spearman"] < curve[-1]["spearman"] < 1
    assert curve[0]["mae"] > curve[-1]["mae"]
    assert all(point[f"{name}_sd"] > 0 for point in curve for name in ("error", "spearman", "mae"))
    assert not any(point["reason"] for point in curve)


def test_a_point_is_a_fit_judged_on_runs_apart():
    seen = []

    class Watched(PlaneLaw):
        def _fit(self, X, Y):
            seen.append(("fit", X.copy()))
            return super()._fit(X, Y)

        def _predict(self, X):
            seen.append(("predict", X.copy()))
            return super()._predict(X)

    X, Y = plane(20)
    X, Y = np.repeat(X, 2, 0), np.repeat(Y, 2, 0)  # two seeds of each
    learning_curve(Watched(), X, Y, sizes=[5, 16], repeats=2)
    assert [len(x) for _, x in seen] == [5, 8, 16, 8] * 2
    # A law sees the domains in an order of its own
    rows = [{tuple(sorted(x)) for x in np.round(x, 12)} for _, x in seen]
    for few, test, many, again in (rows[:4], rows[4:]):
        assert few < many and test == again and not many & test
        assert len(few) == 5 and len(many) == 16  # each run of another mixture
    assert rows[1] != rows[5]


def test_a_mixture_is_stood_for_by_any_of_its_runs():
    fitted = []

    class Watched(PlaneLaw):
        def _fit(self, X, Y):
            fitted.extend(Y[:, 0])
            return super()._fit(X, Y)

    X, Y = np.repeat(plane(20)[0], 2, 0), np.arange(40.0)
    learning_curve(Watched(), X, Y, sizes=[16], repeats=1)
    assert {int(y) % 2 for y in fitted} == {0, 1} and len(fitted) == 16


def test_curves_repeat_themselves():
    first, again, other = (
        learning_curve(PlaneLaw(), *plane(), sizes=[10], seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_sizes_that_a_law_does_not_take_are_listed_with_the_reason():
    curve = learning_curve(PlaneLaw(fewest=20), *plane(50))
    assert [point["runs"] for point in curve] == [8, 16, 32, 40]
    assert curve[0]["reason"] == "PlaneLaw takes 20 runs, got 8."
    assert np.isnan([curve[0][name] for name in ("error", "spearman", "mae", "mae_sd")]).all()
    assert curve[2]["reason"] == "" and curve[2]["error"] > 0


def test_a_draw_that_fails_is_counted():
    class Fickle(PlaneLaw):
        calls = 0

        def _fit(self, X, Y):
            Fickle.calls += 1
            if Fickle.calls == 2:
                raise ValueError("Not today.")
            return super()._fit(X, Y)

    (point,) = learning_curve(Fickle(), *plane(), sizes=[10], repeats=3)
    assert point["reason"] == "1 of 3 draws: Not today." and point["error"] > 0


def test_curves_of_too_little():
    with pytest.raises(ValueError, match="takes 5 different ones, got 4"):
        learning_curve(PlaneLaw(), *plane(4))
    for sizes in ([0], [9]):
        with pytest.raises(ValueError, match="`sizes` must lie between 1 and 8"):
            learning_curve(PlaneLaw(), *plane(10), sizes=sizes)
    assert [point["runs"] for point in learning_curve(PlaneLaw(), *plane(8))] == [6]


def test_runs_needed():
    curve = [{"runs": n, "error": e} for n, e in [(4, np.nan), (8, 2), (16, 1.1), (32, 1.0)]]
    assert runs_needed(curve, within=0.101) == 16
    assert runs_needed(curve, within=0.05) == 32
    assert runs_needed(curve, within=1) == 8
    assert runs_needed(curve[::-1], within=0.101) == 16
    with pytest.raises(ValueError, match="`curve` has no error"):
        runs_needed(curve[:1])
