"""Searches for the mixture at which a law is smallest: by gradient, or by sampling as RegMix does.

The gradient search follows the central path of a log barrier,

    min_p  f(p) - mu sum_j [ log(p_j - lower_j) + log(upper_j - p_j) ],   sum p = 1,   mu -> 0,

by primal-dual Newton steps for all starts at once. Every point stays strictly inside the bounds,
where laws with p^a, a < 1, have a finite slope. Where the optimum is a whole face, the path ends in
its middle, whatever the order of the domains. scipy's SLSQP needs a floor under the shares for such
laws, and on such a face it ends near its start: with a floor of 1e-10 it is off by 3e-8 to 2e-7
where laws have a single optimum, and gives two equal domains shares of 0.07 and 0.20.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmmix.laws.objective import shares_of
from llmmix.laws.simplex import project

MU = (1e-2, 1e-3, 1e-12)  # weight of the barrier: first, where starts are compared, and last
BASINS = 6  # largest number of distinct points that are followed to the end
ROWS = 8192  # rows of one call of `value`


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Args:
        mixture: (k,) on the simplex and within the bounds.
        value: Value of the law there.
        converged: For a gradient search, whether no feasible direction descends, to first order;
            for sampling, whether enough candidates were within the bounds.
        at_bounds: Indices of the shares at their lower bound, zero included, or at an upper
            bound below 1.
        method: How the mixture was found, in words.
    """

    mixture: np.ndarray
    value: float
    converged: bool
    at_bounds: tuple[int, ...]
    method: str


def _values(value: Callable, p: np.ndarray) -> np.ndarray:
    """(n,) values of mixtures (n, k), computed some rows at a time; NaN counts as infinite."""
    with np.errstate(all="ignore"):
        parts = [np.asarray(value(p[i : i + ROWS]), float) for i in range(0, len(p), ROWS)]
    values = np.concatenate(parts)
    return np.where(np.isnan(values), np.inf, values)


def _newton(slope: Callable, lo, up, x, duals, mu) -> tuple[np.ndarray, np.ndarray]:
    """Newton steps (n, k) of the barrier problem at x (n, k), and the slopes (n,) along them."""
    k = x.shape[1]
    here, eye = slope(x), np.eye(k)
    # Differences along the simplex, outside of which a law may be undefined, and relative to the
    # share, since the curvature of p^a grows as p -> 0
    h = 1e-6 * x[:, :, None]
    around = x[:, None] + h * (eye - x[:, None] / x.sum(1)[:, None, None])
    curvature = (slope(around.reshape(-1, k)).reshape(-1, k, k) - here[:, None]) / h
    barrier = duals[0] / (x - lo) + duals[1] / (up - x)
    unit = 1 / np.sqrt(barrier + np.abs(np.einsum("njj->nj", curvature)))
    normal = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    across = normal[:, :, None] * normal[:, None]
    tangent = eye - across
    scaled = unit[:, :, None] * (curvature + eye * barrier[:, None]) * unit[:, None]
    scaled = tangent @ scaled @ tangent
    sizes, axes = np.linalg.eigh((scaled + scaled.transpose(0, 2, 1)) / 2 + across)
    sizes = np.maximum(np.abs(sizes), 1e-10)  # downhill also where the law is not convex
    residual = here - mu[:, None] / (x - lo) + mu[:, None] / (up - x)
    pull = np.einsum("nij,nj->ni", tangent, unit * residual)
    step = -unit * np.einsum("nij,nj,nlj,nl->ni", axes, 1 / sizes, axes, pull, optimize=True)
    return step, (residual * step).sum(1)


def _follow(value: Callable, slope: Callable, lo, up, x, first: float, last: float, most: int = 80):
    """Follow the central path from x (n, k), strictly inside; mu falls from `first` to `last`."""
    x, mu = x.copy(), np.full(len(x), first)
    duals = np.stack([mu[:, None] / (x - lo), mu[:, None] / (up - x)])

    def merit(x, mu):
        return value(x) - mu * (np.log(x - lo) + np.log(up - x)).sum(1)

    live = np.arange(len(x))
    for _ in range(most):
        at, m, z = x[live], mu[live], duals[:, live]
        step, fall = _newton(slope, lo, up, at, z, m)
        room = np.where(step < 0, at - lo, up - at) / np.maximum(np.abs(step), 1e-300)
        length = np.minimum(1, 0.99 * room.min(1))
        before = merit(at, m)
        todo, moved = np.ones(len(at), bool), at.copy()
        for _ in range(30):
            i = np.flatnonzero(todo)
            tried = at[i] + length[i, None] * step[i]
            allowed = before[i] + 1e-4 * length[i] * fall[i] + 1e-14 * np.abs(before[i])
            good = (tried > lo).all(1) & (tried < up).all(1)
            good[good] = merit(tried[good], m[i[good]]) <= allowed[good]
            moved[i[good]], todo[i[good]] = tried[good], False
            if not todo.any():
                break
            length[todo] /= 3
        gaps = np.stack([at - lo, up - at])
        signs = np.array([1, -1])[:, None, None]
        z = z + length[:, None] * (m[:, None] / gaps - z - signs * z / gaps * step)
        centre = m[:, None] / np.stack([moved - lo, up - moved])
        x[live], duals[:, live] = moved, np.clip(z, 1e-6 * centre, 1e6 * centre)
        small = todo | (-fall < 0.1 * m)
        still = todo | (np.abs(step).max(1) < 1e-9) | (last > MU[-1])  # polish at the very end
        done = small & still & (m <= last)
        mu[live] = np.where(small, np.maximum(last, np.minimum(0.2 * m, m**1.5)), m)
        live = live[~done]
        if not len(live):
            break
    return x


def _vertex(slopes: np.ndarray, lower, upper) -> np.ndarray:
    """(k,) the best feasible mixture for a linear law: fill up domains from the smallest slope."""
    order = np.argsort(slopes, kind="stable")
    room = (upper - lower)[order]
    filled = lower.copy()
    filled[order] += np.clip(1 - lower.sum() - (np.cumsum(room) - room), 0, room)
    return filled


def _corners(lower, upper) -> np.ndarray:
    """(k, k) mixtures with one share as large as possible, the rest in proportion to their room.

    Without bounds they are the vertices of the simplex.
    """
    room, spare = upper - lower, 1 - lower.sum()
    top = np.minimum(room, spare)
    corners = lower + room * ((spare - top) / np.maximum(room.sum() - room, 1e-300))[:, None]
    np.fill_diagonal(corners, lower + top)
    return corners


def _search_inside(value: Callable, slope: Callable, lower, upper, starts) -> tuple:
    """(m, k) ends of the central paths from `starts`, and the scale of the law's slopes."""
    free = upper - lower > 1e-12
    lo, up, total = lower[free], upper[free], 1 - lower[~free].sum()
    middle = lo + (up - lo) * (total - lo.sum()) / (up - lo).sum()

    def whole(x):
        p = np.tile(lower, (len(x), 1))
        p[:, free] = x
        return p

    def slopes(x):
        found = np.asarray(slope(whole(x)), dtype=np.float64)[:, free] / scale
        if not np.isfinite(found).all():
            raise ValueError("`slope` must be finite inside the bounds, got NaN or inf there.")
        return found

    def heights(x):
        return _values(value, whole(x)) / scale

    x, scale = 0.95 * starts[:, free] + 0.05 * middle, 1.0
    steep = slopes(x)
    scale = np.median(np.abs(steep - steep.mean(1, keepdims=True))) or 1.0
    x = _follow(heights, slopes, lo, up, x, MU[0], MU[1])
    kept: list[int] = []
    for i in np.argsort(heights(x), kind="stable").tolist():
        if len(kept) < BASINS and all(np.abs(x[i] - x[j]).max() > 0.01 for j in kept):
            kept.append(i)
    x = _follow(heights, slopes, lo, up, x[np.sort(kept)], MU[1], MU[2])
    return whole(x), scale


def _snapped(ends, lower, upper) -> list[np.ndarray]:
    """The ends (m, k) of paths, with shares that the barrier kept off a bound moved onto it."""
    snapped = []
    for near in (1e-7, 1e-9, 1e-11):
        held = np.where(ends - lower < near, lower, ends)
        held = np.where(upper - held < near, upper, held)
        shut = (held == lower) | (held == upper)
        bounds = np.where(shut, held, lower), np.where(shut, held, upper)
        for low, high, end in zip(*bounds, ends, strict=True):
            if low.sum() <= 1 + 1e-9 and high.sum() >= 1 - 1e-9:
                snapped.append(project(end, low, high))
    return snapped


def _descent(slope: Callable, p, lower, upper) -> float:
    """Largest fall along the law's tangent at p (k,): 0 where no feasible direction descends."""
    inside = project(np.full(len(p), 1 / len(p)), lower, upper)
    with np.errstate(all="ignore"):  # the slope at 0 may be infinite: take it slightly inside
        slopes = np.asarray(slope(((1 - 1e-9) * p + 1e-9 * inside)[None]), float)[0]
    slopes = np.where(upper > lower, slopes, 0.0)
    return float(slopes @ (p - _vertex(slopes, lower, upper)))


def _found(p, value: float, converged: bool, lower, upper, method: str) -> Found:
    at = (p <= lower + 1e-9) | ((p >= upper - 1e-9) & (upper < 1))
    return Found(p, float(value), bool(converged), tuple(np.flatnonzero(at).tolist()), method)


def minimize_mixture(
    value: Callable, slope: Callable, lower: np.ndarray, upper: np.ndarray, starts: np.ndarray
) -> Found:
    """The mixture within bounds at which a law is smallest.

    Args:
        value: Maps mixtures (n, k) to values (n,) of the law.
        slope: Maps (n, k) to gradients (n, k), which may be infinite where a share is 0.
        lower: (k,) smallest shares, as from `objective.bounds_of`.
        upper: (k,) largest shares.
        starts: (s, k) mixtures to start from, projected onto the bounds.

    Returns:
        A mixture at least as good, up to rounding, as every start and every corner.

    Raises:
        ValueError: `starts` has the wrong shape, or the law is not finite inside the bounds.
    """
    lower, upper = np.asarray(lower, float), np.asarray(upper, float)
    starts = np.atleast_2d(np.asarray(starts, dtype=np.float64))
    if not starts.size or starts.shape[1:] != lower.shape:
        raise ValueError(f"`starts` must be (s, {len(lower)}), s > 0, got shape {starts.shape}.")
    known = np.vstack([project(starts, lower, upper), corners := _corners(lower, upper)])
    scale = 1.0
    found: list[np.ndarray] = []
    if 1e-9 < 1 - lower.sum() and upper.sum() - 1 > 1e-9:  # else only one mixture is feasible
        best = np.argsort(_values(value, corners), kind="stable")[:3]
        begin = np.vstack([known[: len(starts)], corners[best]])
        ends, scale = _search_inside(value, slope, lower, upper, begin)
        found = [*_snapped(ends, lower, upper), *ends]
    candidates = project(np.vstack([*found, known]), lower, upper)
    values = _values(value, candidates)
    if not np.isfinite(values.min()):
        raise ValueError(f"`value` must be finite somewhere, got {values.min()} at all candidates.")
    # Among candidates that differ by rounding, take the first at which no direction descends: the
    # order of the domains then decides nothing, and a tiny optimal share is not rounded to 0
    tied = values <= values.min() + 1e-14 * np.abs(values.min()) + 1e-13 * scale
    for i in np.flatnonzero(tied).tolist():
        converged = _descent(slope, candidates[i], lower, upper) <= 1e-6 * scale
        if converged:
            break
    else:
        i = int(np.argmax(tied))
    return _found(candidates[i], values[i], converged, lower, upper, "gradient search")


def sample_mixture(
    value: Callable,
    lower: np.ndarray,
    upper: np.ndarray,
    prior: np.ndarray,
    *,
    candidates: int = 100_000,
    top: int = 128,
    seed: int = 0,
) -> Found:
    """RegMix's search: the mean of the best of many Dirichlet(prior) mixtures.

    Candidates outside the bounds are dropped. If fewer than `top` are left, all are projected onto
    the bounds instead; `converged` is then False and `method` says so.

    Args:
        value: Maps mixtures (n, k) to values (n,) of the law.
        lower: (k,) smallest shares.
        upper: (k,) largest shares.
        prior: (k,) concentrations (token shares in RegMix); a domain at 0 stays at 0.
        candidates: Number of mixtures drawn.
        top: Number of mixtures averaged.
        seed: Seed of the draws.

    Raises:
        ValueError: `prior` is 0 where the bounds need a share, or `top` is not between 1 and
            `candidates`.
    """
    prior = shares_of("prior", prior, len(lower), 0.0, np.finfo(float).max, None)
    if not 1 <= top <= candidates:
        raise ValueError(f"`top` must lie between 1 and {candidates} `candidates`, got {top}.")
    some = prior > 0
    lower, upper = np.asarray(lower, float), np.where(some, upper, 0.0)
    if (lower > upper).any() or upper.sum() < 1 - 1e-9:
        raise ValueError(
            f"`prior` is 0 for domains {np.flatnonzero(~some).tolist()}, and within the bounds no "
            "mixture does without them: raise their prior or widen the bounds."
        )
    drawn = np.zeros((candidates, len(prior)))
    drawn[:, some] = np.random.default_rng(seed).dirichlet(prior[some], candidates)
    within = ((drawn >= lower - 1e-12) & (drawn <= upper + 1e-12)).all(1)
    enough = within.sum() >= top
    drawn = drawn[within] if enough else project(drawn, lower, upper)
    best = drawn[np.argsort(_values(value, drawn), kind="stable")[:top]]
    mixture = project(best.mean(0), lower, upper)
    method = f"mean of the best {top} of {candidates} draws, {within.sum()} of them within bounds"
    if not enough:
        method += ", all projected onto the bounds"
    return _found(mixture, _values(value, mixture[None])[0], enough, lower, upper, method)
