import math

from llmmix.unlearning.evaluation.vectors import mean_of

NAN, INF = math.nan, math.inf


def test_mean_of():
    assert mean_of([1, None, NAN, 3, INF]) == (2.0, 3)
    assert mean_of([None]) == (None, 1) and mean_of([]) == (None, 0)
