"""What a search is asked for, checked: weights of the targets, bounds on shares, a prior.

`MixtureProposer` (llmmix/laws/optimum.py) passes it to the searches in llmmix/laws/search.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from llmmix.laws.inputs import Inputs, by_name, check_mixtures, listed

Shares = ArrayLike | Mapping[str, float] | None  # one number, k numbers, or by name
Objective = str | ArrayLike | Mapping[str, float] | None


def shares_of(
    what: str, given: Shares, k: int, default: float, most: float, names: Sequence[str] | None
) -> np.ndarray:
    """(k,) numbers from None, one number, k numbers or numbers by name.

    Args:
        what: Name of the argument, for error messages.
        given: Value of the argument.
        k: Number of domains.
        default: Value of a domain for which nothing is given.
        most: Largest value that is allowed.
        names: k names of the domains, if they have names.

    Raises:
        ValueError: `given` has another length, an unknown name, or a number outside [0, most].
    """
    given = by_name(given)
    if isinstance(given, dict):
        if names is None:
            raise ValueError(f"`{what}` is given by name: pass `names`, or give {k} numbers.")
        given = _in_order(what, "domain", given, names, default)
    vector = np.asarray(default if given is None else given, dtype=np.float64)
    if vector.shape not in ((), (k,)):
        raise ValueError(f"`{what}` must be one number or {k}, got shape {vector.shape}.")
    vector = np.broadcast_to(vector, (k,)).copy()
    bad = ~((vector >= 0) & (vector <= most))  # true of NaN
    if bad.any():
        which = {names[j] if names else j: float(vector[j]) for j in np.flatnonzero(bad).tolist()}
        raise ValueError(f"`{what}` must lie in [0, {most:g}], got {which}.")
    return vector


def _in_order(
    argument: str, kind: str, given: dict[str, float], names: Sequence, default: float
) -> list[float]:
    """Numbers by name in the order of all names; `default` for those left out.

    Raises:
        ValueError: `given` has a name that is not among `names`.
    """
    known = [str(name) for name in names]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"`{argument}`: no {kind} {listed(unknown)}; there are {list(names)}.")
    return [given.get(name, default) for name in known]


def _supply(k: int, available, tokens, max_epochs, names) -> np.ndarray | None:
    """(k,) tokens that each domain has; None without a limit on epochs."""
    plan = {"available": available, "tokens": tokens, "max_epochs": max_epochs}
    missing = [f"`{name}`" for name, one in plan.items() if one is None]
    if len(missing) == 3:
        return None
    if missing:
        raise ValueError(
            "A limit on epochs takes `available`, `tokens` and `max_epochs`: pass "
            f"{' and '.join(missing)} too."
        )
    for name in ("tokens", "max_epochs"):
        if not 0 < plan[name] < np.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {plan[name]}.")
    return shares_of("available", available, k, np.inf, np.inf, names)


def bounds_of(
    k: int,
    *,
    lower: Shares = None,
    upper: Shares = None,
    available: Shares = None,
    tokens: float | None = None,
    max_epochs: float | None = None,
    names: list[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on shares: those given, and p_j <= max_epochs * available_j / tokens.

    Args:
        k: Number of domains.
        lower: Smallest shares: one number, k numbers, or by name (default of a name: 0).
        upper: Largest shares, likewise (default of a name: 1).
        available: Number of tokens that each domain has, likewise (default of a name: inf).
        tokens: Number of tokens of the planned run.
        max_epochs: Largest number of passes of the planned run over a domain.
        names: k names of the domains, for error messages and for bounds by name.

    Returns:
        lower and upper, (k,) each.

    Raises:
        ValueError: A bound is outside [0, 1], or no mixture meets the bounds.
    """
    if names is not None and (len(names) != k or len(set(names)) != k):
        raise ValueError(f"`names` must be {k} different names, got {list(names)}.")
    low = shares_of("lower", lower, k, 0.0, 1.0, names)
    given = high = shares_of("upper", upper, k, 1.0, 1.0, names)
    supply = _supply(k, available, tokens, max_epochs, names)
    if supply is not None and tokens and max_epochs:
        high = np.minimum(given, max_epochs * supply / tokens)
    over = np.flatnonzero(low > high)
    if len(over):
        j = int(over[0])
        why = "." if high[j] == given[j] else f", the cap of {max_epochs:g} epochs."
        raise ValueError(
            f"`lower` of {_name(j, names)} is {low[j]:g}, above its upper bound {high[j]:g}{why} "
            "Lower the first or raise the second."
        )
    if low.sum() > 1 + 1e-9:
        raise ValueError(f"`lower` must sum to at most 1, got {low.sum():.6g}: lower some.")
    if given.sum() < 1 - 1e-9:
        raise ValueError(f"`upper` must sum to at least 1, got {given.sum():.6g}: raise some.")
    if high.sum() < 1 - 1e-9:
        _refuse_plan(given, high, supply, tokens, max_epochs, names)
    return low, high


def _name(j: int, names: Sequence[str] | None) -> str:
    return f"{names[j]!r}" if names else f"domain {j}"


def _refuse_plan(given, high, supply, tokens, max_epochs, names):
    """Refuse epoch caps that leave no mixture; name the largest run and the fewest epochs.

    Raises:
        ValueError: Always.
    """
    tight = ", ".join(
        f"{_name(j, names)} <= {high[j]:.4g}" for j in np.flatnonzero(high < given).tolist()
    )
    message = f"`max_epochs` caps the shares at a sum of {high.sum():.4g} ({tight}): "
    if given[supply > 0].sum() < 1:
        raise ValueError(message + "the domains with tokens cannot fill a run; raise `upper`.")
    # Epochs per token of the run at which the caps sum to 1; the sum grows with them
    spare = np.where(supply > 0, supply, np.inf)
    most = (given / spare).max()
    rate = brentq(lambda x: np.minimum(given, x * supply).sum() - 1, 0, most * 1.001, xtol=1e-300)
    raise ValueError(
        f"{message}plan at most {np.floor(max_epochs / rate * (1 - 1e-9)):.0f} tokens instead of "
        f"{tokens:.0f}, or allow at least {np.ceil(rate * tokens * 1e4) / 1e4:.4f} epochs."
    )


def target_weights(objective: Objective, targets: Sequence) -> np.ndarray:
    """(m,) weights of sum 1 that an objective gives the targets.

    Args:
        objective: None for the mean over targets, a target's name, m weights, or weights by name.
        targets: m names.

    Raises:
        ValueError: A name is not among `targets`, or the weights are negative or all zero.
    """
    m = len(targets)
    if objective is None:
        return np.full(m, 1 / m)
    given = by_name({objective: 1.0} if isinstance(objective, str) else objective)
    if isinstance(given, dict):
        given = _in_order("objective", "target", given, targets, 0.0)
    weights = np.asarray(given, dtype=np.float64)
    if weights.shape != (m,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"`objective` must be {m} weights of at least 0, got {given}.")
    if not weights.sum():
        raise ValueError("`objective`: the weights are all 0; give one of them a weight.")
    return weights / weights.sum()


def prior_shares(prior: Shares, inputs: Inputs) -> np.ndarray:
    """(k,) shares of a prior; the mean mixture of the runs if none is given.

    Args:
        prior: Shares, (k,) or by name (default of a name: 0).
        inputs: The runs behind the law.

    Raises:
        ValueError: A name is not a domain, or the shares are not a mixture of all domains.
    """
    if prior is None:
        return inputs.mixtures.mean(0)
    domains, given = inputs.domains, by_name(prior)
    if isinstance(given, dict):
        given = _in_order("prior", "domain", given, domains, 0.0)
    if len(given) != len(domains):
        raise ValueError(f"`prior` must be {len(domains)} shares, got {len(given)}.")
    return check_mixtures(given, domains, "prior")[0]


def law_bounds(inputs: Inputs, **limits: Any) -> tuple[np.ndarray, np.ndarray]:
    """(k,) smallest and (k,) largest shares; domains that no run varied keep their share.

    Args:
        inputs: The runs behind the law.
        **limits: Arguments of `bounds_of`: lower, upper, available, tokens, max_epochs.

    Raises:
        ValueError: A bound is outside [0, 1], or no mixture meets the bounds.
    """
    names = [str(name) for name in inputs.domains]
    low, high = bounds_of(len(names), **limits, names=names)
    fixed = inputs.fixed
    low[fixed] = high[fixed] = inputs.mixtures[0, fixed]
    if low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
        raise ValueError(
            f"`lower` and `upper` leave no mixture beside {listed(inputs.unidentified)}, whose "
            f"share no run varied: widen them."
        )
    return low, high
