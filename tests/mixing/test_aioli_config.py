"""The options of Aioli: what is refused, what is parsed, what fits the domains."""

import dataclasses
import math

import pytest
from transformers import HfArgumentParser

from llmmix.mixing.aioli import AioliConfig
from tests.mixing.simulated import AB, estimators, make

OUT_OF_RANGE = [
    ("estimator", "diagonal"),
    ("estimator", None),
    ("anchor", "none"),
    ("compat", "paper"),
    ("compat", ""),
    ("update_steps", 0),
    ("update_steps", -3),
    ("probe_steps", 0),
    ("first_step", -1),
    ("rounds", 0),
    ("prior_steps", -1),
    ("eta", -0.1),
    ("eta", math.nan),
    ("memory", 0),
    ("memory", -1.0),
    ("transfer", 0),
    ("transfer", math.nan),
    ("ema", -0.1),
    ("ema", 1.1),
    ("tilt", -0.1),
    ("tilt", 1.5),
    ("min_share", -0.1),
    ("min_share", 1.01),
    ("evidence", -1),
    ("evidence", math.nan),
]
NOT_WHOLE_OR_FINITE = [
    ("one_hot_factor", 0),
    ("one_hot_factor", 1.5),
    ("one_hot_factor", math.nan),
    ("eta", math.inf),
    ("update_steps", 2.5),
    ("update_steps", math.inf),
    ("update_steps", "many"),
    ("rounds", 1.5),
    ("order_seed", -1),
    ("prior_weights", [-1.0, 2.0]),
    ("prior_weights", [0.0, 0.0]),
    ("target_weights", [math.nan, 1.0]),
    ("rounds", None),
    ("tilt", None),
    ("order_seed", None),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [*OUT_OF_RANGE, *NOT_WHOLE_OR_FINITE],
)
def test_what_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        AioliConfig(**{name: value})


def test_the_published_code_has_one_estimator():
    with pytest.raises(ValueError, match="`compat='official'`"):
        AioliConfig(compat="official", estimator="regression")


@estimators
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prior_weights": [1, 2, 3]}, "`prior_weights` must have one value for each of the 2"),
        ({"prior_weights": [1, -2]}, "`prior_weights` must be finite and not negative"),
        ({"prior_weights": [0, 0]}, "`prior_weights` are all zero"),
        ({"target_weights": [1, 2]}, "`target_weights` must have one value for each of the 3"),
        ({"target_weights": [1, math.inf, 1]}, "`target_weights` must be finite"),
    ],
)
def test_weights_that_do_not_fit_the_domains(estimator, options, says):
    with pytest.raises(ValueError, match=says):
        make(AB, targets=list("xyz"), estimator=estimator, **options)


def test_a_factor_that_does_not_fit_the_domains():
    with pytest.raises(ValueError, match="`one_hot_factor` must lie above 1/4"):
        make(list("abcd"), one_hot_factor=0.25)
    make(["a"], one_hot_factor=0.25)  # no probes, no question


def test_options_are_parsed():
    parser = HfArgumentParser(AioliConfig)
    (default,) = parser.parse_args_into_dataclasses([])
    assert default == AioliConfig()
    given = {
        "estimator": "one_hot",
        "update_steps": 50,
        "rounds": 3,
        "probe_steps": 2,
        "one_hot_factor": 0.6,
        "eta": 1.5,
        "ema": 0.1,
        "tilt": 0.2,
        "memory": 0.4,
        "transfer": 0.5,
        "min_share": 0.0,
        "first_step": 0,
        "prior_weights": [1.0, 2.0, 0.5],
        "prior_steps": 10,
        "anchor": "uniform",
        "target_weights": [1.0, 0.0],
        "compat": "official",
        "evidence": 2.0,
        "order_seed": 7,
    }
    assert set(given) == {field.name for field in dataclasses.fields(AioliConfig)}
    line = []
    for name, value in given.items():
        line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    (parsed,) = parser.parse_args_into_dataclasses(line)
    assert parsed == AioliConfig(**given)
    (parsed,) = parser.parse_dict({"ema": None, "eta": None, "prior_weights": None})
    assert parsed == AioliConfig(ema=None)
    assert all(field.metadata["help"] for field in dataclasses.fields(AioliConfig))


def test_a_seed_orders_the_probes():
    def order(seed):
        return [
            s.weights.argmax() for s in make(list("abcdef"), order_seed=seed).plan(300, 3000)[1:]
        ]

    assert order(0) == order(0) != order(1)
    assert order(0)[:6] != order(0)[6:]  # each round has its own
