import numpy as np
import pytest

from llmmix.laws.trees import GradientBoostedLaw


def trees(**options):
    """Fewer and larger steps, and smaller trees, than by default: seconds add up."""
    return GradientBoostedLaw(
        **({"n_estimators": 15, "learning_rate": 0.25, "max_leaf_nodes": 6} | options)
    )


def truth(X):
    return np.column_stack([2 - X[:, 0] + X[:, 1] ** 2, 3 + np.exp(-4 * X[:, 2])])


def world(seed=0, n=80, noise=0.05):
    rng = np.random.default_rng(seed)
    X = rng.dirichlet(np.ones(4), n)
    return X, truth(X) + noise * rng.normal(size=(n, 2))


def test_it_follows_the_runs():
    X, Y = world(n=200, noise=0.01)
    Z = world(1, 200)[0]
    law = trees().fit(X, Y)
    left = np.mean((law.predict(Z) - truth(Z)) ** 2, 0) / truth(Z).var(0)
    assert (left < 0.1).all()
    assert trees().fit(X, Y[:, 1]).predict(Z).shape == (200,)


def test_order_changes_nothing():
    X, Y = world()
    Y[3, 1] = np.nan
    rng, Z = np.random.default_rng(2), world(1, 9)[0]
    runs, domains = rng.permutation(80), rng.permutation(4)
    law, other = trees().fit(X, Y), trees().fit(X[np.ix_(runs, domains)], Y[runs, ::-1])
    for a, b in zip(
        law.predict(Z, return_std=True), other.predict(Z[:, domains], return_std=True), strict=True
    ):
        assert (a[:, ::-1] == b).all()


def test_the_noise_is_not_that_of_training():
    X, Y = world(n=60, noise=0.3)
    law = trees(min_samples_leaf=2, max_leaf_nodes=31, n_estimators=30).fit(X, Y)
    training = np.sqrt(np.mean((law.predict(X) - Y) ** 2, 0))
    assert (training < 0.15).all() and (law.noise_ > 0.2).all()


def test_duplicated_runs_are_left_out_together():
    X, Y = world(n=40, noise=0.3)
    law = trees(min_samples_leaf=2, max_leaf_nodes=31).fit(np.tile(X, (2, 1)), np.tile(Y, (2, 1)))
    assert (law.noise_ > 0.15).all()  # else each would be predicted by its double


def test_intervals_cover():
    inside = []
    for seed in range(2):
        X, Y = world(seed, 100, 0.1)
        Z, new = world(seed + 50, 100, 0.1)
        low, high = trees().fit(X, Y).interval(Z)
        inside.append(((low < new) & (new < high)).mean())
    assert 0.83 < np.mean(inside) < 0.97


def test_draws_spread_as_the_deviations_say():
    law, Z = trees().fit(*world()), world(1, 8)[0]
    spread = np.sqrt(law.predict(Z, return_std=True)[1] ** 2 - law.noise_**2)
    drawn = law.draws(Z, 3000)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.1, atol=1e-9)
    assert (spread > 0).any() and (drawn == law.draws(Z, 3000)).all()


@pytest.mark.parametrize("n", [12, 32])
def test_few_runs_still_split(n):
    X, Y = world(n=n, noise=0.0)
    assert len(np.unique(trees().fit(X, Y[:, 1]).predict(X))) > 3


def test_missing_losses_a_constant_target_and_an_unvaried_domain():
    X, Y = world()
    Y[:30, 0], Y[:, 1] = np.nan, 4.0
    padded = np.insert(X / 2, 1, 0.5, axis=1)
    with pytest.warns(UserWarning, match="No run varied 1"):
        law = trees().fit(padded, Y)
    values, std = law.predict(padded, return_std=True)
    assert (values[:, 1] == 4).all() and (std[:, 1] == 0).all()
    np.testing.assert_allclose(values[:, 0], trees().fit(padded[30:], Y[30:, 0]).predict(padded))


def test_no_gradient_and_a_search_by_draws():
    law = trees().fit(*world())
    with pytest.raises(TypeError, match="GradientBoostedLaw has no gradient"):
        law.gradient(np.eye(4))
    with pytest.raises(ValueError, match=r"`search` \(`method`\) must be auto"):
        law.best_mixture(method="gradient")


def test_vertices_stay_among_the_losses():
    X, Y = world(noise=0.0)
    values = trees().fit(X, Y).predict(np.eye(4))
    assert (values >= Y.min(0) - 0.1).all() and (values <= Y.max(0) + 0.1).all()


def test_too_few_runs():
    X, Y = world(n=6)
    Y[:3, 1] = np.nan
    with pytest.raises(ValueError, match="needs 4 runs or more.*; target 1 has 3"):
        trees().fit(X, Y)
