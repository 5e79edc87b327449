"""What holds for every method that moves a mixture, under a simulated trainer."""

import json
import logging
import math

import numpy as np
import pytest

from llmmix.mixing.controllers import SIGNALS, Observation, OnlineController, Segment
from llmmix.mixing.doge import DoGE, DoGEConfig
from llmmix.mixing.doremi import DoReMi, DoReMiConfig
from llmmix.mixing.odm import ODM, ODMConfig
from llmmix.mixing.skillit import SkillIt, SkillItConfig
from llmmix.mixing.weights import stratified

ABC = ["a", "b", "c"]
# How much training on a source (column) lowers the loss of a target (row) at rate 1
INFLUENCE = np.array([[0.30, 0.05, 0.00], [0.00, 0.10, 0.02], [0.04, 0.00, 0.05]])


def observation(step=1, steps=1, learning_rate=1.0, **signal):
    signal = {name: np.array(value, dtype=np.float64) for name, value in signal.items()}
    return Observation(step, steps, np.zeros(1), learning_rate, signal)


class Simulated:
    """A trainer whose losses fall by `INFLUENCE` times what is drawn, measured with noise."""

    batch = 8

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.losses, self.reference = np.array([4.0, 3.0, 3.5]), np.array([3.0, 2.5, 2.5])
        self.step, self.measured = 0, 0
        self.plans = []  # weights and steps of the segments so far

    def run(self, controller, total_steps, until=None):
        """Train up to a step, `total_steps` by default, in whole segments."""
        until = total_steps if until is None else until
        while self.step < until:
            plan = controller.plan(self.step, total_steps)
            assert plan and 1 <= sum(s.steps for s in plan) <= total_steps - self.step
            for segment in plan:
                self._segment(controller, segment)
        return controller

    def _segment(self, controller, segment: Segment):
        check_simplex(segment.weights)
        self.plans.append((segment.weights.tolist(), segment.steps))
        shares = np.zeros(3)
        for _ in range(segment.steps):
            drawn = self.random.multinomial(self.batch, segment.weights / segment.weights.sum())
            drawn = drawn / self.batch
            self.losses = self.losses - 0.1 * INFLUENCE @ drawn
            shares += drawn / segment.steps
        self.step += segment.steps
        if segment.measure is not None:
            self.measured += 1
            signal = self._signal(segment.measure, drawn)
            rate = 0.1 * segment.steps
            controller.observe(Observation(self.step, segment.steps, shares, rate, signal))

    def _signal(self, name, drawn):
        assert name in SIGNALS
        noisy = self.losses + 0.01 * self.random.standard_normal(3)
        if name == "losses":
            return {"losses": noisy}
        if name == "gradients":
            return {
                "products": INFLUENCE.T,
                "norms": np.sqrt(INFLUENCE.diagonal()),
            }
        if name == "excess":
            noisy = np.maximum(noisy - self.reference, 0)
        return {name: np.where(drawn > 0, noisy, np.nan)}


class Fixed(OnlineController):
    """Weights (m,) that stay."""

    method = "Fixed"
    kept = ()

    def __init__(self, weights):
        super().__init__(None, [str(j) for j in range(len(weights))], [], weights)

    def segments(self, step, total_steps):
        return [Segment(self.weights.copy(), total_steps - step)]

    def observe(self, observation):
        pass

    def record(self):
        return {}


METHODS = {
    "skillit": lambda weights, names=ABC: SkillIt(
        SkillItConfig(
            graph={"abc"[j]: {"abc"[i]: INFLUENCE[i, j] for i in range(3)} for j in range(len(ABC))}
        ),
        names,
        names,
        weights,
    ),
    "doremi": lambda weights, names=ABC: DoReMi(DoReMiConfig(eta=0.1), names, [], weights),
    "doremi_seldom": lambda weights, names=ABC: DoReMi(
        DoReMiConfig(eta=0.1, interval=7), names, [], weights
    ),
    "doge": lambda weights, names=ABC: DoGE(DoGEConfig(), names, names, weights),
    "odm": lambda weights, names=ABC: ODM(ODMConfig(), names, [], weights),
    "odm_losses": lambda weights, names=ABC: ODM(
        ODMConfig(reward="losses", interval=6, warmup_share=0.1), names, names, weights
    ),
    "odm_full": lambda weights, names=ABC: ODM(
        ODMConfig(full_information=True, interval=2), names, [], weights
    ),
    "exp3": lambda weights, names=ABC: ODM(ODMConfig(update="exp3"), names, [], weights),
    "exp3_losses": lambda weights, names=ABC: ODM(
        ODMConfig(update="exp3", reward="losses", full_information=False), names, names, weights
    ),
    "fixed": lambda weights, names=ABC: Fixed(weights),
}
methods = pytest.mark.parametrize("method", METHODS)
online = pytest.mark.parametrize("method", [name for name in METHODS if name != "fixed"])


def check_simplex(weights):
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def shares(*values):
    return np.array(values) / sum(values)


def test_fixed_plans_all_that_is_left():
    fixed = Fixed([3, 1])
    (segment,) = fixed.plan(4, 10)
    assert segment.steps == 6 and segment.measure is None
    np.testing.assert_allclose(segment.weights, [0.75, 0.25])
    with pytest.raises(ValueError, match="`weights` must be finite and not negative"):
        Fixed([1, -1])


@methods
def test_a_run_is_whole_and_its_weights_a_mixture(method):
    trainer = Simulated()
    controller = trainer.run(METHODS[method](stratified(3)), 203)
    assert trainer.step == sum(steps for _, steps in trainer.plans) == 203
    check_simplex(controller.weights)
    measured = {"skillit": 10, "doremi": 203, "doremi_seldom": 29, "doge": 203, "fixed": 0}
    measured |= {"odm_losses": 31, "odm_full": 101, "exp3_losses": 101}
    assert trainer.measured == measured.get(method, 201)
    json.dumps(controller.record(), allow_nan=False)


@pytest.mark.parametrize("seed", range(5))
def test_what_a_run_comes_to(seed):
    """Against even shares, where the truth is linear and a helps most."""
    even = Simulated(seed)
    even.run(Fixed(stratified(3)), 100)
    for method in ("skillit", "doge"):  # go for the mean loss
        trainer = Simulated(seed)
        trainer.run(METHODS[method](stratified(3)), 100)
        assert trainer.losses.mean() < even.losses.mean() - 0.05, method
    trainer = Simulated(seed)
    trainer.run(METHODS["doremi"](stratified(3)), 100)  # goes for the largest excess
    assert max(trainer.losses - trainer.reference) < max(even.losses - even.reference) - 0.05
    for method in ("odm_full", "odm_losses", "exp3_losses"):  # draw what is not yet learnt
        trainer = Simulated(seed)
        controller = trainer.run(METHODS[method](stratified(3)), 100)
        assert controller.weights.argmax() == trainer.losses.argmax(), method


@methods
@pytest.mark.parametrize("stop", [1, 40, 100])
def test_resumed_is_never_stopped(method, stop):
    whole, parted = Simulated(), Simulated()
    never = whole.run(METHODS[method](shares(2, 1, 0)), 203)
    first = parted.run(METHODS[method](shares(2, 1, 0)), 203, until=stop)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = METHODS[method](shares(2, 1, 0))
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    parted.run(second, 203)
    assert parted.plans == whole.plans
    assert second.state_dict() == never.state_dict()
    assert second.record() == never.record()


@methods
def test_a_state_is_no_view_of_the_controller(method):
    controller = METHODS[method](stratified(3))
    before = json.dumps(controller.state_dict())
    fresh = controller.state_dict()
    Simulated().run(controller, 60)
    assert json.dumps(fresh) == before
    controller.load_state_dict(fresh)
    assert json.dumps(controller.state_dict()) == before
    controller.plan(0, 10)[0].weights[:] = 7
    check_simplex(controller.weights)


@online
def test_permuted_domains_permute_the_answer(method):
    """Noise-free signals in another order, under the same names."""
    first = METHODS[method](shares(2, 1, 1))
    order = [2, 0, 1]
    other = METHODS[method](shares(2, 1, 1)[order], [ABC[j] for j in order])
    rng = np.random.default_rng(1)
    for step in range(1, 40):
        losses = rng.uniform(0.5, 4, 3)
        products = rng.uniform(-1, 4, (3, 3))
        signals = {"norms": losses, "products": products}
        permuted = {"norms": losses[order], "products": products[np.ix_(order, order)]}
        if first.measure != "gradients":
            signals, permuted = {first.measure: losses}, {first.measure: losses[order]}
        first.observe(observation(step=step, learning_rate=0.01, **signals))
        other.observe(observation(step=step, learning_rate=0.01, **permuted))
    assert np.ptp(first.weights) > 1e-3
    np.testing.assert_allclose(other.weights, first.weights[order], rtol=1e-9)


@online
def test_a_loss_that_is_no_number_keeps_the_weights(method):
    controller = METHODS[method](shares(2, 1, 1))
    before = controller.weights.copy()
    signal = {controller.measure: np.full(3, np.nan)}
    if controller.measure == "gradients":
        signal = {"products": np.full((3, 3), np.nan), "norms": np.ones(3)}
    controller.observe(observation(step=5, **signal))
    np.testing.assert_array_equal(controller.weights, before)
    assert controller.record()["skipped"] == controller.state_dict()["skipped"] == 1


@online
def test_one_domain_trains_on_it_and_says_so_once(method, caplog):
    with caplog.at_level(logging.WARNING):
        if method == "skillit":
            controller = SkillIt(SkillItConfig(), ["a"], ["a"], [1])
        else:
            controller = METHODS[method]([1.0], ["a"])
        (segment,) = controller.plan(0, 50)
        (rest,) = controller.plan(20, 50)
    assert segment.weights.tolist() == [1] and segment.steps == 50 and segment.measure is None
    assert rest.steps == 30
    assert [r.message.split()[0] for r in caplog.records] == [type(controller).__name__]
    assert "'a' is the only domain" in caplog.text


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SkillItConfig(eta=0), "eta"),
        (lambda: SkillItConfig(eta=math.nan), "eta"),
        (lambda: SkillItConfig(window=0), "window"),
        (lambda: SkillItConfig(window=1.5), "window"),
        (lambda: SkillItConfig(update_steps=0), "update_steps"),
        (lambda: DoReMiConfig(eta=-1), "eta"),
        (lambda: DoReMiConfig(smoothing=1), "smoothing"),
        (lambda: DoReMiConfig(interval=0), "interval"),
        (lambda: DoGEConfig(mu=0), "mu"),
        (lambda: DoGEConfig(smoothing=-0.1), "smoothing"),
        (lambda: DoGEConfig(dw_min=5), "dw_max"),
        (lambda: DoGEConfig(interval=None), "interval"),
        (lambda: ODMConfig(eta=0), "eta"),
        (lambda: ODMConfig(eta=math.inf), "eta"),
        (lambda: ODMConfig(gamma=0), "gamma"),
        (lambda: ODMConfig(gamma=1.1), "gamma"),
        (lambda: ODMConfig(decay=1), "decay"),
        (lambda: ODMConfig(warmup_share=1), "warmup_share"),
        (lambda: ODMConfig(interval=0), "interval"),
        (lambda: ODMConfig(update="ucb"), "update"),
        (lambda: ODMConfig(reward="entropy"), "reward"),
        (lambda: SkillIt(SkillItConfig(), ABC, [], stratified(3)), "targets"),
        (lambda: SkillIt(SkillItConfig(), ABC, ["a", "b"], stratified(3)), "targets"),
        (lambda: ODM(ODMConfig(reward="losses"), ABC, ["a"], stratified(3)), "targets"),
        (lambda: DoReMi(DoReMiConfig(), ABC, [], stratified(2)), "weights"),
        (lambda: DoGE(DoGEConfig(), ABC, [], [1, math.nan, 0]), "weights"),
    ],
)
def test_what_cannot_be_is_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        make()


def test_the_defaults_are_the_papers():
    assert (SkillItConfig().window, SkillItConfig().eta) == (3, 0.2)
    assert (DoReMiConfig().eta, DoReMiConfig().smoothing) == (1, 1e-3)
    doge = DoGEConfig()
    assert (doge.mu, doge.smoothing, doge.dw_min, doge.dw_max) == (0.05, 0, 0, 5)
    odm = ODMConfig()
    assert (odm.decay, odm.warmup_share, odm.gamma, odm.eta) == (0.9, 0.01, 0.1, 0.3)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: METHODS["exp3"](stratified(3)), "`state` must be of DoReMi"),
        (lambda: METHODS["doremi"](stratified(3), ["a", "c", "b"]), r"state\['names'\]"),
        (lambda: DoReMi(DoReMiConfig(), ABC, ["x"], stratified(3)), r"state\['targets'\]"),
    ],
)
def test_a_state_of_something_else_is_refused(other, match):
    doremi = METHODS["doremi"](stratified(3))
    before = doremi.state_dict()
    with pytest.raises(ValueError, match=match):
        doremi.load_state_dict(other().state_dict())
    assert doremi.state_dict() == before
