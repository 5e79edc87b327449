import numpy as np
import pytest

from llmmix.laws import EffectiveDataLaw
from llmmix.laws.design import _greedy, next_mixtures
from llmmix.laws.law import Law


class BayesLinear(Law):
    """L_i = sum_j B_ij p_j, B ~ N(0, 1), known noise: all that a design predicts has a formula."""

    def __init__(self, noise=0.1):
        self.noise = noise

    def _fit(self, X, Y):
        self.precision = X.T @ X / self.noise**2 + np.eye(X.shape[1])
        self.B = np.linalg.solve(self.precision, X.T @ Y / self.noise**2)
        return np.full(Y.shape[1], self.noise)

    def _predict(self, X):
        return X @ self.B

    def _gradient(self, X):
        return np.broadcast_to(self.B.T, (len(X), *self.B.T.shape)).copy()

    def _draws(self, X, count, rng):
        root = np.linalg.cholesky(np.linalg.inv(self.precision))
        off = root @ rng.standard_normal((count, *self.B.shape))
        return X @ (self.B + off)


def world(seed=0, n=20, k=6, m=3):
    rng = np.random.default_rng(seed)
    worth = np.exp(rng.normal(-1, 1.2, (m, k)))
    X = rng.dirichlet(np.ones(k), n)

    def losses(X, noise=0.01):
        return 2 + (0.05 + X**0.6 @ worth.T) ** -0.5 + noise * rng.normal(size=(len(X), m))

    return X, losses(X)


@pytest.fixture(scope="module")
def law():
    return EffectiveDataLaw().fit(*world())


def options(**given):
    return {"draws": 150, "candidates": 500, **given}


def deviations_left(law, batches, seed=5):
    """Of what the best mixtures differ by, after each batch of runs, all conditioned at once."""
    rng = np.random.default_rng(seed)
    k, size = law.mixtures_.shape[1], len(batches[0])
    near = rng.dirichlet(50 * law.best_mixture() + 0.05, 200)
    region = np.vstack([rng.dirichlet(np.ones(k), 200), near])
    f = law.draws(np.vstack([region, *batches]), 400, seed).mean(2)
    votes = np.bincount(f[:, :400].argmin(1), minlength=400) / 400
    g = f[:, :400] - (f[:, :400] @ votes)[:, None]
    g = g - g.mean(0)
    noise = (law.noise_**2).sum() / len(law.noise_) ** 2
    left = []
    for at in range(400, f.shape[1], size):
        seen = f[:, at : at + size] - f[:, at : at + size].mean(0)
        cross = g.T @ seen / 399
        gram = seen.T @ seen / 399 + noise * np.eye(size)
        explained = np.einsum("rc,cr->r", cross, np.linalg.solve(gram, cross.T))
        left.append(np.sqrt(votes @ (g.var(0, ddof=1) - explained)))
    return left


def test_it_teaches_more_than_random_runs(law):
    design = next_mixtures(law, 5, **options())
    rng = np.random.default_rng(1)
    random = [rng.dirichlet(np.ones(6), 5) for _ in range(20)]
    chosen, *at_random = deviations_left(law, [design.mixtures, *random])
    assert chosen < min(at_random)
    assert chosen < 0.8 * np.median(at_random)


def test_what_it_promises_is_what_conditioning_on_all_runs_at_once_gives():
    rng = np.random.default_rng(3)
    X = rng.dirichlet(np.ones(4), 12)
    law = BayesLinear().fit(X, X @ rng.normal(size=(4, 2)) + 0.1 * rng.normal(size=(12, 2)))
    design = next_mixtures(law, 3, draws=4000, candidates=300)
    assert design.before > design.after[0] > design.after[1] > design.after[2] > 0
    # The posterior without draws: the ratio must be that of what is left of the same contrasts
    order = law._domains
    S = np.linalg.inv(law.precision) / 2  # of the mean of two targets
    D = design.mixtures[:, order]
    left = S - S @ D.T @ np.linalg.solve(D @ S @ D.T + 0.1**2 / 2 * np.eye(3), D @ S)
    corners = np.eye(4)
    best = (law.B.mean(1) + rng.multivariate_normal(np.zeros(4), S, 20000)).argmin(1)
    w = np.bincount(best, minlength=4) / 20000
    contrasts = corners - w
    ratio = np.sqrt(
        w
        @ np.einsum("ri,ij,rj->r", contrasts, left, contrasts)
        / (w @ np.einsum("ri,ij,rj->r", contrasts, S, contrasts))
    )
    assert design.after[-1] / design.before == pytest.approx(ratio, rel=0.15)
    assert np.allclose(design.std, np.sqrt(np.einsum("ci,ij,cj->c", D, S, D)), rtol=0.1)


def test_picks_one_by_one_are_conditioned_on_as_all_at_once():
    rng = np.random.default_rng(4)
    values, pool = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 40)), rng.dirichlet([1] * 3, 40)
    picked, before, after = _greedy(values, 0.3, pool, 3, 0.0001)
    w = np.bincount(values.argmin(1), minlength=40) / 60
    away = values - values.mean(0)
    contrast = away - (away @ w)[:, None]
    assert before == pytest.approx(np.sqrt(w @ contrast.var(0, ddof=1)))
    for n in (1, 2, 3):
        seen = away[:, picked[:n]]
        gram = seen.T @ seen / 59 + 0.3 * np.eye(n)
        cross = contrast.T @ seen / 59
        left = contrast.var(0, ddof=1) - np.sum(cross * np.linalg.solve(gram, cross.T).T, 1)
        assert after[n - 1] == pytest.approx(np.sqrt(w @ left))


def test_it_asks_about_what_is_open():
    """Domain 2 is known to be bad; 0 and 1 are known together alone: runs must set them apart."""
    t = np.linspace(0, 1, 9)[:, None]
    X = t * [0.5, 0.5, 0] + (1 - t) * [0.05, 0.05, 0.9]
    X[0] = [0.06, 0.04, 0.9]
    X /= X.sum(1, keepdims=True)
    law = BayesLinear(0.05).fit(X, X @ [1.0, 1.0, 3.0])
    first, second = next_mixtures(law, 2, **options()).mixtures
    assert abs(first[0] - first[1]) > 0.8
    assert first[2] < 0.1
    random = np.abs(np.subtract(*np.random.default_rng(0).dirichlet(np.ones(3), 500).T[:2]))
    assert np.mean(random > abs(first[0] - first[1])) < 0.2
    # Once the difference is to be known, no second run like the first
    assert np.abs(first - second).sum() / 2 > 0.02


def test_mixtures_are_fit_for_use(law):
    lower, upper = [0.05, 0, 0, 0.02, 0, 0], [0.5, 0.31, 1, 1, 0.2, 0.6]
    design = next_mixtures(law, 6, lower=lower, upper=upper, **options())
    p = design.mixtures
    assert p.shape == (6, 6)
    assert (p >= np.array(lower) - 1e-12).all() and (p <= np.array(upper) + 1e-12).all()
    units = p * 1e4
    assert np.abs(units - units.round()).max() < 1e-7
    assert (units.round().sum(1) == 10_000).all() and np.abs(p.sum(1) - 1).max() < 1e-12
    distance = np.abs(p[:, None] - np.vstack([p, law.mixtures_])[None]).sum(2) / 2
    distance[np.arange(6), np.arange(6)] = 1
    assert distance.min() >= 0.02 - 1e-12
    assert np.allclose(design.nearest, distance[:, 6:].min(1))
    assert np.allclose(design.expected, law.predict(p).mean(1))
    assert design.notes == ()
    far = next_mixtures(law, 2, apart=0.35, **options())
    assert far.nearest.min() >= 0.35 - 1e-12
    wide = next_mixtures(law, 6, apart=0.15, **options())
    gaps = np.abs(wide.mixtures[:, None] - wide.mixtures).sum(2) / 2 + np.eye(6)
    assert gaps.min() >= 0.15 - 1e-12 and wide.nearest.min() >= 0.15 - 1e-12


def test_order_of_domains_targets_and_runs_is_of_no_account(law):
    X, Y = world()
    rng = np.random.default_rng(9)
    runs, domains, targets = rng.permutation(20), rng.permutation(6), rng.permutation(3)
    other = EffectiveDataLaw().fit(X[runs][:, domains], Y[runs][:, targets])
    upper = np.array([0.5, 0.31, 1, 1, 0.2, 0.6])
    here = next_mixtures(law, 3, upper=upper, objective=[1, 2, 3], **options())
    weights = np.array([1, 2, 3])[targets]
    there = next_mixtures(other, 3, upper=upper[domains], objective=weights, **options())
    assert np.allclose(here.mixtures[:, domains], there.mixtures, atol=1e-9)
    assert np.allclose(here.after, there.after, rtol=1e-6)


def test_seed_objective_and_prior_matter(law):
    def mixtures(**given):
        return next_mixtures(law, 2, **options(**given)).mixtures

    assert np.array_equal(mixtures(), mixtures())
    assert not np.array_equal(mixtures(), mixtures(seed=1))
    assert not np.array_equal(mixtures(), mixtures(objective=[0, 0, 1]))
    assert not np.array_equal(mixtures(), mixtures(prior=[0.9, 0.1, 0, 0, 0, 0]))


def test_noise_of_runs_lessens_what_they_teach():
    X, Y = world()
    law = BayesLinear(0.1).fit(X, Y)
    quiet = next_mixtures(law, 3, **options())
    law.noise_ = law.noise_ * 10
    loud = next_mixtures(law, 3, **options())
    assert loud.before == pytest.approx(quiet.before)
    assert loud.after[-1] > 1.5 * quiet.after[-1]


@pytest.mark.filterwarnings("ignore:No run varied")
@pytest.mark.parametrize("share", [0.0, 1 / 3])
def test_domains_that_no_run_varied_keep_their_share_and_are_named(share):
    X, Y = world(k=3)
    law = BayesLinear().fit(np.insert(X * (1 - share), 1, share, axis=1), Y)
    design = next_mixtures(law, 3, **options())
    assert np.abs(design.mixtures[:, 1] - share).max() < 1e-15
    assert np.allclose(design.mixtures.sum(1), 1, atol=1e-12)
    if not share:
        assert np.array_equal(design.mixtures * 1e4, (design.mixtures * 1e4).round())
    (note,) = design.notes
    assert ("No run has 1" in note) == (share == 0) and "add" in note


def test_bounds_without_round_shares_are_kept_and_noted():
    X, Y = world(k=3)
    law = BayesLinear().fit(X, Y)
    lower = np.array([0.33331, 0.33331, 0.33331])
    design = next_mixtures(law, 2, lower=lower, apart=1e-6, **options())
    assert (design.mixtures >= lower - 1e-12).all()
    assert np.allclose(design.mixtures.sum(1), 1, atol=1e-12)
    assert any("decimals" in note for note in design.notes)


def test_laws_refitted_to_resampled_runs_and_losses_of_one_target_will_do():
    class Refitted(BayesLinear):
        _draws = Law._draws

    X, Y = world(k=3)
    for losses in (Y, Y[:, 0]):
        design = next_mixtures(Refitted().fit(X, losses), 2, **options())
        assert design.expected.shape == (2,) and design.after[-1] < design.before


def test_missing_losses_are_no_hindrance():
    X, Y = world(k=3)
    Y[3, 0] = np.nan
    law = BayesLinear().fit(X, np.nan_to_num(Y, nan=3.0))
    law.losses_ = Y
    assert np.isfinite(next_mixtures(law, 2, **options()).expected).all()


def test_what_cannot_be_planned_is_refused(law):
    for count in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`count` must be a whole number"):
            next_mixtures(law, count)
    with pytest.raises(ValueError, match="no target nothing"):
        next_mixtures(law, 1, objective="nothing")
    with pytest.raises(ValueError, match="`lower` must sum to at most 1"):
        next_mixtures(law, 1, lower=0.5)
    with pytest.raises(ValueError, match="`draws` must be 2 or more"):
        next_mixtures(law, 5, candidates=4)
    lower = np.full(6, 1 / 6 - 0.002)
    with pytest.raises(ValueError, match="plan fewer, widen"):
        next_mixtures(law, 2, lower=lower, **options())


def test_laws_that_agree_are_refused():
    X, Y = world(k=3)
    Y[:, 1] = 2.0
    law = BayesLinear().fit(X, Y)
    with pytest.raises(ValueError, match="agree on what is best"):
        next_mixtures(law, 2, objective=[0, 1, 0], **options())
