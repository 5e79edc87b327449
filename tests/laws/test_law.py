"""What every mixture law promises: its contract, bad input, an answer that moves with the order."""

import pkgutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from llmmix import laws
from llmmix.laws import EffectiveDataLaw, Law
from llmmix.laws.inputs import canonical_order, check_losses, check_mixtures


def runs(n=40, k=4, seed=0):
    """Targets 0 and 1 want the domain of their number most; 2 wants 3, whose returns fall off."""
    rng = np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.ones(k), n)
    wanted = mixtures[:, [0, 1, 3]] + 0.2 * mixtures[:, [1, 2, 0]]
    return mixtures, 2 + (0.05 + wanted) ** -0.3 + 0.005 * rng.standard_normal((n, 3))


@pytest.fixture(scope="module")
def fitted():
    return EffectiveDataLaw().fit(*runs())


def test_no_law_imports_torch():
    code = (
        "import sys, importlib, pkgutil, llmmix.laws as laws;"
        "[importlib.import_module(f'llmmix.laws.{m.name}') "
        "for m in pkgutil.iter_modules(laws.__path__)];"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_package_names_is_there():
    assert laws.DefaultLaw is EffectiveDataLaw
    for name in laws.__all__:
        assert callable(getattr(laws, name)), name
    # A function of a module's name would hide the module
    modules = {module.name for module in pkgutil.iter_modules(laws.__path__)}
    assert not modules & set(laws.__all__)


def test_shapes(fitted):
    mixtures, losses = runs()
    assert fitted.predict(mixtures).shape == losses.shape
    assert fitted.predict(mixtures[0]).shape == (1, 3)
    assert fitted.best_mixture().shape == (4,)
    assert fitted.draws(mixtures, 7).shape == (7, 40, 3)
    assert fitted.gradient(mixtures).shape == (40, 3, 4)
    assert fitted.noise_.shape == (3,)


def test_one_target_may_be_flat():
    mixtures, losses = runs()
    flat, wide = (EffectiveDataLaw().fit(mixtures, y) for y in (losses[:, 0], losses[:, :1]))
    assert flat.predict(mixtures).shape == (40,) and wide.predict(mixtures).shape == (40, 1)
    assert (flat.predict(mixtures) == wide.predict(mixtures)[:, 0]).all()
    assert (flat.interval(mixtures)[0] < flat.interval(mixtures)[1]).all()


def test_scikit_learn_knows_it():
    mixtures, losses = runs()
    law = clone(EffectiveDataLaw(components=1))
    assert law.get_params()["components"] == 1
    scores = cross_val_score(law, mixtures, losses[:, 0], scoring="r2", cv=4)
    assert scores.mean() > 0.9


def test_a_data_frame_names_domains_and_targets():
    mixtures, losses = runs()
    domains, targets = ["code", "docs", "math", "web"], ["code", "docs", "web"]
    table = pd.DataFrame(mixtures, columns=domains)
    law = EffectiveDataLaw().fit(table, pd.DataFrame(losses, columns=targets))
    assert law.domains_ == domains and law.targets_ == targets
    assert law.best_mixture("code").argmax() == 0
    assert law.best_mixture({"docs": 1.0}).argmax() == 1
    swapped = table[["docs", "code", "math", "web"]]
    with pytest.raises(ValueError, match="the law was fitted to"):
        law.predict(swapped)


def test_permuted_runs_domains_and_targets_permute_the_answer(fitted):
    mixtures, losses = runs()
    rng = np.random.default_rng(5)
    r, d, t = rng.permutation(40), rng.permutation(4), rng.permutation(3)
    law = EffectiveDataLaw().fit(mixtures[r][:, d], losses[r][:, t])
    expected = fitted.predict(mixtures)[:, t]
    assert law.predict(mixtures[:, d]) == pytest.approx(expected, rel=1e-12)
    assert law.best_mixture() == pytest.approx(fitted.best_mixture()[d], abs=1e-7)
    assert law.noise_ == pytest.approx(fitted.noise_[t], rel=1e-10)


def test_a_symmetric_design_still_has_an_order():
    """Two domains whose columns hold the same shares are told apart by their runs' losses."""
    shares = np.linspace(0.1, 0.9, 9)
    mixtures = np.stack([shares, 1 - shares], 1)
    losses = np.stack([2 + shares**2, 3 - shares], 1)
    law = EffectiveDataLaw().fit(mixtures, losses)
    turned = EffectiveDataLaw().fit(mixtures[:, ::-1], losses)
    assert (law.predict(mixtures) == turned.predict(mixtures[:, ::-1])).all()


def test_canonical_order_undoes_permutations():
    mixtures, losses = runs(n=12)
    losses[3, 1] = np.nan
    a, b, c = canonical_order(mixtures, losses)
    rng = np.random.default_rng(1)
    r, d, t = rng.permutation(12), rng.permutation(4), rng.permutation(3)
    x, y, z = canonical_order(mixtures[r][:, d], losses[r][:, t])
    assert (mixtures[a][:, b] == mixtures[r][:, d][x][:, y]).all()
    assert np.array_equal(losses[a][:, c], losses[r][:, t][x][:, z], equal_nan=True)


# Input


def test_shares_off_by_rounding_are_scaled():
    assert check_mixtures([[0.5, 0.5009]]).sum() == pytest.approx(1, abs=1e-15)
    rounded = np.random.default_rng(0).dirichlet(np.ones(17), 200).round(3)
    assert np.abs(rounded.sum(1) - 1).max() > 0.002
    assert check_mixtures(rounded).sum(1) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    "shares, message",
    [
        ([[0.5, 0.5], [0.5, 0.498]], "run 1 sum to 0.998"),
        ([[0.5, 0.5], [0.5, 0.4987654321]], "run 1 sum to 0.998765"),
        ([[50, 50]], "sum to 100"),
        ([[1.2, -0.2]], "run 0 has a share of -0.2 of domain 1"),
        ([[np.nan, 1]], "a share of nan of domain 0"),
        ([["a", "b"]], "must be numbers"),
        ([[[0.5, 0.5]]], r"runs by domains \(n, k\), got shape \(1, 1, 2\)"),
        ([], "got shape"),
    ],
)
def test_shares_that_are_none_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        check_mixtures(shares)


def test_shares_are_refused_by_their_names():
    with pytest.raises(ValueError, match="domain web"):
        check_mixtures([[-1, 2]], ["web", "code"])
    with pytest.raises(ValueError, match="has 2 domains, and 1 names"):
        check_mixtures([[0, 1]], ["web"])


def test_losses_are_checked():
    assert np.isnan(check_losses([[1, np.inf], [2, 3]], 2)).sum() == 1
    with pytest.raises(ValueError, match="of the 3 runs"):
        check_losses([1, 2], 3)
    with pytest.raises(ValueError, match="no run has a loss of math"):
        check_losses([[1, np.nan], [2, np.inf]], 2, ["code", "math"])
    with pytest.raises(ValueError, match="must be numbers"):
        check_losses([["a"]], 1)


@pytest.mark.parametrize(
    "mixtures, why",
    [([[1.0]] * 3, "there is one domain"), ([[0.2, 0.8]] * 3, "all 3 have the same")],
)
def test_nothing_to_learn_from_is_said(mixtures, why):
    with pytest.raises(ValueError, match=why):
        EffectiveDataLaw().fit(mixtures, [1.0, 2.0, 3.0])


def test_a_constant_target_is_predicted_as_it_was():
    mixtures, losses = runs()
    losses[:, 1] = 4.0
    law = EffectiveDataLaw().fit(mixtures, losses)
    assert law.constant_ == [1]
    assert (law.predict(mixtures)[:, 1] == 4.0).all() and law.noise_[1] == 0
    alone = EffectiveDataLaw().fit(mixtures, losses[:, [1]])
    assert (alone.predict(mixtures, return_std=True)[1] == 0).all()
    assert alone.best_mixture().sum() == pytest.approx(1)


def test_duplicated_runs_work():
    mixtures, losses = runs(20)
    law = EffectiveDataLaw().fit(np.repeat(mixtures, 2, 0), np.repeat(losses, 2, 0))
    assert np.isfinite(law.predict(mixtures)).all()


def test_a_law_must_be_fitted_and_asked_about_its_domains(fitted):
    with pytest.raises(ValueError, match="is not fitted: call `fit` first"):
        EffectiveDataLaw().predict([[0.5, 0.5]])
    with pytest.raises(ValueError, match="must have 4 domains, got 2"):
        fitted.predict([[0.5, 0.5]])


def test_a_mixture_of_what_no_run_varied_is_warned_of():
    mixtures, losses = runs()
    with pytest.warns(UserWarning, match="No run varied 4"):
        law = EffectiveDataLaw().fit(np.insert(mixtures, 4, 0, axis=1), losses)
    with pytest.warns(UserWarning, match="no account of that"):
        law.predict([[0.2, 0.2, 0.2, 0.2, 0.2]])
    best = law.best_mixture(lower=0.05)
    assert best[4] == 0 and best[:4].min() >= 0.05 - 1e-9


def test_what_no_run_varied_keeps_its_share():
    mixtures, losses = runs()
    with pytest.warns(UserWarning, match="No run varied 0"):
        law = EffectiveDataLaw().fit(np.insert(0.7 * mixtures, 0, 0.3, axis=1), losses)
    assert law.best_mixture()[0] == pytest.approx(0.3)
    with pytest.raises(ValueError, match="leave no mixture beside 0"):
        law.best_mixture(lower=[0, 0.4, 0.4, 0, 0])


# The best mixture


def test_every_objective_has_its_optimum(fitted):
    assert fitted.best_mixture([1, 0, 0]).argmax() == 0
    assert fitted.best_mixture([0, 0, 2]).argmax() == 3
    rng = np.random.default_rng(0)
    candidates = rng.dirichlet(np.ones(4), 20_000)
    for weights in ([1, 0, 0], [1, 1, 1], [0.2, 0, 0.8]):
        u = np.array(weights) / np.sum(weights)
        found = fitted.propose(weights)
        assert found.converged
        assert found.value <= (fitted.predict(candidates) @ u).min() + 1e-9
        assert found.value == pytest.approx(fitted.predict(found.mixture)[0] @ u, rel=1e-12)


def test_bounds_and_data_hold(fitted):
    best = fitted.best_mixture([1, 0, 0], lower=[0, 0, 0.1, 0], upper=0.6)
    assert best[0] <= 0.6 + 1e-9 and best[2] >= 0.1 - 1e-9
    capped = fitted.best_mixture(
        [1, 0, 0], available=[1e9, 9e9, 9e9, 9e9], tokens=1e10, max_epochs=4
    )
    assert capped[0] == pytest.approx(0.4)


def test_a_prior_pulls(fitted):
    prior = np.array([0.1, 0.1, 0.7, 0.1])
    distances = [
        np.abs(fitted.best_mixture(prior=prior, closeness=c) - prior).sum()
        for c in (0, 0.05, 1, 100)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01


def test_the_sampled_search_is_regmixs(fitted):
    found = fitted.propose([1, 0, 0], method="sample")
    assert "mean of the best 128 of 100000 draws" in found.method
    assert found.mixture.argmax() == 0
    assert found.value >= fitted.propose([1, 0, 0]).value - 1e-9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "web"}, "no target web"),
        ({"objective": [1, 1]}, "must be 3 weights"),
        ({"objective": [1, -1, 1]}, "must be 3 weights of at least 0"),
        ({"objective": [0, 0, 0]}, "the weights are all 0"),
        ({"method": "guess"}, "must be auto, gradient or sample"),
        ({"closeness": -1}, "`closeness` must be 0 or more"),
        ({"prior": [0.5, 0.5]}, "`prior` must be 4 shares, got 2"),
        ({"prior": {"web": 1.0}}, "`prior`: no domain web"),
        ({"lower": 0.3}, "`lower` must sum to at most 1"),
        ({"tokens": 1e9}, "A limit on epochs takes"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(fitted, options, message):
    with pytest.raises(ValueError, match=message):
        fitted.best_mixture(**options)


def test_a_level_must_be_one(fitted):
    with pytest.raises(ValueError, match="`level` must lie between 0 and 1, got 90"):
        fitted.interval([[0.25] * 4], level=90)


# Laws that bring no uncertainty or slope of their own


class Steps(Law):
    """Constant on either side of a half of the first domain."""

    smooth = False

    def _fit(self, X, Y):
        high = X[:, 0] > 0.5
        self.levels = np.array([np.nanmean(Y[~high], 0), np.nanmean(Y[high], 0)])
        return np.nanstd(Y - self._predict(X), 0)

    def _predict(self, X):
        return self.levels[(X[:, 0] > 0.5).astype(int)]


def test_the_bootstrap_is_there_for_laws_that_have_none():
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet([1, 1], 50)
    losses = (mixtures[:, :1] > 0.5) + 0.3 * rng.standard_normal((50, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law = Steps().fit(mixtures, losses)
        _, std = law.predict([[0.9, 0.1]], return_std=True)
    assert 0.25 < std[0, 0] < 0.4  # the noise, and the error of a mean of some 25 runs
    drawn = law.draws([[0.9, 0.1]], 200)
    assert 0.02 < drawn.std() < 0.15
    assert law.propose().method.startswith("mean of the best 128")
    with pytest.raises(TypeError, match="Steps has no gradient"):
        law.gradient(mixtures)
    with pytest.raises(ValueError, match="which has no gradient"):
        law.best_mixture(method="gradient")
