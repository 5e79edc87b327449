"""Aioli's controllers against numbers worked out by hand: what they estimate, plan and skip."""

import itertools
import logging
import math
from collections import deque

import numpy as np
import pytest

from llmmix.mixing.controllers import Observation
from tests.mixing.simulated import (
    AB,
    ABC,
    ESTIMATORS,
    ONE,
    PAIR,
    SAME,
    Simulated,
    Uniform,
    World,
    estimators,
    make,
    trained,
)

LOGGER = "llmmix.mixing.aioli"

# What is published, and what is corrected


def feed(controller, step, total, drops, start=(3.0, 3.0), shares=None):
    """Go through a plan whose probes of domain j shed `drops[:, j]`; where it ends."""
    losses = np.array(start, dtype=float)
    for weights, steps, measure, estimates in controller.plan(step, total):
        step += steps
        if measure:
            if estimates:
                losses = losses - drops[:, int(np.argmax(weights))]
            drawn = weights if shares is None or not estimates else shares(weights)
            controller.observe(Observation(step, steps, drawn, 1.0, {"losses": losses}))
    return step


FIRST = np.array([[0.5, 0.1], [0.2, 0.3]])  # normalised A has the columns [2.15, .95] / 3.1
SECOND = np.array([[0.1, 0.2], [0.0, 0.4]])  # and [.55, 2.55] / 3.1


def log_ratio(controller):
    return math.log(controller.weights[0] / controller.weights[1])


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("prior", [(0.5, 0.5), (0.9, 0.1)])
@pytest.mark.parametrize(("ema", "second"), [(0.1, -1.68 / 3.1), (None, (1.2 - 2.0) / 3.1)])
def test_the_published_update_by_hand(ema, second, prior, rounds):
    options = {"compat": "official", "one_hot_factor": 0.625, "update_steps": 20, "ema": ema}
    controller = make(AB, weights=prior, rounds=rounds, probe_steps=1, **options)
    np.testing.assert_allclose(controller.weights, prior)
    step = feed(controller, 0, 40, FIRST)
    assert step == 2 * rounds  # measuring begins at once
    step = feed(controller, step, 40, None)
    np.testing.assert_allclose(controller.matrix, [[1.1, -0.5], [0.05, 0.45]], atol=1e-12)
    assert step == 20 and log_ratio(controller) == pytest.approx(0.2 * 1.2 / 3.1)  # no prior in it
    step = feed(controller, step, 40, SECOND)
    step = feed(controller, step, 40, None)
    np.testing.assert_allclose(controller.matrix, [[-0.05, 0.35], [-0.6, 1.0]], atol=1e-12)
    assert step == 40 and log_ratio(controller) == pytest.approx(0.2 * second)


def test_the_published_update_never_leaves_its_bound():
    bound = math.exp(0.2)
    for seed in range(3):
        run = trained(ONE, 600, seed, noise=0.01, compat="official", ema=0.1)
        assert max(max(w) / min(w) for w in run.history) <= bound + 1e-9


def test_the_published_solve_takes_the_mixtures_as_planned():
    options = {"compat": "official", "one_hot_factor": 0.625, "update_steps": 20, "rounds": 1}
    controller = make(AB, probe_steps=1, **options)
    step = feed(controller, 0, 40, FIRST, shares=lambda w: np.eye(2)[w.argmax()])
    controller.plan(step, 40)
    np.testing.assert_allclose(controller.matrix, [[1.1, -0.5], [0.05, 0.45]], atol=1e-12)


def test_one_hot_probes_need_no_solve():
    controller = make(AB, compat="official", one_hot_factor=1, update_steps=20, rounds=2)
    controller.plan(feed(controller, 0, 40, FIRST), 40)
    np.testing.assert_allclose(controller.matrix, FIRST)


@pytest.mark.parametrize(("ema", "second"), [(0.5, -0.4 / 3.1), (None, -0.8 / 3.1)])
def test_the_corrected_update_keeps_the_prior(ema, second):
    prior, keeps = (0.9, 0.1), math.log(9)
    options = {"one_hot_factor": 0.625, "update_steps": 20, "rounds": 1, "first_step": 0}
    controller = make(AB, weights=prior, min_share=0, ema=ema, **options)
    step = feed(controller, feed(controller, 0, 40, FIRST), 40, None)
    assert log_ratio(controller) == pytest.approx(keeps + 4 * 1.2 / 3.1)  # eta is 2 a domain
    step = feed(controller, feed(controller, step, 40, SECOND), 40, None)
    assert log_ratio(controller) == pytest.approx(keeps + 4 * second)
    # The average of the second is .5 * -2.0 + .5 * 1.2
    floored = make(AB, weights=prior, ema=ema, **options)
    feed(floored, feed(floored, 0, 40, FIRST), 40, None)
    np.testing.assert_allclose(floored.weights, [0.875, 0.125])
    other = make(AB, weights=prior, min_share=0, anchor="uniform", ema=ema, **options)
    feed(other, feed(other, 0, 40, FIRST), 40, None)
    assert log_ratio(other) == pytest.approx(4 * 1.2 / 3.1)


def test_prior_weights_take_the_place_of_the_samplers():
    for estimator in ESTIMATORS:
        controller = make(AB, prior_weights=[3, 1], estimator=estimator)
        np.testing.assert_allclose(controller.weights, [0.75, 0.25])
        (first, *_) = controller.plan(0, 400)
        np.testing.assert_allclose(first.weights, [0.75, 0.25])


class Linear:
    """Losses that fall by `matrix` times the mixture, and by `drift` more each step."""

    batch = 16

    def __init__(self, matrix, targets, drift=0.0):
        self.matrix, self.targets, self.drift = np.array(matrix), list(targets), drift
        self.names = ABC[: self.matrix.shape[1]]

    def losses(self, rows):
        step = rows.sum() / self.batch
        return 50 - self.matrix @ rows / self.batch + self.drift * step**2 / 2


@pytest.mark.parametrize(
    ("matrix", "targets"),
    [
        ([[0.05, 0.01], [0.0, 0.02]], AB),
        ([[0.05, 0.01], [0.0, 0.02], [-0.01, 0.03]], "xyz"),
        ([[0.03, 0.01, 0.02]], "x"),
        ([[0.03, 0.01, 0.02], [0.0, 0.02, 0.04]], ["c", "x"]),
    ],
)
def test_the_matrix_of_a_linear_world_is_found_whatever_was_drawn(matrix, targets):
    """With the shares as drawn, not as planned; a drift over the probes does not disturb it."""
    for drift in (0.0, 1e-5):
        world = Linear(matrix, targets, drift)
        run = trained(world, 100, first_step=0, update_steps=100, rounds=3, probe_steps=2)
        found = run.controller.influence()
        assert (found.targets, found.domains) == (tuple(targets), tuple(world.names))
        mid = 0.0  # the drift shifts a target's whole row by what it is at the middle probe
        if drift:
            mid = drift * 2 * 3 * len(world.names) / 2
        np.testing.assert_allclose(found.values, np.array(matrix) - mid, atol=1e-9)
        assert found.of(targets[0], "b") == pytest.approx(matrix[0][1] - mid)
        gains = np.array(matrix).sum(0)
        order = np.argsort(gains)
        assert (np.diff(run.controller.weights[order]) >= -1e-12).all()


def test_gains_within_their_error_move_nothing():
    random = np.random.default_rng(0)
    moved = {}
    for evidence in (0.0, 3.0):
        controller = make(AB, first_step=0, update_steps=40, rounds=4, evidence=evidence)
        moved[evidence] = 0
        for _ in range(30):
            controller = make(AB, first_step=0, update_steps=40, rounds=4, evidence=evidence)
            losses, step = np.array([3.0, 3.0]), 0
            for weights, steps, _measure, _estimates in controller.plan(0, 40):
                step += steps
                losses = 3 - 0.01 * step + 0.01 * random.standard_normal(2)
                controller.observe(Observation(step, steps, weights, 1.0, {"losses": losses}))
            controller.plan(step, 40)
            moved[evidence] += controller.matrix is not None
    assert moved[0.0] == 30 and moved[3.0] < 8


# Plans


def walk(world, total, **options):
    """Only the plans of a run, whose losses fall evenly: (when given, segments)."""
    controller = make(world.names, world.targets, **options)
    step, plans = 0, []
    while step < total:
        segments = controller.plan(step, total)
        plans.append((step, segments))
        for weights, steps, measure, _ in segments:
            step += steps
            if measure:
                signal = {"losses": np.full(len(world.targets), 5 - step / total)}
                controller.observe(Observation(step, steps, weights * bool(steps), 1.0, signal))
    assert step == total
    return plans


def cycles_of(plans, total, m, every, rounds, begin):
    """Check the plans of a run of probes; (steps of probes, steps of the rest) of its cycles."""
    plans, cycles = deque(plans), []
    if begin:
        step, (first,) = plans.popleft()
        assert (step, first.steps, first.measure) == (0, begin, None)
    while plans:
        step, segments = plans.popleft()
        if len(segments) == 1:  # too short for a cycle
            assert not plans and step + segments[0].steps == total
            assert total - step <= every
            break
        assert step == begin + len(cycles) * every
        measured, *probes = segments
        assert (measured.steps, measured.measure, measured.estimates) == (0, "losses", False)
        assert all(s.measure == "losses" and s.estimates for s in probes)
        assert len({s.steps for s in probes}) == 1 and len(probes) == m * rounds
        domains = [int(s.weights.argmax()) for s in probes]
        for start in range(0, len(domains), m):
            assert sorted(domains[start : start + m]) == list(range(m))
        after, (rest,) = plans.popleft()
        assert after == step + sum(s.steps for s in probes)
        assert not rest.estimates and rest.measure is None
        assert after + rest.steps == min(step + every, total)
        cycles.append((after - step, rest.steps))
    return cycles


@pytest.mark.parametrize("total", [97, 251, 600])
@pytest.mark.parametrize("m", [2, 3, 5])
def test_probes_and_the_rest_are_the_whole_run(total, m):
    world = World([2] * m, [400] * m, [0.4] * m)
    tried = 0
    for update, rounds, length, begin in itertools.product(
        [None, 37, 50], [1, 2], [None, 3], [None, 20]
    ):
        every = update or max(total // 10, 4 * m * rounds)
        planned = length or max(1, every // (4 * m * rounds))
        if m * rounds * planned >= every:
            continue
        tried += 1
        options = {"update_steps": update, "rounds": rounds, "probe_steps": length}
        plans = walk(world, total, first_step=begin, **options)
        begin = total // 10 if begin is None else begin
        cycles = cycles_of(plans, total, m, every, rounds, begin)
        probes = m * rounds * planned
        full, left = divmod(total - begin, every)
        assert len(cycles) == full + (left > probes)
        assert all(spent == probes for spent, _ in cycles)
        if length is None and every >= 4 * m * rounds:
            assert probes <= every / 4
    assert tried > 7


@pytest.mark.parametrize("total", [1, 2, 9, 41, 100, 251, 600])
@pytest.mark.parametrize("update", [None, 1, 7, 1000])
@pytest.mark.parametrize("begin", [None, 0, 20, 1000])
def test_the_regression_plans_the_whole_run(total, update, begin):
    options = {"estimator": "regression", "update_steps": update, "first_step": begin}
    plans = walk(ONE, total, **options)
    every = update or max(1, total // 40)
    begin = min(total // 10 if begin is None else begin, total)
    steps = [s.steps for _, plan in plans for s in plan if s.steps]
    if begin:
        assert steps.pop(0) == begin
    assert sum(steps) == total - begin
    assert all(n == every for n in steps[:-1])
    assert not any(s.estimates for _, plan in plans for s in plan)


@estimators
def test_the_prior_is_trained_on_before_all_else(estimator):
    for prior_steps, first_step, begin in [(50, None, 50), (20, None, 30), (7, 3, 7), (0, 0, 0)]:
        options = {"prior_steps": prior_steps, "first_step": first_step}
        controller = make(ABC, weights=[0.6, 0.3, 0.1], estimator=estimator, **options)
        first = controller.plan(0, 300)[0]
        assert first.steps == begin and not first.estimates
        np.testing.assert_allclose(first.weights, [0.6, 0.3, 0.1])
    official = make(ABC, weights=[0.6, 0.3, 0.1], compat="official", prior_steps=50)
    assert official.plan(0, 300)[0].steps == 50


@estimators
@pytest.mark.parametrize("total", [1, 2, 3, 8, 40])
def test_a_prior_as_long_as_the_run(estimator, total):
    run = trained(ONE, total, estimator=estimator, prior_steps=total)
    assert run.history[-1].tolist() == [1 / 3] * 3


def test_a_tilt_is_taken_back_over_a_turn():
    controller = make(ABC, weights=[0.5, 0.3, 0.2], estimator="regression", first_step=0, tilt=0.15)
    mixtures, losses = [], np.full(3, 3.0)
    for turn in range(2):
        for _ in range(3):
            for weights, steps, *_ in controller.plan(0, 400):
                if steps:
                    mixtures.append(weights)
        np.testing.assert_allclose(np.mean(mixtures[-3:], axis=0), [0.5, 0.3, 0.2], atol=1e-12)
        assert sorted(np.subtract(mixtures[-3:], [0.5, 0.3, 0.2]).argmax(1)) == [0, 1, 2], turn
    assert losses.tolist() == [3.0] * 3
    flat = make(ABC, weights=[0.5, 0.3, 0.2], estimator="regression", first_step=0, tilt=0)
    np.testing.assert_allclose(flat.plan(0, 400)[-1].weights, [0.5, 0.3, 0.2])


def test_a_whole_tilt_is_a_mixture():
    controller = make(AB, estimator="regression", first_step=0, tilt=1.0)
    for _ in range(2):
        weights = controller.plan(0, 400)[-1].weights
        assert sorted(weights) == [0, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"update_steps": 6}, "Probes take 6 steps of every 6"),
        ({"update_steps": 30, "probe_steps": 5}, "Probes take 30 steps of every 30"),
        ({"update_steps": 30, "rounds": 10}, "Probes take 30 steps of every 30"),
        ({"update_steps": 1}, "Probes take 6 steps of every 1"),
    ],
)
def test_probes_that_leave_nothing_to_train_are_refused(options, says):
    controller = make(ABC, first_step=0, **options)
    with pytest.raises(ValueError, match=f"{says}: lower `rounds` or `probe_steps`, or raise"):
        controller.plan(0, 600)


def test_probes_that_leave_nothing_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="Probes take 6 steps of every 6"):
        make(ABC, update_steps=6).plan(0, 600)


def test_many_probes_are_said_once(caplog):
    for length, said in [(1, 0), (2, 1)]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, LOGGER):
            trained(SAME, 100, first_step=0, update_steps=20, rounds=2, probe_steps=length)
        found = [r.getMessage() for r in caplog.records if "Probes take" in r.getMessage()]
        assert len(found) == said
        assert not said or "60% of the steps" in found[0]


def test_a_run_too_short_to_estimate_anything_is_said(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        run = trained(ONE, 100, update_steps=500)
    assert run.controller.cycles or caplog.records


@pytest.mark.parametrize("update", [20, 60])
def test_the_regression_moves_however_seldom_it_looks(update):
    run = trained(ONE, 600, estimator="regression", update_steps=update)
    assert run.controller.weights[0] > 0.5


@estimators
def test_one_domain_has_nothing_to_mix(estimator, caplog):
    world = World([2, 1], [400, 40], [0.4, 3], influence=[[1], [0.5]])
    with caplog.at_level(logging.WARNING, LOGGER):
        run = trained(world, 100, estimator=estimator)
    assert [r.getMessage() for r in caplog.records] == [
        "Aioli has nothing to mix: 'domain 0' is the only domain."
    ]
    assert run.measured == 0 and sum(s.steps for _, plan in run.plans for s in plan) == 100
    assert all(w.tolist() == [1.0] for w in run.history)


@estimators
def test_no_target_is_refused(estimator):
    with pytest.raises(ValueError, match="at least one target"):
        make(AB, targets=[], estimator=estimator)


@pytest.mark.parametrize(
    ("influence", "best"),
    [
        ([[1, 0.2, 0.0]], 0),
        ([[0.1, 0.2, 1.0], [0.0, 0.3, 0.8]], 2),
        ([[0.2, 1.0], [0.1, 0.9], [0.0, 0.5]], 1),
    ],
)
@estimators
def test_targets_that_are_no_domains(estimator, influence, best):
    n = len(influence)
    world = World([2] * n, [400] * n, [0.4] * n, influence)
    for seed in range(5):
        run = trained(world, 600, seed, estimator=estimator, tilt=0.3)
        assert run.controller.weights.argmax() == best
        assert run.controller.influence().values.shape == (n, len(influence[0]))
        uniform = Simulated(world, Uniform(world), 600, seed=seed).run()
        assert run.outcome < uniform.outcome


@estimators
def test_a_target_without_weight_does_not_count(estimator):
    """Only the saturated domain's target counts: there is next to nothing to be had from it."""
    run = trained(PAIR, 600, estimator=estimator, target_weights=[1, 0])
    assert run.controller.weights[0] > 0.8
    options = {"estimator": estimator, "target_weights": [0, 1], "first_step": 0}
    found = trained(World([2, 2], [400, 4000], [0.4, 0.4]), 600, **options).controller.weights
    assert found[1] > 0.8


# Losses that are no numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [(8,), (10,), (13,), (9, 10, 14)])
def test_a_broken_probe_keeps_the_weights(value, when, caplog):
    """Measurements 0 to 6 are of the first cycle, 7 to 13 of the second, 14 to 20 of the third."""
    broken = dict.fromkeys(when, value)
    options = {"update_steps": 30, "first_step": 0, "probe_steps": 1}
    with caplog.at_level(logging.WARNING, LOGGER):
        run = trained(ONE, 200, broken=broken, **options)
    assert run.controller.skipped == len(when)
    assert run.controller.record()["skipped"] == len(when)
    said = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert len(said) == len(when)
    assert all("['domain 0']" in s and "the weights stay as they are" in s for s in said)
    assert said[0].startswith(f"Step {30 + when[0] - 7}:")
    sound = trained(ONE, 200, **options)
    history = np.array(run.history)
    np.testing.assert_array_equal(history[:35], np.array(sound.history)[:35])
    kept = 90 if 14 in when else 60  # the end of the last cycle that was broken
    assert (history[6:kept] == history[10]).all()
    assert history[10].tolist() != [1 / 3] * 3
    assert (history[kept + 10] != history[10]).any()
    assert np.isfinite(history).all() and run.outcome < sound.outcome + 0.05


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_measurement_of_the_regression(value, caplog):
    """Measurement k is at step 20 + 5 k, until the 24th breaks; then there is one more at 140."""
    options = {"estimator": "regression", "eta": 0.05}  # far from the floor by then
    with caplog.at_level(logging.WARNING, LOGGER):
        run = trained(ONE, 200, broken={24: value}, **options)
    assert run.controller.skipped == 1
    assert [r.getMessage() for r in caplog.records] == [
        "Step 140: the loss of ['domain 0'] is not finite; the weights stay as they are."
    ]
    sound = trained(ONE, 200, **options)
    history = np.array(run.history)  # [k] after step k + 1
    np.testing.assert_array_equal(history[:139], sound.history[:139])
    assert (history[138] != history[133]).any() and (history[139:144] == history[138]).all()
    assert (history[144] != history[138]).any() and np.isfinite(history).all()
    assert (run.measured, sound.measured) == (1 + 36 + 1, 1 + 36)
    np.testing.assert_allclose(history[-1], sound.history[-1], atol=0.1)


@estimators
def test_losses_that_are_never_numbers(estimator):
    broken = dict.fromkeys(range(1000), math.nan)
    run = trained(ONE, 200, broken=broken, estimator=estimator)
    assert run.controller.skipped == run.measured > 10
    assert all(w.tolist() == [1 / 3] * 3 for w in run.history)
    assert run.controller.record()["matrix"] is None


@estimators
def test_losses_that_do_not_fall_move_nothing(estimator):
    world = World([0, 0, 0], [400] * 3, [0.4] * 3)
    run = trained(world, 200, estimator=estimator)
    np.testing.assert_allclose(run.history, 1 / 3, atol=1e-9)


@estimators
def test_losses_that_rise_are_legal(estimator):
    world = World([-1, -1, -1], [400, 4000, 4000], [0.4] * 3)
    run = trained(world, 600, estimator=estimator)
    assert np.isfinite(run.history).all() and run.controller.weights.argmin() == 0
