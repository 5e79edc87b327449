"""Which weights govern which draws."""

import numpy as np
import pandas as pd
import pytest

from tests.mixing.samplers import domains_of, make, one_by_one


def test_a_plan_ends_the_draws_and_another_lets_them_go_on():
    sampler = make(seed=3)
    sampler.set_plan([([1, 0, 0], 5), ([0, 1, 0], 3)])
    assert sampler.remaining == 8
    assert domains_of(list(sampler)).tolist() == [0] * 5 + [1] * 3
    assert sampler.remaining == 0 and list(sampler) == [] and sampler.take(4) is None
    assert sampler.weights.tolist() == [0, 1, 0]  # of the last draw decided
    sampler.set_plan([([0, 0, 1], 4)])
    assert sampler.take(100).domains.tolist() == [2] * 4 and sampler.take(1) is None
    sampler.use(1)
    assert sampler.position == 9 and sampler.remaining == 3
    # a plan begins at the first draw that was not used
    sampler.set_plan([([1, 0, 0], 2), ([0, 1, 0], None)])
    assert domains_of(one_by_one(sampler, 6)).tolist() == [0, 0, 1, 1, 1, 1]
    assert sampler.remaining == float("inf")
    assert sampler.counts == {"a": 7, "b": 7, "c": 1}


def test_a_draw_ahead_ends_where_the_weights_change():
    sampler = make(seed=3)
    sampler.set_plan([([1, 0, 0], 5), ([0, 1, 0], 3), ([0, 0, 1], None)])
    assert [len(sampler.take(100).rows) for _ in range(3)] == [5, 3, 100]
    assert sampler.position == 0 and sampler.weights.tolist() == [1, 0, 0]


def test_a_new_plan_raises_the_version():
    sampler = make(seed=3)
    versions = [sampler.version]
    for change in (
        lambda: sampler.set_weights([1, 0, 0]),
        lambda: sampler.set_plan([([1, 0, 0], 3)]),
        lambda: sampler.load_state_dict(sampler.state_dict()),
        sampler.reset,
    ):
        change()
        versions.append(sampler.version)
    assert versions == sorted(set(versions))
    one_by_one(sampler, 10)
    assert sampler.version == versions[-1]


def test_weights_are_a_copy():
    given = np.array([1, 2, 1])
    sampler = make(given, seed=3)
    sampler.weights[:] = 0
    sampler.set_weights(given)
    assert given.tolist() == [1, 2, 1] and given.dtype == int
    given[:] = 0
    assert sampler.weights.tolist() == [0.25, 0.5, 0.25]


def test_weights_go_by_name():
    expected = [0.5, 0.2, 0.3]
    by_name = {"c": 0.3, "a": 0.5, "b": 0.2}
    assert make(by_name).weights.tolist() == pytest.approx(expected)
    assert make(pd.Series(by_name)).weights.tolist() == pytest.approx(expected)
    sampler = make(None)
    assert sampler.weights.tolist() == pytest.approx([1 / 3] * 3)
    sampler.set_plan([(by_name, 3)])
    assert sampler.weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "segments", [[], [([1, 1, 1], -3)], [([1, 1, 1], 2.5)], [([1, 1, 1], None), ([1, 0, 0], 3)]]
)
def test_plans_that_are_none_are_refused(segments):
    with pytest.raises(ValueError, match="`segments`"):
        make().set_plan(segments)
