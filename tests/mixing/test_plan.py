"""The segments of a plan, step by step."""

import json

import numpy as np
import pytest

from llmmix.mixing.controllers import Segment
from llmmix.mixing.plan import Plan, ask_for_segments

FIRST = Segment(np.array([1.0, 0.0]), 2, "train", estimates=True)
SECOND = Segment(np.array([0.5, 0.5]), 3)


def planned() -> Plan:
    plan = Plan(2)
    plan.segments.extend([FIRST, SECOND])
    plan.begin_segment(np.array([4, 4]))
    return plan


def test_a_segment_is_measured_before_its_last_update_and_told_when_it_ends():
    plan = planned()
    assert plan.measures_batches
    due = []
    for _ in range(2):
        assert not plan.ended()
        plan.note_learning_rate(0.25)
        due.append(plan.due_before_update())
        assert plan.step()
    assert due == [None, "train"] and plan.ended()
    told = plan.observation(7, np.array([10, 6]), {"train": np.array([1.0, np.nan])})
    assert (told.step, told.steps, told.learning_rate) == (7, 2, 0.5)
    assert told.shares.tolist() == [0.75, 0.25]
    plan.segments.popleft()
    plan.begin_segment(np.array([10, 6]))
    assert not plan.measures_batches and plan.due_before_update() is None
    assert not plan.step() and not plan.ended()
    assert [segment.steps for segment in plan.left()] == [2]


def test_a_plan_goes_on_from_its_state():
    plan = planned()
    plan.note_learning_rate(0.25)
    plan.step()
    again = Plan(2)
    again.load_state_dict(json.loads(json.dumps(plan.state_dict())))
    assert again.state_dict() == plan.state_dict()
    assert again.due_before_update() == "train"
    assert [segment.steps for segment in again.left()] == [1, 3]


class Planning:
    def __init__(self, *segments):
        self.segments = segments

    def plan(self, step, total_steps):
        return list(self.segments)


def test_plans_are_checked():
    assert ask_for_segments(Planning(FIRST, SECOND), 5, 10) == [FIRST, SECOND]
    with pytest.raises(ValueError, match="Planning.plan gave 5 steps at step 6 of 10"):
        ask_for_segments(Planning(FIRST, SECOND), 6, 10)
    with pytest.raises(ValueError, match="Planning.plan gave 0 steps"):
        ask_for_segments(Planning(), 0, 10)
    with pytest.raises(ValueError, match="`measure` must be one of .* got 'loss'"):
        ask_for_segments(Planning(Segment(np.ones(2) / 2, 1, "loss")), 0, 10)
