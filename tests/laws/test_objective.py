import numpy as np
import pytest

from llmmix.laws.objective import bounds_of


def test_bounds_by_number_array_and_name():
    lower, upper = bounds_of(3)
    np.testing.assert_array_equal([lower, upper], [[0] * 3, [1] * 3])
    lower, upper = bounds_of(3, lower=0.1, upper=[0.5, 0.6, 0.7])
    np.testing.assert_array_equal([lower, upper], [[0.1] * 3, [0.5, 0.6, 0.7]])
    lower, upper = bounds_of(3, lower={"b": 0.2}, upper={"c": 0.3}, names=["a", "b", "c"])
    np.testing.assert_array_equal([lower, upper], [[0, 0.2, 0], [1, 1, 0.3]])
    given = np.array([1, 1, 0])  # integers of the caller's
    bounds_of(3, upper=given)[1][:] = 7
    np.testing.assert_array_equal(given, [1, 1, 0])


def test_epochs_cap_shares():
    _, upper = bounds_of(
        3, upper=0.9, available=[100, 1000, np.inf], tokens=2000, max_epochs=4, names=list("abc")
    )
    np.testing.assert_allclose(upper, [0.2, 0.9, 0.9])
    _, upper = bounds_of(2, available={"a": 10}, tokens=100, max_epochs=1, names=["a", "b"])
    np.testing.assert_allclose(upper, [0.1, 1.0])


def test_a_run_too_long_is_refused_with_the_one_that_is_not():
    plan = {"available": [100.0, 300.0, 50.0], "upper": [1, 0.5, 1], "names": ["a", "b", "c"]}
    with pytest.raises(ValueError) as caught:
        bounds_of(3, tokens=1000, max_epochs=2, **plan)
    message = str(caught.value)
    assert "`max_epochs`" in message and "'a' <= 0.2" in message and "'c' <= 0.1" in message
    # b is held by its own bound: 0.5 + 2 * 150 / D = 1 at D = 600, or e = 1000 * .5 / 150
    assert "plan at most 599 tokens" in message or "plan at most 600 tokens" in message
    assert "3.3334 epochs" in message
    bounds_of(3, tokens=599, max_epochs=2, **plan)
    bounds_of(3, tokens=1000, max_epochs=3.3334, **plan)
    with pytest.raises(ValueError, match="plan at most"):
        bounds_of(3, tokens=601, max_epochs=2, **plan)
    with pytest.raises(ValueError, match="cannot fill a run; raise `upper`"):
        bounds_of(2, upper=[0.5, 1], available=[9e9, 0], tokens=10, max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": [0.5, 0.1, 0.1], "upper": 0.4}, "`lower` of domain 0 is 0.5, above its upper"),
        ({"lower": {"b": 0.5}, "upper": 0.4, "names": list("abc")}, "`lower` of 'b' is 0.5, above"),
        ({"lower": 0.4}, "`lower` must sum to at most 1, got 1.2"),
        ({"upper": 0.3}, "`upper` must sum to at least 1, got 0.9"),
        ({"lower": -0.1}, r"`lower` must lie in \[0, 1\], got \{0: -0.1"),
        ({"upper": [1, np.nan, 1]}, r"`upper` must lie in \[0, 1\], got \{1: nan\}"),
        ({"upper": 1.5}, r"`upper` must lie in \[0, 1\]"),
        ({"lower": [0.1, 0.1]}, r"`lower` must be one number or 3, got shape \(2,\)"),
        ({"upper": {"z": 1}, "names": list("abc")}, "`upper`: no domain z; there are"),
        ({"upper": {"a": 1}}, "`upper` is given by name: pass `names`"),
        ({"names": ["a", "b"]}, "`names` must be 3 different names"),
        ({"names": ["a", "b", "b"]}, "`names` must be 3 different names"),
        ({"tokens": 10}, "pass `available` and `max_epochs` too"),
        ({"available": 5, "tokens": 10}, "pass `max_epochs` too"),
        ({"available": -1, "tokens": 10, "max_epochs": 1}, r"`available` must lie in \[0, inf\]"),
        ({"available": 1, "tokens": 0, "max_epochs": 1}, "`tokens` must be positive and finite"),
        ({"available": 1, "tokens": 9, "max_epochs": np.nan}, "`max_epochs` must be positive"),
        (
            {"lower": 0.3, "available": [1, 99, 99], "tokens": 10, "max_epochs": 1},
            "domain 0 is 0.3, above its upper bound 0.1, the cap of 1 epochs",
        ),
    ],
)
def test_bad_bounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bounds_of(3, **arguments)
