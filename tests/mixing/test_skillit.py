"""Skill-It against numbers worked out by hand; see test_controllers.py for runs."""

import math

import numpy as np
import pytest

from llmmix.mixing.skillit import SkillIt, SkillItConfig, influence_graph, skillit_graph
from llmmix.mixing.weights import stratified
from tests.mixing.test_controllers import ABC, observation, shares


def test_a_graph_has_the_source_in_its_row():
    graph = skillit_graph([2, 4], [[1, 3], [2, 2], [2.5, 4]])
    np.testing.assert_allclose(graph, [[0.5, 0.25], [0, 0.5], [-0.25, 0]])
    by_name = {"a": {"y": 2, "x": 1}, "c": {"x": 5, "y": 6}, "b": {"x": 3, "y": 4}}
    values = influence_graph(by_name, ABC, ["x", "y"])
    np.testing.assert_array_equal(values, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(influence_graph(values, ABC, ["x", "y"]), values)
    np.testing.assert_array_equal(influence_graph(None, ["a", "b"], ["b", "a"]), [[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("start", "end", "match"),
    [
        ([1, 1], [[1, 1, 1]], "end_losses"),
        ([1, 1], [1, 1], "end_losses"),
        ([[1, 1]], [[1, 1]], "end_losses"),
        ([1, 0], [[1, 1]], "start_losses"),
        ([1, math.nan], [[1, 1]], "start_losses"),
        ([1, 1], [[1, math.inf]], "end_losses"),
    ],
)
def test_losses_that_make_no_graph(start, end, match):
    with pytest.raises(ValueError, match=f"`{match}` must"):
        skillit_graph(start, end)


@pytest.mark.parametrize(
    ("graph", "targets", "match"),
    [
        (None, ["x", "y"], "be the domains .* where graph=None"),
        (None, [], "`targets` must name at least one"),
        ([[1, 2], [3, 4]], ["x", "y"], r"\(sources, targets\) = \(3, 2\)"),
        ([[1, 2, 3], [4, 5, 6]], ["x", "y"], r"\(3, 2\), got \(2, 3\)"),
        (np.full((3, 2), np.nan), ["x", "y"], "`graph` must be finite"),
        ({"x": {"a": 1, "b": 1, "c": 1}, "y": {"a": 1, "b": 1, "c": 1}}, ["x", "y"], "sources"),
        ({name: {"x": 1} for name in ABC}, ["x", "y"], "targets must be"),
        ({name: {"x": 1, "y": 1, "z": 1} for name in ABC}, ["x", "y"], "targets must be"),
    ],
)
def test_graphs_of_other_shapes_and_names(graph, targets, match):
    with pytest.raises(ValueError, match=match):
        SkillIt(SkillItConfig(graph=graph), ABC, targets, stratified(3))


def test_skillit_tilts_by_a_graph_that_is_not_symmetric():
    """S = [[1, .5], [0, 1]]: a helps both targets, b only its own."""
    config = SkillItConfig(eta=0.5, window=2, update_steps=10, graph=[[1, 0.5], [0, 1]])
    skillit = SkillIt(config, ["a", "b"], ["a", "b"], [0.25, 0.75])
    e = math.exp
    # S @ 1 = (1.5, 1)
    np.testing.assert_allclose(skillit.weights, shares(e(0.75), 3 * e(0.5)))
    for losses, tilt in [
        ((2, 1), (2.5, 1)),  # S @ (2, 1)
        ((1, 3), (5, 4)),  # S @ (3, 4), the sum of two
        ((1, 1), (4, 4)),  # S @ (2, 4): the first is out of the window
    ]:
        skillit.observe(observation(losses=losses))
        tilted = shares(e(0.5 * tilt[0]), 3 * e(0.5 * tilt[1]))  # from w_0 each time
        np.testing.assert_allclose(skillit.weights, tilted)


def test_skillit_on_three_sources_and_two_targets():
    graph = {"a": {"x": 1, "y": 0}, "b": {"x": 0, "y": 2}, "c": {"x": -1, "y": 1}}
    skillit = SkillIt(SkillItConfig(eta=1, graph=graph), ABC, ["x", "y"], stratified(3))
    np.testing.assert_allclose(skillit.weights, shares(math.e, math.e**2, 1))
    skillit.observe(observation(losses=(2, 0.5)))
    np.testing.assert_allclose(skillit.weights, shares(math.e**2, math.e, math.exp(-1.5)))
    with pytest.raises(ValueError, match=r"signal\['losses'\]. must be of shape \(2,\)"):
        skillit.observe(observation(losses=(1, 1, 1)))


def test_skillit_keeps_a_share_of_zero_and_survives_huge_losses():
    skillit = SkillIt(SkillItConfig(), ABC, ABC, [0.5, 0.5, 0])
    for _ in range(3):
        skillit.observe(observation(losses=(1e6, 2e6, 3e6)))
    np.testing.assert_array_equal(skillit.weights, [0, 1, 0])


def test_skillit_updates_every_tenth_by_default_and_not_at_the_end():
    skillit = SkillIt(SkillItConfig(), ABC, ABC, stratified(3))
    assert [s[1:3] for s in skillit.plan(0, 25)] == [(2, "losses")]
    assert [s[1:3] for s in skillit.plan(24, 25)] == [(1, None)]
    assert [s[1:3] for s in skillit.plan(3, 8)] == [(1, "losses")]
    assert skillit.plan(8, 8) == []
    skillit = SkillIt(SkillItConfig(update_steps=4), ABC, ABC, stratified(3))
    assert [skillit.plan(step, 10)[0].steps for step in (0, 1, 3, 4, 8)] == [4, 3, 1, 4, 2]


def test_a_state_of_another_window_is_refused():
    state = SkillIt(SkillItConfig(window=2), ABC, ABC, stratified(3)).state_dict()
    with pytest.raises(ValueError, match=r"state\['losses'\]. must be of shape \(3, 3\)"):
        SkillIt(SkillItConfig(), ABC, ABC, stratified(3)).load_state_dict(state)
