"""Numbers that belong to items, one an item: read, checked, and averaged where they are finite."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

Numbers: TypeAlias = ArrayLike | Sequence[float | None]  # None where an item has no number


def as_vector(name: str, values: Numbers) -> np.ndarray:
    """The values as floats, (n,); None becomes NaN.

    Args:
        name: Name of the values, for errors.
        values: One number an item.

    Raises:
        ValueError: A value is no number, or there are several an item.
    """
    try:
        vector = np.atleast_1d(np.asarray(values, dtype=float))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must hold one number an item: {error}.") from error
    if vector.ndim != 1:
        raise ValueError(f"`{name}` must hold one number an item, got shape {vector.shape}.")
    return vector


def as_nlls(name: str, values: Numbers) -> np.ndarray:
    """The values as negative log-likelihoods, (n,).

    Raises:
        ValueError: A value is negative by more than rounding explains, or no number.
    """
    nlls = as_vector(name, values)
    if (nlls < -1e-3).any():  # more than the rounding of a certain token
        least = np.nanmin(nlls)
        raise ValueError(f"`{name}` must hold negative log-likelihoods, got {least}; negate them.")
    return nlls


def as_logps(name: str, values: Numbers) -> np.ndarray:
    """The values as log-probabilities, (n,).

    Raises:
        ValueError: A value is positive by more than rounding explains, or no number.
    """
    logps = as_vector(name, values)
    if (logps > 1e-3).any():
        most = np.nanmax(logps)
        raise ValueError(f"`{name}` must hold log-probabilities, got {most}; negate them.")
    return logps


def mean_of(values: Numbers) -> tuple[float | None, int]:
    """Mean of the values that are finite numbers, and how many None, NaN or inf were left out."""
    vector = as_vector("values", values)
    kept = vector[np.isfinite(vector)]
    return (float(kept.mean()) if len(kept) else None), len(vector) - len(kept)


def why_not_comparable(sides: Mapping[str, np.ndarray], least: int) -> str | None:
    """Why two samples cannot be compared, or None if they can.

    Args:
        sides: Numbers of each side, by its name.
        least: How many numbers a side needs.
    """
    for name, values in sides.items():
        if len(values) < least:
            return f"`{name}` has {len(values)} values, and at least {least} are needed"
        if bad := int((~np.isfinite(values)).sum()):
            return f"{bad} of the {len(values)} values of `{name}` are not finite"
    return None
