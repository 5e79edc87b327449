import numpy as np
import pytest
from scipy.optimize import minimize

from llmmix.laws.search import MU, minimize_mixture, sample_mixture
from llmmix.laws.simplex import project


def starts_of(rng, lower, upper, count=6):
    return project(rng.dirichlet(np.ones(len(lower)), count), lower, upper)


def random_bounds(rng, k):
    lower = rng.uniform(0, 0.8 / k, k)
    upper = np.minimum(1, lower + rng.uniform(0.4, 5, k) / k)
    return lower, np.maximum(upper, 1.2 / k)


def linear(c):
    return (lambda p: p @ c + 3), (lambda p: np.broadcast_to(c, p.shape).copy())


def logarithmic(u):
    def value(p):
        with np.errstate(divide="ignore"):
            return -np.log(p) @ u

    def slope(p):
        with np.errstate(divide="ignore"):
            return -u / p

    return value, slope


def effective_data(rng, k, spread=1.5, linear_term=0.0):
    """B (s + sum w p^a)^-b summed over targets: its slope is infinite where a share is 0."""
    targets = 6
    b, s = rng.uniform(0.1, 1, targets), np.exp(rng.normal(-2.5, 0.5, targets))
    w, a = np.exp(rng.normal(-1.5, spread, (targets, k))), rng.uniform(0.2, 0.97, k)
    signed = linear_term * rng.normal(size=k)

    def value(p):
        return ((s + p**a @ w.T) ** -b).mean(1) + p @ signed + 2

    def slope(p):
        outer = -b * (s + p**a @ w.T) ** (-b - 1) / targets
        with np.errstate(divide="ignore"):
            return outer @ w * a * p ** (a - 1) + signed

    return value, slope


def exponentials(rng, k):
    t, c = rng.normal(0, 3, (5, k)), rng.dirichlet(np.ones(5))
    return (lambda p: np.exp(p @ t.T) @ c), (lambda p: (np.exp(p @ t.T) * c) @ t)


def assert_feasible(p, lower, upper):
    assert abs(p.sum() - 1) < 1e-9
    assert (p >= lower - 1e-9).all() and (p <= upper + 1e-9).all() and (p >= 0).all()


def greedy(c, lower, upper):
    p = lower.copy()
    for j in np.argsort(c):
        p[j] += min(upper[j] - lower[j], 1 - p.sum())
    return p


@pytest.mark.parametrize("k", [2, 5, 17])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_linear_law_ends_exactly_in_its_vertex(k, size):
    rng = np.random.default_rng([k, int(size)])
    c = rng.normal(size=k) * size
    lower, upper = np.zeros(k), np.ones(k)
    found = minimize_mixture(*linear(c), lower, upper, starts_of(rng, lower, upper))
    np.testing.assert_array_equal(found.mixture, np.eye(k)[c.argmin()])
    assert found.converged
    assert found.at_bounds == tuple(j for j in range(k) if j != c.argmin())


@pytest.mark.parametrize("k", [2, 5, 17])
def test_linear_law_under_caps_fills_the_best_first(k):
    rng = np.random.default_rng(k)
    for _ in range(3):
        c = rng.normal(size=k)
        lower, upper = random_bounds(rng, k)
        found = minimize_mixture(*linear(c), lower, upper, starts_of(rng, lower, upper))
        np.testing.assert_allclose(found.mixture, greedy(c, lower, upper), atol=1e-12)
        assert len(found.at_bounds) >= k - 1 and found.converged


def test_a_tie_is_shared_and_a_constant_law_ends_in_the_middle():
    lower, upper = np.zeros(4), np.ones(4)
    starts = starts_of(np.random.default_rng(0), lower, upper)
    found = minimize_mixture(*linear(np.array([1.0, 0.0, 2.0, 0.0])), lower, upper, starts)
    np.testing.assert_allclose(found.mixture, [0, 0.5, 0, 0.5], atol=1e-6)
    found = minimize_mixture(*linear(np.zeros(4)), lower, upper, starts)
    np.testing.assert_allclose(found.mixture, 0.25, atol=1e-6)


@pytest.mark.parametrize("k", [2, 6, 17])
def test_weighted_logarithms_end_at_their_weights(k):
    u = np.random.default_rng(k).dirichlet(np.full(k, 0.5)) + 1e-4
    u /= u.sum()
    lower, upper = np.zeros(k), np.ones(k)
    starts = np.vstack([np.eye(k), np.full(k, 1 / k)])  # the vertices are worth +inf
    found = minimize_mixture(*logarithmic(u), lower, upper, starts)
    np.testing.assert_allclose(found.mixture, u, atol=1e-9)
    assert found.converged and found.at_bounds == ()


def test_weighted_logarithms_under_bounds_fill_like_water():
    u = np.array([0.5, 0.3, 0.15, 0.05])
    lower, upper = np.array([0.0, 0.0, 0.0, 0.1]), np.array([0.3, 1.0, 1.0, 1.0])
    found = minimize_mixture(*logarithmic(u), lower, upper, np.full((1, 4), 0.25))
    # KKT: 0.3 and 0.1 at their bounds, the remaining 0.6 in proportion 0.3 : 0.15
    np.testing.assert_allclose(found.mixture, [0.3, 0.4, 0.2, 0.1], atol=1e-9)
    assert found.at_bounds == (0, 3)


@pytest.mark.parametrize("k", [2, 7, 30])
def test_separable_quadratic_is_a_projection(k):
    rng = np.random.default_rng(k)
    for _ in range(3):
        c = rng.normal(size=k) / 2
        lower, upper = random_bounds(rng, k)
        found = minimize_mixture(
            lambda p, c=c: 1.5 * ((p - c) ** 2).sum(1),
            lambda p, c=c: 3 * (p - c),
            lower,
            upper,
            starts_of(rng, lower, upper, 3),
        )
        np.testing.assert_allclose(found.mixture, project(c, lower, upper), atol=1e-8)


@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_sum_of_powers_by_its_kkt_condition(size):
    # min -sum w p^a: w a p^(a-1) is the same everywhere, so p ~ w^(1/(1-a)), here down to 1e-9
    a, expected = 0.7, np.array([1.0, 0.5, 1e-4, 1e-9])
    w = size * expected ** (1 - a)
    expected = expected / expected.sum()

    def slope(p):
        with np.errstate(divide="ignore"):
            return -w * a * p ** (a - 1)

    starts = np.eye(4)
    found = minimize_mixture(lambda p: 3 - (p**a) @ w, slope, np.zeros(4), np.ones(4), starts)
    np.testing.assert_allclose(found.mixture, expected, atol=1e-8)
    # The last share tells on the value no more than rounding does, and is still no 0
    assert found.mixture[3] == pytest.approx(expected[3], rel=0.1) and found.converged


LAWS = {
    "effective data": effective_data,
    "peaked": lambda rng, k: effective_data(rng, k, spread=4.0),
    "flat": lambda rng, k: effective_data(rng, k, spread=0.05),
    "harmful": lambda rng, k: effective_data(rng, k, linear_term=1.0),
    "exponentials": exponentials,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("bounded", [False, True])
def test_no_sampled_mixture_is_better(law, k, bounded):
    rng = np.random.default_rng([k, bounded, *map(ord, law)])
    value, slope = LAWS[law](rng, k)
    lower, upper = random_bounds(rng, k) if bounded else (np.zeros(k), np.ones(k))
    starts = starts_of(rng, lower, upper)
    found = minimize_mixture(value, slope, lower, upper, starts)
    assert_feasible(found.mixture, lower, upper)
    assert found.converged
    assert found.value == pytest.approx(value(found.mixture[None])[0], abs=1e-14)
    near = found.mixture + rng.normal(size=(4000, k)) * 10.0 ** rng.uniform(-6, -1, (4000, 1))
    far = rng.dirichlet(np.full(k, 0.5), 4000)
    others = project(np.vstack([near, far, np.eye(k), starts]), lower, upper)
    assert found.value <= value(others).min() + 1e-12
    # Nor is it better for a bound that this left out: some of the samples come close to it
    assert value(others).min() - found.value < 1e-5


@pytest.mark.parametrize("law", LAWS)
def test_slsqp_finds_nothing_better(law):
    rng = np.random.default_rng(len(law))
    k = 12
    value, slope = LAWS[law](rng, k)
    lower, upper = np.full(k, 1e-5), np.full(k, 0.4)
    starts = starts_of(rng, lower, upper, 4)
    found = minimize_mixture(value, slope, lower, upper, starts)
    rivals = [
        minimize(
            lambda p: value(p[None])[0],
            start,
            jac=lambda p: slope(p[None])[0],
            method="SLSQP",
            bounds=np.stack([lower, upper], 1),
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            options={"ftol": 1e-12, "maxiter": 300},
        ).x
        for start in starts
    ]
    rival = value(project(np.array(rivals), lower, upper)).min()
    assert found.value <= rival + 1e-12
    assert rival - found.value < 1e-5


@pytest.mark.parametrize("law", [*LAWS, "linear"])
@pytest.mark.parametrize("k", [3, 17])
def test_the_order_of_the_domains_decides_nothing(law, k):
    rng = np.random.default_rng([k, *map(ord, law)])
    value, slope = linear(rng.normal(size=k)) if law == "linear" else LAWS[law](rng, k)
    lower, upper = random_bounds(rng, k) if k == 17 else (np.zeros(k), np.ones(k))
    starts, order = starts_of(rng, lower, upper, 4), rng.permutation(k)
    back = np.argsort(order)
    found = minimize_mixture(value, slope, lower, upper, starts)
    again = minimize_mixture(
        lambda p: value(p[:, back]),
        lambda p: slope(p[:, back])[:, order],
        lower[order],
        upper[order],
        starts[:, order],
    )
    np.testing.assert_allclose(again.mixture, found.mixture[order], atol=1e-7)
    assert {int(order[j]) for j in again.at_bounds} == set(found.at_bounds)
    same = minimize_mixture(value, slope, lower, upper, starts)
    np.testing.assert_array_equal(same.mixture, found.mixture)


@pytest.mark.parametrize("seed", range(5, 25))
def test_equal_domains_get_equal_shares(seed):
    rng = np.random.default_rng(seed)
    value, slope = effective_data(rng, 3)
    # Domain 3 is a second copy of 2: the law sees the mean of what the two hold
    glued = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1.0]])
    found = minimize_mixture(
        lambda p: value(p @ glued),
        lambda p: slope(p @ glued) @ glued.T,
        np.zeros(4),
        np.ones(4),
        rng.dirichlet(np.ones(4), 5),
    )
    alone = minimize_mixture(value, slope, np.zeros(3), np.ones(3), rng.dirichlet(np.ones(3), 5))
    assert found.value == pytest.approx(alone.value, abs=1e-12)
    np.testing.assert_allclose(found.mixture @ glued, alone.mixture, atol=1e-7)
    # Between the copies the law is flat, and the barrier alone, of curvature mu / share^2, pulls to
    # the middle: against the rounding of the slope, which differs from one BLAS to another
    share = found.mixture[2:].mean()
    rounding = np.finfo(float).eps * np.abs(slope(found.mixture[None] @ glued)).max()
    assert np.ptp(found.mixture[2:]) <= 8 * rounding * share**2 / MU[-1] + 1e-9


def test_local_minima_are_told_apart():
    centres, depths = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]), [1.0, 1.2, 1.1]

    def bumps(p):
        away = p[:, None] - centres
        return away, np.exp(-(away**2).sum(-1) / 0.08) * depths

    def slope(p):
        away, height = bumps(p)
        return np.einsum("nt,ntk->nk", height, away) / 0.04

    def value(p):
        return -bumps(p)[1].sum(1)

    grid = np.random.default_rng(0).dirichlet(np.ones(3), 12)
    found = minimize_mixture(value, slope, np.zeros(3), np.ones(3), grid)
    np.testing.assert_allclose(found.mixture, centres[1], atol=1e-3)
    assert found.converged


def test_concave_law_ends_in_its_best_vertex():
    c = np.array([0.2, 0.5, 0.3, 0.1, 0.4])
    found = minimize_mixture(
        lambda p: -(p**2) @ c, lambda p: -2 * p * c, np.zeros(5), np.ones(5), np.full((1, 5), 0.2)
    )
    np.testing.assert_array_equal(found.mixture, np.eye(5)[1])


def test_fixed_shares_stay():
    value, slope = effective_data(np.random.default_rng(2), 5)
    lower, upper = np.array([0.2, 0, 0, 0.1, 0]), np.array([0.2, 1, 1, 0.1, 0])
    found = minimize_mixture(value, slope, lower, upper, np.full((2, 5), 0.2))
    assert_feasible(found.mixture, lower, upper)
    grid = np.zeros((20001, 5)) + lower
    grid[:, 1] = np.linspace(0, 0.7, 20001)
    grid[:, 2] = 0.7 - grid[:, 1]
    best = value(grid).min()
    assert best - 1e-6 < found.value <= best
    assert {0, 3, 4} <= set(found.at_bounds)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ([0.3, 0.7], [0.3, 0.7]),
        ([0.3, 0.0], [0.3, 1.0]),
        ([0.3, 0.7], [1.0, 1.0]),
        ([0.0, 0.0], [0.3, 0.7]),
    ],
)
def test_a_single_feasible_mixture_is_found(lower, upper):
    value, slope = effective_data(np.random.default_rng(0), 2)
    found = minimize_mixture(value, slope, np.array(lower), np.array(upper), np.array([[0.5, 0.5]]))
    np.testing.assert_allclose(found.mixture, [0.3, 0.7], atol=1e-12)
    assert found.value == pytest.approx(value(np.array([[0.3, 0.7]]))[0])


def test_a_law_of_no_number_or_bad_starts_are_refused():
    box = np.zeros(2), np.ones(2)
    nan = (lambda p: np.full(len(p), np.nan)), (lambda p: np.full(p.shape, np.nan))
    with pytest.raises(ValueError, match="`slope` must be finite inside"):
        minimize_mixture(*nan, *box, np.full((1, 2), 0.5))
    with pytest.raises(ValueError, match="`value` must be finite somewhere"):
        minimize_mixture(nan[0], linear(np.arange(2.0))[1], *box, np.full((1, 2), 0.5))
    for starts in (np.zeros((0, 2)), np.full((1, 3), 1 / 3)):
        with pytest.raises(ValueError, match=r"`starts` must be \(s, 2\)"):
            minimize_mixture(*linear(np.arange(2.0)), *box, starts)


def test_sampling_is_the_mean_of_the_best_draws():
    c = np.array([0.3, 0.1, 0.2, 0.0])
    prior = np.array([0.5, 0.3, 0.2, 0.0])
    found = sample_mixture(
        linear(c)[0], np.zeros(4), np.ones(4), prior, candidates=5000, top=20, seed=3
    )
    drawn = np.random.default_rng(3).dirichlet(prior[:3], 5000)
    best = drawn[np.argsort(drawn @ c[:3])[:20]].mean(0)
    np.testing.assert_allclose(found.mixture, [*best, 0], atol=1e-12)
    assert found.mixture[3] == 0 and 3 in found.at_bounds
    assert found.converged and "5000 of them within" in found.method
    assert found.value == pytest.approx(found.mixture @ c + 3)


def test_sampling_keeps_to_the_bounds():
    rng = np.random.default_rng(0)
    value, _ = effective_data(rng, 6)
    prior = np.array([0.4, 0.3, 0.2, 0.05, 0.05, 0])
    lower, upper = np.zeros(6), np.array([0.6, 0.5, 0.5, 0.5, 0.5, 1])
    found = sample_mixture(value, lower, upper, prior, candidates=4000, top=16)
    assert_feasible(found.mixture, lower, upper)
    assert found.converged and "projected" not in found.method
    tight = np.array([0.15, 0.2, 0.3, 0.3, 0.3, 1.0])  # hardly a draw lies within
    found = sample_mixture(value, lower, tight, prior, candidates=500, top=64)
    assert_feasible(found.mixture, lower, tight)
    assert found.mixture[5] == 0 and not found.converged and "projected" in found.method


def test_sampling_refuses():
    value = linear(np.arange(3.0))[0]
    box = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match=r"`prior` is 0 for domains \[2\]"):
        sample_mixture(value, np.array([0, 0, 0.1]), np.ones(3), np.array([0.5, 0.5, 0]))
    with pytest.raises(ValueError, match=r"`prior` is 0 for domains \[2\]"):
        sample_mixture(value, np.zeros(3), np.array([0.4, 0.4, 1]), np.array([0.5, 0.5, 0]))
    with pytest.raises(ValueError, match=r"`prior` must lie in .* got \{1: nan\}"):
        sample_mixture(value, *box, np.array([0.5, np.nan, 0]))
    with pytest.raises(ValueError, match="`top` must lie between 1 and 10"):
        sample_mixture(value, *box, np.ones(3) / 3, candidates=10, top=11)
