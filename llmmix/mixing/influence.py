"""The arithmetic of Aioli: from the losses of probes to a matrix, and from a matrix to weights.

Rows of the matrix A are targets and columns domains, everywhere. Skill-It's published graph has
them the other way round (llmmix/mixing/skillit.py). The controllers are in llmmix/mixing/aioli.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmmix.mixing.weights import log_of


@dataclass(frozen=True)
class InfluenceMatrix:
    """How far each domain lowers each target's loss, with the names of both axes.

    Args:
        values: (n, m) fall of a target's loss (row) if all training rows are of a domain (column).
        targets: n names.
        domains: m names.

    Raises:
        ValueError: `values` has another shape.
    """

    values: np.ndarray
    targets: tuple[str, ...]
    domains: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = np.shape(self.values)
        if shape != (len(self.targets), len(self.domains)):
            raise ValueError(
                f"`values` must be targets by domains, {len(self.targets)} x {len(self.domains)}, "
                f"got {' x '.join(map(str, shape))}."
            )

    def of(self, target: str, domain: str) -> float:
        """How far the loss of `target` falls on `domain`.

        Raises:
            ValueError: `target` or `domain` is not a name of the matrix.
        """
        return float(self.values[self.targets.index(target), self.domains.index(domain)])


def probe_mixtures(count: int, one_hot_factor: float) -> np.ndarray:
    """(k, k) nearly one-hot mixtures: row j has the factor on domain j, the others share the rest.

    Raises:
        ValueError: `one_hot_factor` is outside (1/k, 1], or so close to 1/k that the mixtures do
            not tell the domains apart.
    """
    rest = (1 - one_hot_factor) / (count - 1) if count > 1 else 0.0
    if not 0 < one_hot_factor <= 1 or one_hot_factor - rest < 0.05:
        raise ValueError(
            f"`one_hot_factor` must lie above 1/{count} by a margin and at most at 1, so that the "
            f"mixtures differ, got {one_hot_factor}."
        )
    return np.full((count, count), rest) + (one_hot_factor - rest) * np.eye(count)


def solve_mixing_matrix(gains: np.ndarray, one_hot_factor: float) -> np.ndarray:
    """The matrix A from the gains of the probes: solve W A_i = G_i for every target i.

    Args:
        gains: (n, k) fall of target i's loss during the probe of domain j; (k, k) in the paper.
        one_hot_factor: Share of the probed domain in its probe.

    Returns:
        (n, k).

    Raises:
        ValueError: `one_hot_factor` does not tell the domains apart (see `probe_mixtures`).
    """
    gains = np.asarray(gains, dtype=np.float64)
    return np.linalg.solve(probe_mixtures(gains.shape[1], one_hot_factor), gains.T).T


def published_matrix(
    probed: Sequence[int], drops: np.ndarray, rounds: int, domains: int, one_hot_factor: float
) -> np.ndarray:
    """A as published: drops averaged over the rounds, and solved with the planned mixtures.

    Args:
        probed: The domain of each probe.
        drops: (probes, n) fall of each target's loss during each probe.
        rounds: Probes of each domain.
        domains: Number m of domains.
        one_hot_factor: Share of the probed domain in its probe; at 1 there is nothing to solve.

    Returns:
        (n, m).
    """
    gains = np.zeros((drops.shape[1], domains))
    for j, shed in zip(probed, drops, strict=True):
        gains[:, j] += shed / rounds
    return gains if one_hot_factor == 1 else solve_mixing_matrix(gains, one_hot_factor)


def least_squares_matrix(
    shares: np.ndarray, drops: np.ndarray, target_weights: np.ndarray, evidence: float
) -> np.ndarray | None:
    """A by least squares on the shares as drawn, with a linear drift over the probes taken out.

    Args:
        shares: (probes, m) share of each domain among the rows drawn in each probe.
        drops: (probes, n) fall of each target's loss, per step.
        target_weights: (n,) u.
        evidence: Standard errors by which the gains of the best and the worst domain must differ.

    Returns:
        (n, m), or None where they differ by less.
    """
    probes, m = shares.shape
    drift = np.arange(probes) - (probes - 1) / 2
    x = np.column_stack([shares, drift]) if probes > m + 1 else shares
    found, *_ = np.linalg.lstsq(x, drops, rcond=None)
    free = probes - x.shape[1]
    if free > 0:
        gains, rest = found[:m] @ target_weights, (drops - x @ found) @ target_weights
        pair = np.zeros(x.shape[1])
        pair[[gains.argmin(), gains.argmax()]] = -1.0, 1.0
        error = np.sqrt(pair @ np.linalg.pinv(x.T @ x) @ pair * (rest @ rest) / free)
        if np.ptp(gains) < evidence * error:
            return None
    return found[:m].T


def normalize_matrix(matrix: np.ndarray) -> np.ndarray:
    """Shift up by the smallest entry if it is negative, then scale to a sum of 1.

    A matrix that is zero after the shift does not tell the domains apart: all entries become equal.
    """
    shifted = matrix - min(matrix.min(), 0.0)
    total = shifted.sum()
    if total <= 1e-12 * np.abs(matrix).sum():  # zero, up to rounding
        return np.full(matrix.shape, 1 / matrix.size)
    return shifted / total


def update_weights(
    weights: Sequence[float] | np.ndarray,
    matrix: Sequence[Sequence[float]] | np.ndarray,
    *,
    eta: float,
    normalize: bool = True,
    target_weights: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """One step of exponentiated gradient: p_j ~ weights_j exp(eta sum_i u_i A_ij).

    Args:
        weights: (k,) on the simplex; not changed in place.
        matrix: (n, k), rows targets, columns domains.
        eta: Size of the step.
        normalize: Whether to apply `normalize_matrix` first.
        target_weights: (n,) u; ones by default.

    Returns:
        (k,) on the simplex.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    gains = normalize_matrix(matrix) if normalize else matrix
    u = np.ones(len(gains)) if target_weights is None else np.asarray(target_weights)
    logs = log_of(np.asarray(weights, dtype=np.float64)) + eta * (u @ gains)
    moved = np.exp(logs - logs.max())
    return moved / moved.sum()
