"""Checks of what the mixing methods are given: weights of domains, options, targets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Weights = Mapping[str, float] | Sequence[float] | np.ndarray  # by name, or in the domains' order


def check_weights(weights: Weights, names: list[str], argument: str = "weights") -> np.ndarray:
    """Weights of domains as a point of the simplex.

    Args:
        weights: (m,) in the order of `names`, or a mapping from each of them.
        names: Names of the m domains.
        argument: Name of the weights in error messages.

    Returns:
        (m,) float64, a copy that sums to one.

    Raises:
        ValueError: `weights` has another length or other names than the domains, holds a value that
            is not a number, is negative, NaN or infinite, or holds only zeros.
    """
    listed: Any = weights
    if hasattr(listed, "keys"):
        if unknown := set(listed.keys()) ^ set(names):
            raise ValueError(
                f"`{argument}` must name each of the domains {names} once; {sorted(unknown)} "
                "is missing or unknown."
            )
        listed = [listed[name] for name in names]
    try:
        given = np.asarray(listed)
    except ValueError:  # lists of several lengths
        given = np.array(None)
    if given.dtype.kind not in "biuf":
        raise ValueError(f"`{argument}` must be numbers, one a domain, got {listed!r}.")
    given = given.astype(np.float64)
    if given.shape != (len(names),):
        raise ValueError(
            f"`{argument}` must have one value for each of the {len(names)} domains {names}, got "
            f"{len(given.ravel())}."
        )
    shown = dict(zip(names, given.tolist(), strict=True))
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError(f"`{argument}` must be finite and not negative, got {shown}.")
    if not given.any():
        raise ValueError(f"`{argument}` are all zero: give at least one domain a share.")
    given = given / given.max()  # the sum of huge ones is infinite
    return given / given.sum()


def require(met: object, name: str, wanted: str, given: object) -> None:
    """Refuse an argument that does not meet its condition.

    Raises:
        ValueError: `met` is false; the message is "`name` must `wanted`, got `given`.".
    """
    if not met:
        raise ValueError(f"`{name}` must {wanted}, got {given!r}.")


def require_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse a value that is not a whole number of at least `least`.

    Raises:
        ValueError: `value` is not an int, or is below `least`.
    """
    met = isinstance(value, int) and value >= least
    require(met, name, f"be a whole number of at least {least}", value)


def require_same(names: list[str], targets: list[str], what: str) -> None:
    """Refuse targets that are not the domains; `what` says when they must be.

    Raises:
        ValueError: `targets` are not `names` in some order.
    """
    same = sorted(names) == sorted(targets)
    require(same, "targets", f"be the domains {names} where {what}", targets)
