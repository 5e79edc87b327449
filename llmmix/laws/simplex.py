"""The part of the simplex that a plan leaves, and how far a mixture lies from the runs."""

import numpy as np
from scipy.optimize import brentq, linprog
from scipy.spatial import KDTree

from llmmix.laws.inputs import by_name


def shares_of(what: str, given, k: int, default: float, most: float, names) -> np.ndarray:
    """(k,) out of None, a scalar, k numbers or numbers by name.

    Args:
        what: The argument's name, for the messages.
        given: Of it.
        k: Domains.
        default: Where nothing is given.
        most: The largest that may be.
        names: k names of domains, if there are any.

    Raises:
        ValueError: Another length, an unknown name, or a number outside [0, most].
    """
    given = by_name(given)
    if isinstance(given, dict):
        if names is None:
            raise ValueError(f"`{what}` is given by name: pass `names`, or give {k} numbers.")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"`{what}` names {unknown}, which are not among {list(names)}.")
        given = [given.get(name, default) for name in names]
    vector = np.asarray(default if given is None else given, dtype=np.float64)
    if vector.shape not in ((), (k,)):
        raise ValueError(f"`{what}` must be one number or {k}, got shape {vector.shape}.")
    vector = np.broadcast_to(vector, (k,)).copy()
    bad = ~((vector >= 0) & (vector <= most))  # true of NaN
    if bad.any():
        which = {names[j] if names else int(j): float(vector[j]) for j in np.flatnonzero(bad)}
        raise ValueError(f"`{what}` must lie in [0, {most:g}], got {which}.")
    return vector


def _supply(k: int, available, tokens, max_epochs, names) -> np.ndarray | None:
    """(k,) tokens there are, None without a limit on epochs."""
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
    lower=None,
    upper=None,
    available=None,
    tokens: float | None = None,
    max_epochs: float | None = None,
    names: list[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on shares: given ones, and p_j <= max_epochs * available_j / tokens.

    Args:
        k: Domains.
        lower: Smallest shares: a number, k numbers, or by name (those left out: 0).
        upper: Largest shares, likewise (those left out: 1).
        available: Tokens each domain has, likewise; inf for no limit (those left out).
        tokens: Of the run that is planned.
        max_epochs: Times a token may be seen in it.
        names: k names of domains, for the messages and for bounds by name.

    Returns:
        lower and upper, (k,) each.

    Raises:
        ValueError: A bound that is no share, or bounds that no mixture meets.
    """
    if names is not None and (len(names) != k or len(set(names)) != k):
        raise ValueError(f"`names` must be {k} different names, got {list(names)}.")
    low = shares_of("lower", lower, k, 0.0, 1.0, names)
    given = high = shares_of("upper", upper, k, 1.0, 1.0, names)
    supply = _supply(k, available, tokens, max_epochs, names)
    if supply is not None:
        high = np.minimum(given, max_epochs * supply / tokens)
    over = np.flatnonzero(low > high)
    if len(over):
        j = over[0]
        why = "." if high[j] == given[j] else f", the cap of {max_epochs:g} epochs."
        raise ValueError(
            f"`lower` of {_name(j, names)} is {low[j]:g}, above its upper bound {high[j]:g}{why} "
            "Lower the one or raise the other."
        )
    if low.sum() > 1 + 1e-9:
        raise ValueError(f"`lower` must sum to at most 1, got {low.sum():.6g}: lower some.")
    if given.sum() < 1 - 1e-9:
        raise ValueError(f"`upper` must sum to at least 1, got {given.sum():.6g}: raise some.")
    if high.sum() < 1 - 1e-9:
        _refuse_plan(given, high, supply, tokens, max_epochs, names)
    return low, high


def _name(j: int, names) -> str:
    return f"{names[j]!r}" if names else f"domain {j}"


def _refuse_plan(given, high, supply, tokens, max_epochs, names):
    """Say which caps leave no mixture, and the largest run or the fewest epochs that have one."""
    tight = ", ".join(f"{_name(j, names)} <= {high[j]:.4g}" for j in np.flatnonzero(high < given))
    message = f"`max_epochs` caps the shares at a sum of {high.sum():.4g} ({tight}): "
    if given[supply > 0].sum() < 1:
        raise ValueError(message + "the domains with tokens cannot fill a run; raise `upper`.")
    # Epochs per token of the run at which the caps sum to 1; their sum grows with it
    spare = np.where(supply > 0, supply, np.inf)
    most = (given / spare).max()
    rate = brentq(lambda x: np.minimum(given, x * supply).sum() - 1, 0, most * 1.001, xtol=1e-300)
    raise ValueError(
        f"{message}plan at most {np.floor(max_epochs / rate * (1 - 1e-9)):.0f} tokens instead of "
        f"{tokens:.0f}, or allow at least {np.ceil(rate * tokens * 1e4) / 1e4:.4f} epochs."
    )


def project(p: np.ndarray, lower: np.ndarray | float, upper: np.ndarray | float) -> np.ndarray:
    """The nearest points that sum to 1 within bounds: clip(p - t, lower, upper), t by bisection.

    Args:
        p: (..., k), any numbers.
        lower: (k,) or one number.
        upper: (k,) or one number.

    Returns:
        (..., k).

    Raises:
        ValueError: Bounds that no mixture meets, or a NaN.
    """
    p = np.asarray(p, dtype=np.float64)
    lower, upper = (np.broadcast_to(np.asarray(b, float), p.shape[-1:]) for b in (lower, upper))
    if not (lower.sum() <= 1 + 1e-9 and upper.sum() >= 1 - 1e-9 and (lower <= upper).all()):
        raise ValueError(
            f"`lower` and `upper` must leave a mixture, got sums {lower.sum():.6g} and "
            f"{upper.sum():.6g}: see `bounds_of`."
        )
    if not np.isfinite(p).all():
        raise ValueError("`p` must be finite to be projected, got NaN or inf: drop those rows.")
    least = (p - upper).min(-1, keepdims=True)
    most = (p - lower).max(-1, keepdims=True)
    for _ in range(60):
        t = (least + most) / 2
        over = np.clip(p - t, lower, upper).sum(-1, keepdims=True) > 1
        least, most = np.where(over, t, least), np.where(over, most, t)
    clipped = np.clip(p - t, lower, upper)
    # What bisection left over, of the order of rounding, goes to the shares between their bounds
    tiny = 4e-16 * np.maximum(np.abs(p).max(-1, keepdims=True), 1)
    clipped = np.where(clipped - lower < tiny, lower, clipped)
    clipped = np.where(upper - clipped < tiny, upper, clipped)
    free = (clipped > lower) & (clipped < upper)
    rest = (1 - clipped.sum(-1, keepdims=True)) / np.maximum(free.sum(-1, keepdims=True), 1)
    return np.clip(clipped + rest * free, lower, upper)


def nearest_run(p: np.ndarray, mixtures: np.ndarray) -> tuple[int, float]:
    """The index of the row of mixtures (n, k) nearest to p (k,), and 1/2 sum_j |p_j - q_j|."""
    distances = np.abs(np.asarray(mixtures) - p).sum(1) / 2
    nearest = int(distances.argmin())
    return nearest, float(distances[nearest])


def hull_distance(p: np.ndarray, mixtures: np.ndarray) -> float:
    """The smallest total variation distance from p (k,) to a mean of rows of mixtures (n, k).

    min_{w, t} 1/2 sum_j (t+_j + t-_j),   sum_i w_i q_i + t+ - t- = p,   sum_i w_i = 1,   all >= 0
    """
    n, k = np.shape(mixtures)
    cost = np.concatenate([np.zeros(n), np.full(2 * k, 0.5)])
    matrix = np.block([[np.transpose(mixtures), np.eye(k), -np.eye(k)]])
    matrix = np.vstack([matrix, np.concatenate([np.ones(n), np.zeros(2 * k)])])
    solved = linprog(cost, A_eq=matrix, b_eq=np.append(p, 1.0), method="highs")
    if not solved.success:  # the program is always feasible and bounded: its numbers are not
        raise ValueError(f"`p` and `mixtures` must be finite for a distance: {solved.message}")
    return max(float(solved.fun), 0.0)


def typical_spacing(mixtures: np.ndarray) -> float:
    """The median over the distinct rows of (n, k) of the distance to their nearest other row."""
    distinct = np.unique(np.round(mixtures, 12), axis=0)
    if len(distinct) < 2:
        raise ValueError(f"`mixtures` must hold two that differ, got {len(distinct)}: add runs.")
    return float(np.median(KDTree(distinct).query(distinct, k=2, p=1)[0][:, 1]) / 2)
