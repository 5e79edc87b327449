"""The record of a mixture run by interval, and the linear law of how its losses fell.

    (L_i(s) - L_i(s')) / g(t) = sum_j A_ij x_j + noise    interval s to s', t its middle
    g(t) ~ t^-power (1 - t/T)^end, T the run's end        x_j = (s' - s) * share of domain j's rows

This is the linear dynamic law of Chen et al. (arXiv:2411.05735). They continue a checkpoint on many
mixtures. Here there is one run, whose losses fall ever more slowly and, as the learning rate ends,
not at all. So all entries share a decay g with mean 1 over the run's steps: A is the fall a step on
average, and keeps its shape. Errors count alike after division by g. Where mixture and speed follow
the same trend, g may take what is due to the mixture. The fast fall at the beginning of a run
follows no such g, so the first tenth is left out, as Aioli does. R2 is against a law to which the
mixture does not matter, drop = a_i * steps, not against the mean drop, which all laws beat.

Rows of A are targets and columns domains. llmmix/mixing/record.py writes the record;
llmmix/laws/fidelity.py compares A with the matrix of the run's method.
"""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from llmmix.files import RECORD, read_record

VARIED = 0.01  # standard deviation of a share over intervals, from which on its column is fitted
POWERS, ENDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Trajectory:
    """The record of a run, by interval between two measurements of the losses.

    Args:
        method: Class name of the method that moved the weights.
        domains: k names.
        targets: m names.
        start: (r,) step before the first of each interval.
        steps: (r,) number of steps of each interval.
        shares: (r, k) share of each domain among the rows drawn in the interval.
        drops: (r, m) losses before the interval minus losses after it.
        decided: (d,) steps at which the method had a new matrix.
        matrices: (d, m, k) these matrices; entries may be NaN.
        notes: Parts of the record that could not be used, a sentence each.
    """

    method: str
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    start: np.ndarray
    steps: np.ndarray
    shares: np.ndarray
    drops: np.ndarray
    decided: np.ndarray
    matrices: np.ndarray
    notes: tuple[str, ...] = ()


def read_trajectory(folder: str | Path, first_step: int | None = None) -> Trajectory:
    """The intervals and matrices of a mixture run.

    Args:
        folder: Folder with the `mixture.jsonl` of the run.
        first_step: Intervals that begin before this step are left out. Default: a tenth of the
            run's steps.

    Raises:
        FileNotFoundError: `folder` holds no record.
        ValueError: The record has no two measurements with all draws between them, or a matrix of
            another shape than targets by domains.
    """
    header, entries = read_record(folder)
    k, m = len(header["domains"]), len(header["targets"])
    counts = {e["step"]: np.array(e["counts"], float) for e in entries if "counts" in e}
    measured: dict[int, np.ndarray] = {}
    notes: list[str] = []
    for entry in entries:
        losses = entry.get("final", entry.get("measured", {}).get("losses"))
        if losses is not None:  # a step may have two, at the end and start of plans: keep the last
            measured[entry["step"]] = np.array(losses, dtype=float)
    lost = [step for step, losses in measured.items() if not np.isfinite(losses).all()]
    if lost:
        shown = ", ".join(map(str, lost))
        notes.append(f"Losses that were not finite, at steps {shown}, are left out.")
    begun = max(counts, default=0) // 10 if first_step is None else first_step
    kept = sorted(step for step in set(measured) - set(lost) if step >= begun)
    spans: list[tuple] = []
    torn = 0
    for begin, end in zip(kept, kept[1:], strict=False):
        drawn = [counts[s] for s in range(begin + 1, end + 1) if s in counts]
        if len(drawn) < end - begin or not np.sum(drawn):
            torn += 1
            continue
        rows = np.sum(drawn, axis=0)
        spans.append((begin, end - begin, rows / rows.sum(), measured[begin] - measured[end]))
    if torn:
        notes.append(f"{torn} intervals are left out, since the record lacks some of their draws.")
    if not spans:
        raise ValueError(
            f"{Path(folder) / RECORD}: from step {begun} on, losses of the targets were measured "
            f"at {len(kept)} steps, and it takes two, with all draws between them recorded. "
            f"{header['method']} may not measure losses: use a run of a method that does, or an "
            "earlier `first_step`."
        )
    decided, matrices = _decisions(entries, m, k)
    start, steps, shares, drops = (np.array(part) for part in zip(*spans, strict=True))
    names = tuple(header["domains"]), tuple(header["targets"])
    found = (start, steps, shares, drops, decided, matrices)
    return Trajectory(header["method"], *names, *found, tuple(notes))


def _decisions(entries: list[dict], m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(d,) steps and (d, m, k) matrices, without those that repeat the one before."""
    steps: list[int] = []
    matrices: list[np.ndarray] = []
    for entry in entries:
        if entry.get("matrix") is None:
            continue
        matrix = np.array(entry["matrix"], dtype=float)
        if matrix.shape != (m, k):
            raise ValueError(
                f"The matrix of step {entry['step']} must be targets by domains, {m} x {k}, got "
                f"{' x '.join(map(str, matrix.shape))}."
            )
        if not matrices or not np.array_equal(matrix, matrices[-1], equal_nan=True):
            steps.append(entry["step"])
            matrices.append(matrix)
    return np.array(steps, dtype=int), np.array(matrices).reshape(-1, m, k)


@dataclass(frozen=True)
class Dynamics:
    """The linear dynamic law of a run.

    Args:
        targets: m names, the rows of the matrix.
        domains: k names, its columns.
        matrix: (m, k) mean fall a step of a target's loss if all rows were of a domain; NaN in the
            columns of `unidentified`.
        errors: (m, k) standard errors; NaN if there are as many domains as intervals.
        decay: (power, end) of g.
        speed: (r,) g of each interval.
        r2: R2 in the sample against the law without a mixture, the mean over targets.
        r2_out: The same with intervals left out one at a time; NaN if the fit needs every interval.
        mse: Mean squared error in the sample, in nats squared at the run's mean speed.
        mse_out: The same with intervals left out one at a time.
        unidentified: Domains whose share hardly varied, or only in lockstep with others.
        noise: (m, m) covariance of an interval's errors, divided by g.
        spread: (k, k) covariance of a row of A, in units of the noise.
        residuals: (r, m) errors of intervals left out, divided by g.
        null_residuals: (r, m) the same errors of the law without a mixture.
    """

    targets: tuple[str, ...]
    domains: tuple[str, ...]
    matrix: np.ndarray
    errors: np.ndarray
    decay: tuple[float, float]
    speed: np.ndarray
    r2: float
    r2_out: float
    mse: float
    mse_out: float
    unidentified: tuple[str, ...]
    noise: np.ndarray = field(repr=False)
    spread: np.ndarray = field(repr=False)
    residuals: np.ndarray = field(repr=False)
    null_residuals: np.ndarray = field(repr=False)


def fit_dynamics(
    trajectory: Trajectory, *, ridge: float = 0.0, decay: tuple[float, float] | None = None
) -> Dynamics:
    """A by least squares on the drops of all intervals.

    Args:
        trajectory: The record of the run.
        ridge: Ridge that shrinks A towards 0, in units of the mean square of a domain's steps.
        decay: (power, end) of g. Default: the pair of a grid under which intervals left out are
            likeliest, which makes `r2_out` a little too good.

    Raises:
        ValueError: There are fewer intervals than domains, the shares never vary, or `ridge` is
            negative.
    """
    t, k = trajectory, len(trajectory.domains)
    r, m = t.drops.shape
    if not 0 <= ridge < np.inf:
        raise ValueError(f"`ridge` must be 0 or more, got {ridge}.")
    if r < k:
        raise ValueError(
            f"`trajectory` has {r} intervals for {k} domains, and it takes at least as many, "
            "better several times as many: measure more often, or run longer."
        )
    known = _identified(t)
    x, length = (t.shares * t.steps[:, None])[:, known], t.steps[:, None].astype(float)
    best = _likeliest_decay(t, x, ridge) if decay is None else decay
    g = _speed(t, *best)
    y = t.drops / g[:, None]
    found, inner, out = _least_squares(x, y, ridge)
    _, null_inner, null_out = _least_squares(length, y, 0.0)
    free = r - x.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = inner.T @ inner / free if free else np.full((m, m), np.nan)
    gram = x.T @ x + ridge * np.mean(x**2) * len(x) * np.eye(x.shape[1])
    values, spread = np.full((m, k), np.nan), np.full((k, k), np.nan)
    values[:, known] = found.T
    spread[np.ix_(known, known)] = np.linalg.inv(gram)
    return Dynamics(
        targets=t.targets,
        domains=t.domains,
        matrix=values,
        errors=np.sqrt(np.outer(noise.diagonal(), spread.diagonal())),
        decay=best,
        speed=g,
        r2=mean_r2(inner, null_inner),
        r2_out=mean_r2(out, null_out),
        mse=float((inner**2).mean()),
        mse_out=float((out**2).mean()),
        unidentified=tuple(t.domains[j] for j in np.flatnonzero(~known)),
        noise=noise,
        spread=spread,
        residuals=out,
        null_residuals=null_out,
    )


def _likeliest_decay(t: Trajectory, x: np.ndarray, ridge: float) -> tuple[float, float]:
    """(power, end) of g, from a grid, under which intervals left out are likeliest."""

    def score(pair: tuple[float, float]) -> float:
        g = _speed(t, *pair)
        _, _, out = _least_squares(x, t.drops / g[:, None], ridge)
        with np.errstate(divide="ignore"):
            return float((0.5 * np.log((out**2).mean(0)) + np.log(g).mean()).sum())

    grid = list(product(POWERS, ENDS))
    scores = [score(pair) for pair in grid]
    # Where no interval can be left out every score is NaN: the first pair, no decay, is taken
    return grid[int(np.argmin(np.nan_to_num(scores, nan=np.inf, neginf=-1e300)))]


def _identified(t: Trajectory) -> np.ndarray:
    """(k,) whether the shares identify the effect of each domain."""
    mean = np.average(t.shares, axis=0, weights=t.steps)
    varied = np.sqrt(np.average((t.shares - mean) ** 2, axis=0, weights=t.steps)) >= VARIED
    if varied.any():
        x = t.shares[:, varied] * np.sqrt(t.steps)[:, None]
        # A projection, whose diagonal is 1 where a domain is identified
        reach = np.linalg.pinv(x, rcond=1e-6) @ x
        varied[varied] = reach.diagonal() > 1 - 1e-6
    if not varied.any():
        shown = ", ".join(f"{d} {p:.3f}" for d, p in zip(t.domains, mean, strict=True))
        raise ValueError(
            f"`trajectory` identifies nothing: the shares ({shown}) hardly varied from interval "
            "to interval. Fit a run whose mixture moves, or one with probes or a tilt."
        )
    return varied


def _speed(t: Trajectory, power: float, end: float) -> np.ndarray:
    """(r,) g at the middle of each interval, with mean 1 over the steps."""
    middle, last = t.start + t.steps / 2, (t.start + t.steps)[-1]
    g = middle**-power * (1 - middle / last) ** end
    return g / np.average(g, weights=t.steps)


def _least_squares(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, ...]:
    """Coefficients, residuals, and residuals of rows left out: e / (1 - leverage)."""
    gram = x.T @ x + ridge * np.mean(x**2) * len(x) * np.eye(x.shape[1])
    solved = np.linalg.solve(gram, x.T)
    found = solved @ y
    inner = y - x @ found
    kept = 1 - np.einsum("rk,kr->r", x, solved)
    return found, inner, inner / np.where(kept > 1e-9, kept, np.nan)[:, None]


def mean_r2(errors: np.ndarray, null: np.ndarray) -> float:
    """1 - sum errors^2 / sum null^2 over the intervals (r, m), the mean over targets."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean(1 - (errors**2).sum(0) / (null**2).sum(0)))
