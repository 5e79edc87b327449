import numpy as np
import pytest

from llmmix.laws.held_out import folds_of
from tests.laws.planes import plane


def as_sets(folds):
    return [(frozenset(map(int, a)), frozenset(map(int, b))) for a, b in folds]


# -- folds


@pytest.mark.parametrize(
    ("holdout", "n", "folds"),
    [(0.5, 10, 2), (0.2, 10, 5), (0.2, 4, 4), (0.1, 30, 10), (0.01, 7, 7), (0.4, 10, 2)],
)
def test_every_run_is_held_out_once(holdout, n, folds):
    found = folds_of(plane(n)[0], holdout, 0)
    assert len(found) == folds
    for train, test in found:
        assert len(train) and len(test)
        assert sorted([*train, *test]) == list(range(n))
    assert sorted(np.concatenate([test for _, test in found])) == list(range(n))


def test_runs_of_a_mixture_share_a_fold():
    X = np.repeat(plane(12)[0], 3, 0)
    X[::3] += [3e-10, -3e-10, 0]
    for train, test in folds_of(X, 0.25, 1):
        assert not {i // 3 for i in train} & {i // 3 for i in test}
        assert len(test) == 9
    X[::3] += [1e-6, -1e-6, 0]
    assert any({i // 3 for i in a} & {i // 3 for i in b} for a, b in folds_of(X, 0.25, 1))


def test_folds_do_not_depend_on_the_order_of_the_runs():
    X = np.vstack([plane(20)[0], plane(20)[0][:6], np.eye(3)])
    order = np.random.default_rng(3).permutation(len(X))
    moved = [(order[a], order[b]) for a, b in folds_of(X[order], 0.2, 5)]
    assert as_sets(moved) == as_sets(folds_of(X, 0.2, 5))
    assert as_sets(folds_of(X, 0.2, 6)) != as_sets(folds_of(X, 0.2, 5))


@pytest.mark.parametrize("holdout", [0, -0.1, 0.51, 1, np.nan])
def test_bad_holdout(holdout):
    with pytest.raises(ValueError, match="`holdout` must lie above 0"):
        folds_of(plane()[0], holdout, 0)


def test_two_mixtures_are_too_few_whatever_the_runs():
    with pytest.raises(ValueError, match="takes 3 different ones, got 2 in 20 runs"):
        folds_of(np.repeat(np.eye(2), 10, 0), 0.2, 0)
