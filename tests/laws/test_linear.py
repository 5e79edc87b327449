import numpy as np
import pytest

from llmmix.laws.linear import LinearDynamicLaw, LinearLaw, LogLinearLaw

LAWS = [LinearLaw, LogLinearLaw, LinearDynamicLaw, lambda: LinearDynamicLaw(ridge=0.05)]


class Table:
    """As much of a data frame as a law looks at."""

    def __init__(self, values, columns):
        self.values, self.columns = np.asarray(values), columns

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)

    @property
    def shape(self):
        return self.values.shape

    @property
    def ndim(self):
        return self.values.ndim


def world(seed=0, n=40, k=5, m=3, noise=0.05):
    rng = np.random.default_rng(seed)
    X, beta = rng.dirichlet(np.ones(k), n), rng.uniform(1, 4, (m, k))
    return X, X @ beta.T + noise * rng.normal(size=(n, m)), beta


def simplex(seed, n, k):
    return np.random.default_rng(seed).dirichlet(np.ones(k), n)


def test_the_closed_form():
    X, Y, _ = world()
    law = LinearLaw().fit(X, Y)
    beta, rss, rank, _ = np.linalg.lstsq(X, Y, rcond=None)
    sigma = np.sqrt(rss / (len(X) - rank))
    np.testing.assert_allclose(law.coefficients_, beta.T, atol=1e-10)
    np.testing.assert_allclose(law.noise_, sigma, rtol=1e-10)
    inverse = np.linalg.inv(X.T @ X)
    errors = sigma[:, None] * np.sqrt(inverse.diagonal())
    np.testing.assert_allclose(law.coefficient_errors_, errors, rtol=1e-8)
    Z = simplex(1, 7, 5)
    values, std = law.predict(Z, return_std=True)
    np.testing.assert_allclose(values, Z @ beta, atol=1e-10)
    leverage = np.einsum("nk,kl,nl->n", Z, inverse, Z)[:, None]
    np.testing.assert_allclose(std, sigma * np.sqrt(1 + leverage), rtol=1e-8)


def test_the_closed_form_of_the_logarithm():
    X, Y, _ = world()
    law = LogLinearLaw().fit(X, Y)
    beta = np.linalg.lstsq(X, np.log(Y), rcond=None)[0]
    np.testing.assert_allclose(law.coefficients_, beta.T, atol=1e-10)
    np.testing.assert_allclose(law.predict(np.eye(5)), np.exp(beta), rtol=1e-10)
    rss = ((Y - np.exp(X @ beta)) ** 2).sum(0)
    np.testing.assert_allclose(law.noise_, np.sqrt(rss / 35), rtol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_closed_form_of_a_round(ridge):
    X, Y, _ = world(m=2)
    law = LinearDynamicLaw(ridge).fit(X, -Y)
    gram = X.T @ X + ridge * np.eye(5)
    A = np.linalg.solve(gram, X.T @ Y)
    np.testing.assert_allclose(law.matrix_, A.T, atol=1e-10)
    np.testing.assert_allclose(law.predict(X), -X @ A, atol=1e-10)
    dof = 40 - np.trace(np.linalg.solve(gram, X.T @ X))
    sigma = np.sqrt(((Y - X @ A) ** 2).sum(0) / dof)
    errors = sigma[:, None] * np.sqrt(np.linalg.inv(gram).diagonal())
    np.testing.assert_allclose(law.noise_, sigma, rtol=1e-8)
    np.testing.assert_allclose(law.matrix_errors_, errors, rtol=1e-8)


def test_a_round_names_targets_by_row_and_domains_by_column():
    A = np.array([[0.3, 0.1, -0.2], [0.0, 0.5, 0.4]])
    X = simplex(3, 12, 3)
    law = LinearDynamicLaw().fit(Table(X, ["c", "a", "b"]), Table(-X @ A.T, ["y", "x"]))
    np.testing.assert_allclose(law.matrix_, A, atol=1e-12)
    assert law.targets_ == ["y", "x"] and law.domains_ == ["c", "a", "b"]
    assert law.best_mixture("y") == pytest.approx([1, 0, 0], abs=1e-6)
    assert law.best_mixture("x") == pytest.approx([0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("make", LAWS)
def test_slopes_are_those_of_the_predictions(make):
    X, Y, _ = world()
    law, Z = make().fit(X, Y), simplex(5, 4, 5)
    for j in range(4):
        step = np.zeros(5)
        step[j], step[j + 1] = 1e-6, -1e-6
        slope = law.gradient(Z) @ step / 1e-6
        found = (law.predict(Z + step) - law.predict(Z - step)) / 2e-6
        np.testing.assert_allclose(found, slope, atol=1e-6)


@pytest.mark.parametrize("make", LAWS)
def test_order_changes_nothing(make):
    X, Y, _ = world(m=4)
    Y[3, 1] = Y[7, 2] = np.nan
    rng, Z = np.random.default_rng(2), simplex(9, 6, 5)
    runs, domains, targets = rng.permutation(40), rng.permutation(5), rng.permutation(4)
    law = make().fit(X, Y)
    other = make().fit(X[np.ix_(runs, domains)], Y[np.ix_(runs, targets)])
    for a, b in zip(
        law.predict(Z, return_std=True), other.predict(Z[:, domains], return_std=True), strict=True
    ):
        np.testing.assert_allclose(a[:, targets], b, atol=1e-10)
    name = "matrix_" if isinstance(law, LinearDynamicLaw) else "coefficients_"
    expected = getattr(law, name)[np.ix_(targets, domains)]
    np.testing.assert_allclose(getattr(other, name), expected, atol=1e-10)


def test_a_missing_loss_costs_its_target_alone():
    X, Y, _ = world()
    whole, Y[:4, 1] = LinearLaw().fit(X, Y), np.nan
    law, rest = LinearLaw().fit(X, Y), LinearLaw().fit(X[4:], Y[4:, 1])
    Z = simplex(4, 5, 5)
    np.testing.assert_allclose(law.predict(Z)[:, 0], whole.predict(Z)[:, 0], atol=1e-10)
    np.testing.assert_allclose(law.predict(Z)[:, 1], rest.predict(Z), atol=1e-10)
    assert np.abs(law.predict(Z) - whole.predict(Z))[:, 1].max() > 1e-4


@pytest.mark.parametrize("make", LAWS)
def test_a_single_target_a_constant_one_and_a_vertex(make):
    X, Y, _ = world(m=2)
    Y[:, 1] = 2.5
    law = make().fit(X, Y)
    assert law.constant_ == [1] and law.noise_[1] == 0
    assert (law.predict(np.eye(5))[:, 1] == 2.5).all()
    alone = make().fit(X, Y[:, 0])
    np.testing.assert_allclose(alone.predict(np.eye(5)), law.predict(np.eye(5))[:, 0], atol=1e-10)


def test_tables_of_what_never_moved():
    X = simplex(0, 9, 3)
    law = LinearDynamicLaw().fit(X, np.full((9, 2), -0.25))
    np.testing.assert_allclose(law.matrix_, 0.25)
    np.testing.assert_allclose(LinearLaw().fit(X, np.full(9, 3.0)).coefficients_, 3.0)


def test_a_domain_that_no_run_varied():
    X, Y, beta = world(noise=0.0)
    padded = np.insert(X, 2, 0.0, axis=1)
    with pytest.warns(UserWarning, match="No run varied 2"):
        law = LinearDynamicLaw().fit(padded, -Y)
    assert np.isnan(law.matrix_[:, 2]).all() and np.isnan(law.matrix_errors_[:, 2]).all()
    np.testing.assert_allclose(np.delete(law.matrix_, 2, 1), beta, atol=1e-10)
    half = np.insert(X / 2, 2, 0.5, axis=1)
    with pytest.warns(UserWarning, match="No run varied 2"):
        linear = LinearLaw().fit(half, Y)
    np.testing.assert_allclose(linear.predict(half), Y, atol=1e-10)
    found = np.delete(linear.coefficients_, 2, 1)
    np.testing.assert_allclose(np.delete(half, 2, 1) @ found.T, Y, atol=1e-10)


@pytest.mark.parametrize("make", [LinearLaw, LogLinearLaw, LinearDynamicLaw])
def test_collinear_runs(make):
    X, Y, _ = world()
    X = np.column_stack([X[:, :3] / 2, X[:, :3] / 2])
    X /= X.sum(1, keepdims=True)
    law = make().fit(X, Y)
    np.testing.assert_allclose(law.predict(X), make().fit(X[:, :3] * 2, Y).predict(X[:, :3] * 2))
    vertices, std = law.predict(np.eye(6), return_std=True)
    np.testing.assert_allclose(vertices[:3], vertices[3:], atol=1e-9)  # nothing tells them apart
    _, known = law.predict((np.eye(6)[:3] + np.eye(6)[3:]) / 2, return_std=True)
    assert (std[:3] > 1.2 * known).all()


def test_duplicated_runs():
    X, Y, _ = world()
    law, twice = LinearLaw().fit(X, Y), LinearLaw().fit(np.tile(X, (2, 1)), np.tile(Y, (2, 1)))
    np.testing.assert_allclose(law.coefficients_, twice.coefficients_, atol=1e-10)
    same = np.repeat(X[:8], 5, 0)  # 8 mixtures with five losses each: noise, and no failure
    assert LinearLaw().fit(same, Y).noise_.min() > 0.2


@pytest.mark.parametrize("make", LAWS)
@pytest.mark.parametrize("n", [12, 100])
def test_intervals_cover(make, n):
    inside = []
    for seed in range(30):
        X, Y, beta = world(seed, n, noise=0.0)
        rng = np.random.default_rng(seed + 1000)
        Z = rng.dirichlet(np.ones(5), 20)
        truth = Z @ beta.T
        if make is LogLinearLaw:
            Y, truth = np.exp(Y / 4), np.exp(truth / 4)
        law = make().fit(X, Y + 0.1 * rng.normal(size=Y.shape))
        low, high = law.interval(Z)
        new = truth + 0.1 * rng.normal(size=truth.shape)
        inside.append(((low < new) & (new < high)).mean())
    # With 12 runs the noise itself is known to a quarter of it
    assert (0.82 if n == 12 else 0.87) < np.mean(inside) < 0.94


@pytest.mark.parametrize("make", LAWS)
def test_draws_spread_as_the_deviations_say(make):
    X, Y, _ = world()
    law, Z = make().fit(X, Y), simplex(8, 6, 5)
    drawn = law.draws(Z, 4000)
    spread = np.sqrt(law.predict(Z, return_std=True)[1] ** 2 - law.noise_**2)
    np.testing.assert_allclose(drawn.mean(0), law.predict(Z), atol=0.01)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.06)
    assert (drawn == law.draws(Z, 4000)).all()


def test_as_many_runs_as_parameters():
    X, Y, beta = world(n=5, noise=0.0)
    law = LinearLaw().fit(X, Y)
    np.testing.assert_allclose(law.coefficients_, beta, atol=1e-8)
    np.testing.assert_allclose(law.noise_, Y.std(0))  # nothing is left to tell it by


def test_refusals():
    X, Y, _ = world(n=4)
    with pytest.raises(ValueError, match="LinearLaw has 5 parameters.* 5 runs.* has 4.*Effective"):
        LinearLaw().fit(X, Y)
    with pytest.raises(ValueError, match="LinearDynamicLaw has 5 parameters"):
        LinearDynamicLaw().fit(X, -Y)
    assert np.isfinite(LinearDynamicLaw(ridge=0.1).fit(X, -Y).matrix_errors_).all()
    X, Y, _ = world()
    gaps = Y.copy()
    gaps[:37, 1] = np.nan
    with pytest.raises(ValueError, match="target code has 3"):
        LinearLaw().fit(X, Table(gaps, ["a", "code", "b"]))
    Y[5, 2] = -0.5
    with pytest.raises(ValueError, match="of web are as low as -0.5, .*LinearLaw"):
        LogLinearLaw().fit(X, Table(Y, ["a", "b", "web"]))
    with pytest.raises(ValueError, match="`ridge` must be 0 or more, got -1"):
        LinearDynamicLaw(ridge=-1).fit(X, Y)
