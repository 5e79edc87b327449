"""The effective-data law: its fit, its promises far from the runs, and what it says it knows."""

import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr

from llmmix.laws import DefaultLaw, EffectiveDataLaw


class World:
    """Losses that obey the law's equation, of k domains and m targets."""

    def __init__(self, k=5, m=3, seed=0):
        rng = np.random.default_rng(seed)
        self.worth = rng.lognormal(0, 1.5, (m, k))
        self.returns = rng.uniform(0.3, 1.0, k)
        self.floor, self.top, self.power = rng.uniform(1, 2, m), rng.uniform(2, 4, m), 0.4

    def __call__(self, mixtures):
        amount = 1 + (mixtures**self.returns) @ self.worth.T
        return self.floor + self.top * amount**-self.power

    def runs(self, n, noise=0.0, seed=1):
        rng = np.random.default_rng(seed)
        k = len(self.returns)
        mixtures = rng.dirichlet(np.full(k, 0.6), n)
        losses = self(mixtures)
        return mixtures, losses + noise * rng.standard_normal(losses.shape)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def law(world):
    return EffectiveDataLaw().fit(*world.runs(80, noise=0.01))


def standard_error(law, mixtures, losses):
    return np.sqrt((((law.predict(mixtures) - losses) / losses.std(0)) ** 2).mean())


def test_it_is_the_one_we_recommend():
    assert DefaultLaw is EffectiveDataLaw


@pytest.mark.parametrize("components", [1, 2, 3])
def test_new_mixtures_are_predicted(world, components):
    law = EffectiveDataLaw(components).fit(*world.runs(80, noise=0.01))
    assert law.converged_
    mixtures, losses = world.runs(200, seed=7)
    assert standard_error(law, mixtures, losses) < 0.1
    assert spearmanr(law.predict(mixtures).mean(1), losses.mean(1))[0] > 0.99


def test_the_noise_is_found(law):
    assert law.noise_ == pytest.approx(0.01, rel=0.5)


def test_the_published_numbers_are_the_law(law):
    """The equation of the docstring, with the fitted numbers, gives what `predict` gives."""
    mixtures = np.random.default_rng(3).dirichlet(np.ones(5), 7)
    amounts = 1 + np.einsum("iqj,nqj->niq", law.worth_, mixtures[:, None] ** law.returns_)
    expected = law.floor_ + (law.top_ * amounts**-law.power_).sum(2)
    assert law.predict(mixtures) == pytest.approx(expected, rel=1e-12)


def test_a_loss_stays_between_its_floor_and_its_top_at_every_vertex(law):
    at = law.predict(np.eye(5))
    assert (at > law.floor_).all() and (at < law.floor_ + law.top_.sum(1)).all()


@pytest.mark.parametrize("n", [3, 8, 16])
def test_fewer_runs_than_parameters_stay_sane(n):
    world = World(k=12, m=4, seed=5)
    mixtures, losses = world.runs(n, noise=0.02)
    law = EffectiveDataLaw().fit(mixtures, losses)
    reach = losses.max(0) - losses.min(0)
    everywhere = np.vstack([np.eye(12), world.runs(100, seed=9)[0]])
    assert (law.predict(everywhere) > losses.min(0) - 3 * reach).all()
    assert (law.predict(everywhere) < losses.max(0) + 8 * reach).all()


def test_sixteen_runs_of_twelve_domains_beat_the_mean():
    world = World(k=12, m=4, seed=5)
    law = EffectiveDataLaw().fit(*world.runs(16, noise=0.01))
    assert standard_error(law, *world.runs(300, seed=9)) < 0.8


def test_more_data_of_a_domain_never_hurts(law):
    """All slopes are down: the law knows no harmful domain but through the others' shares."""
    assert (law.gradient(np.random.default_rng(0).dirichlet(np.ones(5), 20)) < 0).all()


def test_the_gradient_is_that_of_the_prediction(law):
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.full(5, 3.0), 10)
    step = rng.standard_normal((10, 5))
    step = 1e-6 * (step - step.mean(1, keepdims=True))
    difference = (law.predict(mixtures + step) - law.predict(mixtures - step)) / 2
    slope = np.einsum("nmk,nk->nm", law.gradient(mixtures), step)
    assert difference == pytest.approx(slope, rel=1e-4, abs=1e-11)


@pytest.mark.parametrize("components", [1, 2])
def test_the_jacobian_is_that_of_the_curve(components):
    law = EffectiveDataLaw(components)
    rng = np.random.default_rng(0)
    X = rng.dirichlet(np.ones(4), 6)
    X[0] = [0, 0.5, 0.5, 0]
    theta, shared = (
        rng.standard_normal((3, 1 + 6 * components)),
        rng.standard_normal(components * 4),
    )
    _, J, Js = law._curve(theta, shared, X, True)
    for p in range(theta.shape[1]):
        d = np.zeros_like(theta)
        d[:, p] = 1e-6
        up, down = (law._curve(theta + s * d, shared, X, False) for s in (1, -1))
        assert J[:, :, p] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)
    for p in range(len(shared)):
        d = np.zeros_like(shared)
        d[p] = 1e-6
        up, down = (law._curve(theta, shared + s * d, X, False) for s in (1, -1))
        assert Js[:, :, p] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("seeds", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_intervals_hold_what_they_promise(seeds):
    inside = []
    for seed in range(seeds):
        world = World(seed=seed)
        law = EffectiveDataLaw().fit(*world.runs(60, noise=0.03, seed=seed))
        low, high = law.interval(world.runs(1, seed=0)[0], 0.9)
        assert (low < high).all()
        mixtures, losses = world.runs(200, noise=0.03, seed=100 + seed)
        low, high = law.interval(mixtures, 0.9)
        inside.append(((low < losses) & (losses < high)).mean())
    assert 0.84 < np.mean(inside) < 0.96


def test_far_from_the_runs_the_law_knows_less(world):
    mixtures, losses = world.runs(200, noise=0.01)
    near = mixtures[:, 0] < 0.2
    law = EffectiveDataLaw().fit(mixtures[near], losses[near])
    _, far = law.predict([[1, 0, 0, 0, 0]], return_std=True)
    _, close = law.predict(mixtures[near][:20], return_std=True)
    assert (far[0] > 2 * close.mean(0)).any()


def test_draws_have_the_spread_of_the_prediction(law):
    mixtures = np.random.default_rng(1).dirichlet(np.ones(5), 3)
    drawn = law.draws(mixtures, 4000)
    _, std = law.predict(mixtures, return_std=True)
    assert drawn.mean(0) == pytest.approx(law.predict(mixtures), abs=0.005)
    assert np.hypot(drawn.std(0), law.noise_) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("n, bad, by", [(8, 1, 8), (20, 2, 8), (80, 1, 5), (80, 3, 5)])
def test_diverged_runs_are_set_aside_and_named(world, n, bad, by):
    mixtures, losses = world.runs(n, noise=0.01)
    clean = EffectiveDataLaw().fit(mixtures, losses)
    rows = list(range(5, 5 + bad))
    losses[rows] += by
    with pytest.warns(UserWarning, match="Set aside as far from any law: runs"):
        law = EffectiveDataLaw().fit(mixtures, losses)
    assert clean.outliers_ == [] and law.outliers_ == rows
    held, truth = world.runs(100, seed=8)
    assert standard_error(law, held, truth) < 2 * standard_error(clean, held, truth) + 0.1


def test_a_run_is_kept_that_has_the_only_losses_of_a_target(world):
    mixtures, losses = world.runs(60, noise=0.01)
    losses[:2] += 10
    losses[2:, 2] = np.nan
    law = EffectiveDataLaw().fit(mixtures, losses)
    predicted, std = law.predict(mixtures, return_std=True)
    assert law.outliers_ == [] and np.isfinite(predicted).all() and np.isfinite(std).all()


def test_a_missing_loss_is_left_out_of_its_target_alone(world):
    mixtures, losses = world.runs(60, noise=0.01)
    whole = EffectiveDataLaw().fit(mixtures, losses)
    losses[5:15, 1] = np.nan
    law = EffectiveDataLaw().fit(mixtures, losses)
    held, truth = world.runs(100, seed=8)
    assert np.isfinite(law.predict(held)).all()
    assert standard_error(law, held, truth) < 2 * standard_error(whole, held, truth)


@pytest.mark.parametrize(
    ("domains", "runs"), [(12, 150), pytest.param(40, 1000, marks=pytest.mark.slow)]
)
def test_many_domains_and_runs(domains, runs):
    world = World(k=domains, m=2, seed=3)
    law = EffectiveDataLaw(max_iter=15).fit(*world.runs(runs, noise=0.01))
    assert standard_error(law, *world.runs(200, seed=8)) < 0.2
    best = law.propose()
    assert best.converged
    assert world(best.mixture).mean() < world.runs(runs)[1].mean(1).min()


def test_the_same_runs_give_the_same_law(world):
    runs = world.runs(40, noise=0.01)
    first, again = (EffectiveDataLaw().fit(*runs).predict(np.eye(5)) for _ in range(2))
    assert (first == again).all()


def test_a_fit_that_stops_early_says_so(world):
    assert not EffectiveDataLaw(max_iter=1).fit(*world.runs(40, noise=0.01)).converged_


def test_components_beyond_three_are_refused(world):
    with pytest.raises(ValueError, match="`components` must be 1, 2 or 3, got 4"):
        EffectiveDataLaw(components=4).fit(*world.runs(20))


def test_two_runs_are_enough_to_say_something():
    law = EffectiveDataLaw().fit([[0.9, 0.1], [0.1, 0.9]], [[2.0, 3.0], [3.0, 2.0]])
    assert law.predict([[0.9, 0.1]])[0, 0] < law.predict([[0.1, 0.9]])[0, 0]


def test_a_domain_without_variation_has_no_number(world):
    mixtures, losses = world.runs(30, noise=0.01)
    wider = np.insert(mixtures, 2, 0.0, axis=1)
    with pytest.warns(UserWarning, match="No run varied 2: the law cannot know what it does"):
        law = EffectiveDataLaw().fit(wider, losses)
    assert law.unidentified_ == [2]
    assert np.isnan(law.worth_[:, :, 2]).all() and np.isnan(law.returns_[:, 2]).all()
    assert np.isfinite(np.delete(law.worth_, 2, axis=2)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert law.predict(wider) == pytest.approx(
            EffectiveDataLaw().fit(mixtures, losses).predict(mixtures), rel=1e-12
        )
