"""How well a method's law fits the run that it steered: its matrix against one fitted to the run.

    similarity = 1/2 cos(a, b) + 1/2 Spearman(a, b)

This is the similarity of Chen et al. (arXiv:2411.05735), where a is the column sums of the fitted
matrix and b those of the method's. llmmix/laws/trajectory.py reads the run's record and fits the
matrix. Rows are targets and columns domains.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from llmmix.laws.trajectory import Dynamics, Trajectory, fit_dynamics, mean_r2, read_trajectory

RESAMPLES = 2000  # draws of the fitted column sums for the interval of the similarity


def similarity(
    implied: ArrayLike, fitted: ArrayLike, target_weights: ArrayLike | None = None
) -> float:
    """How alike two matrices' column sums are: 1/2 cosine + 1/2 Spearman.

    With 2 domains the Spearman part is 1 or -1. Positive sums always have a cosine near 1, so
    compare the similarity with that of shuffled domains (`Fidelity.chance`).

    Args:
        implied: (m, k) matrix of a method.
        fitted: (m, k) matrix fitted to the run.
        target_weights: (m,) weights of the rows. Default: ones.

    Returns:
        A number from -1 to 1; NaN where a matrix has the same sum in every column.

    Raises:
        ValueError: The shapes differ, or an entry is not finite.
    """
    implied, fitted = np.asarray(implied, dtype=float), np.asarray(fitted, dtype=float)
    if implied.ndim != 2 or implied.shape != fitted.shape:
        raise ValueError(
            f"`implied` and `fitted` must both be targets by domains, got shapes {implied.shape} "
            f"and {fitted.shape}."
        )
    if not (np.isfinite(implied).all() and np.isfinite(fitted).all()):
        raise ValueError(
            "`implied` and `fitted` must be finite: leave out domains that are not identified."
        )
    u = _weights(target_weights, len(fitted))
    return _alike(u @ fitted, u @ implied)


def _weights(given, m: int) -> np.ndarray:
    u = np.ones(m) if given is None else np.asarray(given, dtype=float)
    if u.shape != (m,) or not np.isfinite(u).all() or (u < 0).any() or not u.any():
        raise ValueError(f"`target_weights` must be {m} numbers of at least 0, got {given}.")
    return u


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(_all_alike(a[None], b)[0])


def _all_alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) similarities of sums a (n, k) to b (k,), NaN where either is constant."""
    constant = [np.ptp(c, -1) <= 1e-9 * np.abs(c).max(-1, initial=0.0) for c in (a, b)]
    ranks, other = (rankdata(c, axis=-1) - (a.shape[1] + 1) / 2 for c in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = [
            x @ y / (np.linalg.norm(x, axis=1) * np.linalg.norm(y))
            for x, y in ((a, b), (ranks, other))
        ]
    return np.where(constant[0] | constant[1], np.nan, sum(cosines) / 2)


@dataclass(frozen=True)
class Fidelity:
    """How well a method's law fits the run that it steered.

    The method's matrix and the fitted one come from the same losses, which makes them alike to some
    degree. What the method predicted of intervals after its decisions (`implied_r2`) is free of
    that. All scores are NaN if the method recorded no matrix.

    Args:
        method: Class name of the method.
        intervals: Number of intervals between two measurements.
        decisions: Number of matrices that differ from the one before.
        fitted: The law fitted to the run.
        similarity: Mean similarity over the decisions.
        similarity_of_mean: Similarity of the mean of the matrices, each scaled to size 1.
        similarity_of_last: Similarity of the last matrix.
        interval: 90 % interval of `similarity_of_mean`, from the errors of the fitted matrix.
        chance: Mean of `similarity_of_mean` over all permutations of the domains.
        scale: b in drop / g = b (A x) / |A| over the `foretold` intervals, where A is the last
            matrix before the interval and |A| the root of its sum of squares.
        foretold: Number of intervals that began after a matrix was recorded.
        implied_r2: R2 of b A x on these intervals, with b from the other ones, against the law
            without a mixture.
        fitted_r2: R2 of the fitted law on the same intervals, each left out.
        implied_mse: Mean squared error of b A x on these intervals, in units of `Dynamics.mse_out`.
        fitted_mse: Mean squared error of the fitted law on these intervals.
        unidentified: Domains of which the run says nothing; similarities leave them out.
        notes: What to keep in mind, a sentence each.
    """

    method: str
    intervals: int
    decisions: int
    fitted: Dynamics
    similarity: float
    similarity_of_mean: float
    similarity_of_last: float
    interval: tuple[float, float]
    chance: float
    scale: float
    foretold: int
    implied_r2: float
    fitted_r2: float
    implied_mse: float
    fitted_mse: float
    unidentified: tuple[str, ...]
    notes: tuple[str, ...]


def assess(
    folder: str | Path,
    *,
    first_step: int | None = None,
    target_weights: ArrayLike | None = None,
    ridge: float = 0.0,
) -> Fidelity:
    """How well the law of a mixture run's method fits the run.

    Args:
        folder: Folder with the `mixture.jsonl` of the run.
        first_step: First step that counts; see `read_trajectory`.
        target_weights: (m,) weights of the targets in the similarities. Default: ones.
        ridge: Ridge of the fitted matrix; see `fit_dynamics`.

    Raises:
        FileNotFoundError: `folder` holds no record.
        ValueError: The record holds too few measurements, or the shares never vary.
    """
    t = read_trajectory(folder, first_step)
    u = _weights(target_weights, len(t.targets))
    fitted = fit_dynamics(t, ridge=ridge)
    finite = np.isfinite(t.matrices).all((1, 2))
    decided, matrices = t.decided[finite], t.matrices[finite]
    # Methods scale their matrices differently, and the first ones are large, as the first drops are
    size = np.sqrt((matrices**2).sum((1, 2), keepdims=True))
    matrices = matrices / np.where(size > 0, size, 1.0)
    known = ~np.isnan(fitted.spread.diagonal())
    a, sums = (u @ fitted.matrix)[known], (u @ matrices)[:, known]
    each = np.array([_alike(a, b) for b in sums])
    mean = sums.mean(0) if len(sums) else np.full(known.sum(), np.nan)
    told = _foretell(t, fitted, decided, matrices)
    of_mean = _alike(a, mean)
    interval = _interval(a, mean, u @ fitted.noise @ u * fitted.spread[np.ix_(known, known)])
    # The cosine's mean over permutations has this closed form, Spearman's is 0
    chance = float(a.sum() * mean.sum() / len(a) / 2 / np.sqrt(a @ a * (mean @ mean)))
    chance = chance if np.isfinite(of_mean) else np.nan
    return Fidelity(
        method=t.method,
        intervals=len(t.steps),
        decisions=len(matrices),
        fitted=fitted,
        similarity=float(np.mean(each[np.isfinite(each)])) if np.isfinite(each).any() else np.nan,
        similarity_of_mean=of_mean,
        similarity_of_last=float(each[-1]) if len(each) else np.nan,
        interval=interval,
        chance=chance,
        **told,
        unidentified=fitted.unidentified,
        notes=(*t.notes, *_notes(t, fitted, each, told), *_doubts(interval, chance)),
    )


def _interval(a: np.ndarray, b: np.ndarray, covariance: np.ndarray) -> tuple[float, float]:
    """5th and 95th percentile of the similarity of b (k,) to sums about a (k,)."""
    if not (np.isfinite(covariance).all() and np.isfinite(_alike(a, b))):
        return np.nan, np.nan
    drawn = np.random.default_rng(0).multivariate_normal(a, covariance, RESAMPLES, method="eigh")
    low, high = np.nanpercentile(_all_alike(drawn, b), [5, 95])
    return float(low), float(high)


def _foretell(t: Trajectory, fitted: Dynamics, decided: np.ndarray, matrices: np.ndarray) -> dict:
    """The fields on how the last matrix predicts each interval that began after a decision."""
    last = np.searchsorted(decided, t.start, side="right") - 1
    rows = np.flatnonzero(last >= 0)
    found = dict.fromkeys(
        ("scale", "implied_r2", "fitted_r2", "implied_mse", "fitted_mse"), float("nan")
    )
    found["foretold"] = len(rows)
    if len(rows) < 2:
        return found
    x, shed = (t.shares * t.steps[:, None])[rows], (t.drops / fitted.speed[:, None])[rows]
    said = np.einsum("rmk,rk->rm", matrices[last[rows]], x)
    cross, square = (said * shed).sum(1), (said**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found["scale"] = float(cross.sum() / square.sum())
        others = (cross.sum() - cross) / (square.sum() - square)
    implied, best = shed - others[:, None] * said, fitted.residuals[rows]
    null = fitted.null_residuals[rows]
    found |= {"implied_r2": mean_r2(implied, null), "fitted_r2": mean_r2(best, null)}
    return found | {
        "implied_mse": float((implied**2).mean()),
        "fitted_mse": float((best**2).mean()),
    }


def _doubts(interval: tuple[float, float], chance: float):
    if interval[0] <= chance:
        yield (
            "The fitted matrix is so uncertain that the similarity lies between "
            f"{interval[0]:z.2f} and {interval[1]:z.2f}, and shuffled domains have "
            f"{chance:z.2f}: it shows nothing."
        )


def _notes(t: Trajectory, fitted: Dynamics, each: np.ndarray, told: dict):
    """What to keep in mind, a sentence each."""
    if fitted.unidentified:
        shown = ", ".join(fitted.unidentified)
        yield (
            f"The run says nothing of {shown}, whose shares hardly varied: "
            "their effects count with those of the others, and similarities leave them out."
        )
    if not fitted.r2_out > 0:
        yield (
            f"The fitted law predicts intervals left out no better than one without a mixture "
            f"(R2 {fitted.r2_out:z.2f}): a similarity to it says nothing about the method."
        )
    if not len(each):
        yield f"{t.method} recorded no matrix: there is the fitted one alone."
    if broken := len(t.matrices) - len(each):
        yield f"{broken} of its matrices were not finite and are left out."
    if constant := int(np.isnan(each).sum()):
        yield f"{constant} of {len(each)} matrices rank no domain: their similarity is not defined."
    if len(t.domains) - len(fitted.unidentified) == 2 and len(each):
        yield "With two domains the Spearman half of a similarity is 1 or -1, and nothing between."
    if len(each) and told["foretold"] < 2:
        yield "Fewer than two intervals followed a matrix: there is no prediction to compare."
