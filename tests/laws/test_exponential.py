import numpy as np
import pytest
from scipy.stats import spearmanr

from llmmix.laws.exponential import ExponentialLaw


def simplex(seed, n, k, strength=1.0):
    return np.random.default_rng(seed).dirichlet(np.full(k, strength), n)


def world(seed=0, n=60, k=4, m=3, noise=0.01):
    """Runs, losses, and the law they come from."""
    rng = np.random.default_rng(seed)
    c, t = rng.uniform(1.0, 2.0, m), rng.normal(0, 1.2, (m, k))

    def truth(X):
        return c + np.exp(X @ t.T)

    X = rng.dirichlet(np.ones(k), n)
    return X, truth(X) + noise * rng.normal(size=(n, m)), truth


def test_it_finds_the_curve_that_made_the_losses():
    rng = np.random.default_rng(3)
    X, c, t = simplex(0, 80, 4), np.array([1.5, 2.5]), rng.normal(0, 2, (2, 4))
    law = ExponentialLaw(ridge=0).fit(X, c + np.exp(X @ t.T))
    Z = simplex(1, 30, 4)
    np.testing.assert_allclose(law.predict(Z), c + np.exp(Z @ t.T), rtol=1e-4)
    np.testing.assert_allclose(law.floor_, c, rtol=1e-2)
    apart = law.log_scale_[:, None] + law.exponents_
    np.testing.assert_allclose(apart, t, atol=5e-2)  # all of it is log k + t
    assert law.converged_ and (law.noise_ < 1e-4).all()


@pytest.mark.parametrize("k", [2, 10])
def test_it_finds_it_with_its_ridge(k):
    X, Y, truth = world(k=k, n=150, noise=0.0)
    Z = simplex(1, 50, k)
    error = np.abs(ExponentialLaw().fit(X, Y).predict(Z) - truth(Z))
    # Of 10 domains some alone are above the ceiling, which bends the law a little
    assert (error / np.std(Y, 0)).max() < (0.03 if k == 2 else 0.15)


def test_it_is_the_best_fit_to_noisy_losses():
    X, Y, _ = world(m=1, noise=0.05)
    law = ExponentialLaw(huber=0.02, ridge=0, tol=1e-10, max_iter=500).fit(X, Y[:, 0])

    def objective(c, k, t):
        r = np.abs(c + np.exp(k + X @ t) - Y[:, 0])
        return np.where(r < 0.02, r**2 / 2, 0.02 * (r - 0.01)).sum()

    c, k, t = law.floor_[0], law.log_scale_[0], law.exponents_[0]
    here = objective(c, k, t)
    np.testing.assert_allclose(c + np.exp(k + X @ t), law.predict(X), rtol=1e-10)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(100):
            d = size * rng.normal(size=6)
            assert objective(c + d[0], k + d[1], t + d[2:]) > here - 1e-6


@pytest.mark.parametrize(("seed", "n", "noise"), [(25, 26, 0.1), (26, 24, 0.2)])
def test_no_fit_with_a_ridge_is_a_better_one_without(seed, n, noise):
    """With few runs of 17 domains, its own starts alone end in a minimum 8% above the ridge's."""
    rng = np.random.default_rng(seed)
    X, w = rng.dirichlet(np.full(17, 0.3), n), np.exp(rng.normal(-1, 1, 17))
    y = 1.5 + (0.1 + X**0.7 @ w) ** -0.5 + noise * rng.normal(size=n)

    def objective(ridge):
        r = np.abs(ExponentialLaw(ridge=ridge).fit(X, y).predict(X) - y)
        return np.where(r < 0.02, r**2 / 2, 0.02 * (r - 0.01)).sum()

    here = objective(0)
    assert all(here <= objective(ridge) for ridge in (1e-5, 1e-4, 1e-3, 1e-2))


def test_slopes_are_those_of_the_predictions():
    X, Y, _ = world()
    law, Z = ExponentialLaw().fit(X, Y), simplex(5, 4, 4)
    for j in range(3):
        step = np.zeros(4)
        step[j], step[j + 1] = 1e-5, -1e-5
        found = (law.predict(Z + step) - law.predict(Z - step)) / 2e-5
        np.testing.assert_allclose(found, law.gradient(Z) @ step / 1e-5, rtol=1e-6, atol=1e-8)


def test_order_changes_nothing():
    X, Y, _ = world(noise=0.05)
    Y[3, 1] = Y[7, 2] = np.nan
    rng, Z = np.random.default_rng(2), simplex(9, 6, 4)
    runs, domains, targets = rng.permutation(60), rng.permutation(4), rng.permutation(3)
    law = ExponentialLaw().fit(X, Y)
    other = ExponentialLaw().fit(X[np.ix_(runs, domains)], Y[np.ix_(runs, targets)])
    for a, b in zip(
        law.predict(Z, return_std=True), other.predict(Z[:, domains], return_std=True), strict=True
    ):
        np.testing.assert_allclose(a[:, targets], b, atol=1e-8)
    exponents = law.exponents_[np.ix_(targets, domains)]
    np.testing.assert_allclose(other.exponents_, exponents, atol=1e-8)


def test_missing_losses_a_constant_target_and_a_single_one():
    X, Y, truth = world(n=80)
    Y[:20, 0] = np.nan
    Y[:, 2] = 3.0
    law, Z = ExponentialLaw().fit(X, Y), simplex(4, 20, 4)
    assert np.abs(law.predict(Z) - truth(Z))[:, :2].max() < 0.05
    assert (law.predict(Z)[:, 2] == 3).all() and np.isnan(law.floor_[2])
    alone = ExponentialLaw().fit(X, Y[:, 1])
    np.testing.assert_allclose(alone.predict(Z), law.predict(Z)[:, 1], atol=1e-8)


def test_a_domain_that_no_run_varied():
    X, Y, truth = world()
    padded = np.insert(X * 0.8, 2, 0.2, axis=1)
    with pytest.warns(UserWarning, match="No run varied 2"):
        law = ExponentialLaw().fit(padded, Y)
    assert np.abs(law.predict(padded) - truth(X)).max() < 0.05
    assert np.isnan(law.exponents_[:, 2]).all() and (law.gradient(padded)[:, :, 2] == 0).all()


def test_losses_have_a_positive_floor_and_differences_any():
    X = simplex(0, 60, 3)
    steep = np.exp(0.3 + X @ [1.0, -1.0, 0.5])  # c = 0, below which noise would put it
    law = ExponentialLaw().fit(X, steep - 0.2)
    assert law.floor_[0] == 0 and np.abs(law.predict(X) - steep + 0.2).max() < 0.1
    law = ExponentialLaw().fit(X, steep - 2)
    assert law.floor_[0] < -1 and np.abs(law.predict(X) - steep + 2).max() < 0.02


def test_losses_in_other_units():
    X, Y, _ = world(noise=0.03)
    law = ExponentialLaw().fit(X, Y)
    Z = simplex(4, 20, 4)
    for unit in (1e-3, 1e3):
        other = ExponentialLaw(huber=0.02 * unit).fit(X, unit * Y)
        np.testing.assert_allclose(other.predict(Z) / unit, law.predict(Z), atol=2e-3)


@pytest.mark.parametrize("extra", [2, 6, 20])
def test_few_runs_do_not_explode(extra):
    for seed in range(4):
        k = 8
        rng = np.random.default_rng(seed)
        X, w = simplex(seed, k + extra, k, 0.4), np.exp(rng.normal(-1, 1, k))
        Y = 1.5 + (0.1 + X**0.7 @ w) ** -0.5 + 0.05 * rng.normal(size=len(X))
        law = ExponentialLaw().fit(X, Y)
        far = np.vstack([np.eye(k), simplex(seed, 200, k, 0.1)])
        assert law.predict(far).max() < Y.max() + 2.5 * np.ptp(Y)
        assert law.predict(far).min() >= 0
        low, high = law.interval(far)
        assert (high - low).max() < 12 * np.ptp(Y)


def test_the_papers_fit_does_explode():
    # Else the ceiling would have nothing to do, and the test before it could not fail
    X = simplex(0, 12, 8)
    Y = 2 + 0.2 * np.random.default_rng(0).normal(size=(12, 3))
    assert ExponentialLaw(ridge=0).fit(X, Y).predict(np.eye(8)).max() > 20
    assert ExponentialLaw().fit(X, Y).predict(np.eye(8)).max() < 5


def test_a_run_that_diverged_bends_little():
    X, Y, truth = world(n=60, noise=0.02)
    Y[5] += 30
    law, Z = ExponentialLaw().fit(X, Y), simplex(4, 50, 4)
    assert np.abs(law.predict(Z) - truth(Z)).max() < 0.15
    assert law.noise_.max() < 0.1
    assert np.abs(ExponentialLaw(huber=None).fit(X, Y).predict(Z) - truth(Z)).max() > 0.5


@pytest.mark.parametrize("seeds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_intervals_cover(seeds):
    for noise in (0.005, 0.1):  # within Huber's quadratic part, and beyond it
        inside = []
        for seed in range(seeds):
            X, Y, truth = world(seed, n=50, noise=noise)
            rng = np.random.default_rng(seed + 99)
            Z = simplex(seed + 50, 50, 4)
            new = truth(Z) + noise * rng.normal(size=(50, 3))
            low, high = ExponentialLaw().fit(X, Y).interval(Z)
            inside.append(((low < new) & (new < high)).mean())
        assert 0.84 < np.mean(inside) < 0.96


def test_draws_spread_as_the_deviations_say():
    X, Y, _ = world(n=20, noise=0.1)
    law, Z = ExponentialLaw().fit(X, Y), np.vstack([simplex(8, 5, 4), np.eye(4)])
    drawn = law.draws(Z, 4000)
    spread = np.sqrt(law.predict(Z, return_std=True)[1] ** 2 - law.noise_**2)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.06)


def test_duplicated_runs():
    X, Y, truth = world(n=12, noise=0.0)
    rng = np.random.default_rng(0)
    many = np.repeat(Y, 6, 0) + 0.05 * rng.normal(size=(72, 3))
    law = ExponentialLaw().fit(np.repeat(X, 6, 0), many)
    np.testing.assert_allclose(law.noise_, 0.05, rtol=0.3)
    once, twice = (
        ExponentialLaw().fit(X, Y),
        ExponentialLaw().fit(np.tile(X, (2, 1)), np.tile(Y, (2, 1))),
    )
    assert np.abs(once.predict(X) - twice.predict(X)).max() < 0.03


def test_it_orders_curves_that_are_not_its_own():
    rng = np.random.default_rng(0)
    X, w = simplex(0, 100, 8, 0.5), np.exp(rng.normal(-1, 1.5, 8))
    Z = simplex(1, 200, 8, 0.5)

    def truth(X):
        return 2 + (0.2 + X**0.8 @ w) ** -0.5

    assert spearmanr(ExponentialLaw().fit(X, truth(X)).predict(Z), truth(Z))[0] > 0.95


def test_refusals():
    X, Y, _ = world(n=5)
    with pytest.raises(ValueError, match="5 parameters .* 6 runs or more; target . has 5.*Effec"):
        ExponentialLaw().fit(X, Y)
    X, Y, _ = world(n=6)
    ExponentialLaw().fit(X, Y)
    Y[0, 1] = np.nan
    with pytest.raises(ValueError, match="ExponentialLaw has 5 .*target 1 has 5"):
        ExponentialLaw().fit(X, Y)
    for options, named in (
        ({"huber": 0}, "`huber` must be above 0"),
        ({"ridge": -1}, "`ridge` must be 0 or more"),
        ({"starts": 0}, "`starts` must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=named):
            ExponentialLaw(**options).fit(*world()[:2])
