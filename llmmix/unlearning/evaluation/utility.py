"""The model utility: a harmonic mean of several measures, low if one of them is low."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import hmean

COLLAPSED_BELOW = 0.01  # a component below this says that nothing is left


@dataclass(frozen=True)
class ModelUtility:
    """A harmonic mean, its `components`, the `least` one, and those below 0.01: `collapsed`."""

    value: float
    collapsed: tuple[str, ...]
    least: str
    components: dict[str, float]


def model_utility(components: Mapping[str, float] | Iterable[float]) -> ModelUtility:
    """The harmonic mean of n measures that are 0 at worst (arXiv 2401.06121).

        n / (1/x_1 + ... + 1/x_n),    0 if one of them is

    Raises:
        ValueError: `components` is empty, or one of them is missing, negative or not finite.
    """
    given = (
        components
        if isinstance(components, Mapping)
        else {str(place): value for place, value in enumerate(components)}
    )
    if not given:
        raise ValueError("`components` must hold at least one value, got none.")
    for name, value in given.items():
        if value is None or not 0 <= value < math.inf:
            raise ValueError(
                f"Component `{name}` must be a number of at least 0, got {value}; measure it "
                "again, or leave it out and say so."
            )
    values = {str(name): float(value) for name, value in given.items()}
    collapsed = tuple(name for name, value in values.items() if value < COLLAPSED_BELOW)
    with np.errstate(over="ignore"):  # 1/x of the smallest floats: the mean is then 0
        mean = float(hmean(list(values.values())))
    return ModelUtility(mean, collapsed, min(values, key=values.__getitem__), values)
