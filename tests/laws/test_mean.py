import numpy as np

from llmmix.laws.mean import MeanLaw
from tests.laws.planes import plane


def test_the_mean_law_is_a_law():
    X, Y = plane()
    law = MeanLaw().fit(X, Y)
    mean, std = law.predict(X[:3], return_std=True)
    np.testing.assert_allclose(mean, np.tile(Y.mean(0), (3, 1)))
    np.testing.assert_allclose(std, np.tile(Y.std(0) * np.sqrt(1 + 1 / 60), (3, 1)))
    assert not law.gradient(X).any()
