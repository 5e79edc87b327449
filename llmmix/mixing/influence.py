"""The arithmetic of Aioli: from what probes shed to a matrix, and from a matrix to weights.

A's rows are targets and its columns domains, everywhere.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class InfluenceMatrix:
    """What each domain does for each target, with the names of both axes.

    Args:
        values: (n, m) loss that a target (row) sheds if all rows are a domain's (column).
        targets: n names.
        domains: m names.
    """

    values: np.ndarray
    targets: tuple[str, ...]
    domains: tuple[str, ...]

    def __post_init__(self):
        shape = np.shape(self.values)
        if shape != (len(self.targets), len(self.domains)):
            raise ValueError(
                f"`values` must be targets by domains, {len(self.targets)} x {len(self.domains)}, "
                f"got {' x '.join(map(str, shape))}."
            )

    def of(self, target: str, domain: str) -> float:
        """The loss that `target` sheds on `domain`."""
        return float(self.values[self.targets.index(target), self.domains.index(domain)])


def probe_mixtures(count: int, one_hot_factor: float) -> np.ndarray:
    """(k, k) nearly one-hot mixtures: row j has the factor on j and shares out the rest.

    Raises:
        ValueError: A factor outside (1/k, 1], with which the mixtures do not tell domains apart.
    """
    rest = (1 - one_hot_factor) / (count - 1) if count > 1 else 0.0
    if not 0 < one_hot_factor <= 1 or one_hot_factor - rest < 0.05:
        raise ValueError(
            f"`one_hot_factor` must lie above 1/{count} by a margin and at most at 1, so that the "
            f"mixtures differ, got {one_hot_factor}."
        )
    return np.full((count, count), rest) + (one_hot_factor - rest) * np.eye(count)


def solve_mixing_matrix(gains: np.ndarray, one_hot_factor: float) -> np.ndarray:
    """The matrix A of the law from what the probes shed: W A_i = G_i for every target i.

    Args:
        gains: (n, k) loss that target i shed on the probe of domain j; (k, k) in the paper.
        one_hot_factor: Of the probes, as `probe_mixtures` takes it.

    Returns:
        (n, k).

    Raises:
        ValueError: As `probe_mixtures`.
    """
    gains = np.asarray(gains, dtype=np.float64)
    return np.linalg.solve(probe_mixtures(gains.shape[1], one_hot_factor), gains.T).T


def normalize_matrix(matrix: np.ndarray) -> np.ndarray:
    """Shift by the smallest entry where it is negative, then scale to a sum of 1.

    A matrix that has nothing to scale, all entries equal after the shift or zero, tells the domains
    apart in nothing: every entry is then the same.
    """
    shifted = matrix - min(matrix.min(), 0.0)
    total = shifted.sum()
    if total <= 1e-12 * np.abs(matrix).sum():  # nothing, or what rounding left
        return np.full(matrix.shape, 1 / matrix.size)
    return shifted / total


def update_weights(
    weights: np.ndarray,
    matrix: np.ndarray,
    *,
    eta: float,
    normalize: bool = True,
    target_weights: np.ndarray | None = None,
) -> np.ndarray:
    """One step of exponentiated gradient: p_j ~ weights_j exp(eta sum_i u_i A_ij).

    Args:
        weights: (k,) on the simplex, not changed.
        matrix: (n, k), rows targets, columns domains.
        eta: Step.
        normalize: Apply `normalize_matrix` before.
        target_weights: (n,) u, ones by default.

    Returns:
        (k,) on the simplex.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    gains = normalize_matrix(matrix) if normalize else matrix
    u = np.ones(len(gains)) if target_weights is None else np.asarray(target_weights)
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(weights, dtype=np.float64)) + eta * (u @ gains)
    moved = np.exp(logs - logs.max())
    return moved / moved.sum()


def with_floor(weights: np.ndarray, floor: np.ndarray | float) -> np.ndarray:
    """The point of the simplex nearest in KL divergence whose entries are at least `floor`."""
    floor = np.broadcast_to(floor, weights.shape)
    held = np.zeros(len(weights), dtype=bool)
    while True:
        free = 1 - floor[held].sum()
        scaled = np.where(held, floor, weights * free / max(weights[~held].sum(), 1e-300))
        below = (scaled < floor - 1e-15) & ~held
        if not below.any():
            return scaled / scaled.sum()
        held |= below
