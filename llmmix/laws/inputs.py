"""Checked inputs of a law: shares on the simplex and losses, with the names of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

TOLERANCE = 1e-3  # by which a sum of shares may miss one
ROUNDING = 5e-3  # the same for shares written with three to five decimals


class Problem(NamedTuple):
    """What is fitted: shares of the domains and losses of the targets that vary."""

    mixtures: np.ndarray  # (n, k)
    losses: np.ndarray  # (n, m), NaN where missing


@dataclass(frozen=True, eq=False)
class Inputs:
    """The runs behind a law, checked, and which parts of them can be fitted.

    Args:
        domains: k names: the columns of a data frame, else 0, 1, ...
        targets: m names, likewise.
        mixtures: (n, k) shares.
        losses: (n, m), NaN where missing.
        flat: Whether the losses came as (n,).
        runs: (n,) indices of the runs in the order of the fit (`canonical_order`).
        varied: Indices of the domains whose share varied, in the order of the fit.
        moving: Indices of the targets whose loss varied, in the order of the fit.
    """

    domains: list
    targets: list
    mixtures: np.ndarray
    losses: np.ndarray
    flat: bool
    runs: np.ndarray
    varied: np.ndarray
    moving: np.ndarray

    @property
    def problem(self) -> Problem:
        """The runs without domains and targets that never varied, in the order of the fit."""
        X = self.mixtures[np.ix_(self.runs, self.varied)]
        return Problem(X, self.losses[np.ix_(self.runs, self.moving)])

    @property
    def fixed(self) -> np.ndarray:
        """(k,) whether the domain has the same share in all runs."""
        return ~np.isin(np.arange(len(self.domains)), self.varied)

    @property
    def unidentified(self) -> list:
        """Names of the domains whose share never varied."""
        return [self.domains[j] for j in np.flatnonzero(self.fixed)]

    @property
    def constant(self) -> list:
        """Names of the targets whose loss never varied."""
        return [name for i, name in enumerate(self.targets) if i not in self.moving]

    def check(self, mixtures: ArrayLike) -> np.ndarray:
        """(n, k) shares of mixtures for which losses are asked.

        Raises:
            ValueError: `mixtures` are not shares, or have other domains than the runs.
        """
        X = check_mixtures(mixtures)
        if X.shape[1] != len(self.domains):
            raise ValueError(f"`mixtures` must have {len(self.domains)} domains, got {X.shape[1]}.")
        names = column_names(mixtures)
        if names and names != [str(name) for name in self.domains]:
            raise ValueError(
                f"`mixtures` has the domains {names}, the law was fitted to {self.domains}."
            )
        return X


def check_inputs(mixtures: ArrayLike, losses: ArrayLike) -> Inputs:
    """Finished runs, checked for a fit.

    Args:
        mixtures: (n, k) shares.
        losses: (n, m), or (n,) of a single target.

    Raises:
        ValueError: Shares or losses are not valid, or all runs have the same mixture.
    """
    domains, targets = column_names(mixtures), column_names(losses)
    X = check_mixtures(mixtures, domains)
    Y = check_losses(losses, len(X), targets)
    varied = np.ptp(X, 0) > 1e-9
    if not varied.any():
        why = "there is one domain" if X.shape[1] == 1 else f"all {len(X)} have the same"
        raise ValueError(f"`mixtures`: no two runs differ in their mixture: {why}. Add runs.")
    moving = np.nanmax(Y, 0) - np.nanmin(Y, 0) > 1e-12 * np.abs(np.nanmax(Y, 0))
    shared, lost = np.flatnonzero(varied), np.flatnonzero(moving)
    runs, inner, outer = canonical_order(X[:, shared], Y[:, lost])
    return Inputs(
        domains=domains or list(range(X.shape[1])),
        targets=targets or list(range(Y.shape[1])),
        mixtures=X,
        losses=Y,
        flat=np.ndim(losses) == 1,
        runs=runs,
        varied=shared[inner],
        moving=lost[outer],
    )


def column_names(table: Any) -> list[str] | None:
    """A data frame's column names as text; None for a table without names.

    Raises:
        ValueError: Two columns have the same name.
    """
    columns = getattr(table, "columns", None)
    if columns is None:
        return None
    names = [str(name) for name in columns]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"A table has two columns {listed(twice)}: name each once.")
    return names


def listed(names: Sequence, most: int = 5) -> str:
    """The first names, and the number of further ones, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def check_mixtures(
    values: ArrayLike, names: Sequence | None = None, argument: str = "mixtures"
) -> np.ndarray:
    """Shares as float64, every row scaled to a sum of one.

    Args:
        values: (n, k) shares, or (k,) of one mixture. Rows may miss a sum of one by 1e-3, or by
            what rounding k shares to their number of decimals explains, up to 5e-3.
        names: k names, for error messages.
        argument: Name of the argument, for error messages.

    Returns:
        (n, k), a copy.

    Raises:
        ValueError: `values` holds no numbers, no rows, a negative or missing share, or a row whose
            sum is not one.
    """
    if hasattr(values, "index") and hasattr(values, "to_dict") and np.ndim(values) == 1:
        raise ValueError(f"`{argument}` must be an array or a data frame, got a series.")
    try:
        shares = np.array(values, dtype=np.float64, ndmin=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{argument}` must be numbers, runs by domains: {error}.") from error
    if shares.ndim != 2 or not shares.size:
        raise ValueError(
            f"`{argument}` must be runs by domains (n, k), got shape {np.shape(values)}."
        )
    if names is not None and len(names) != shares.shape[1]:
        raise ValueError(
            f"`{argument}` has {shares.shape[1]} domains, and {len(names)} names: {list(names)}."
        )
    bad = ~np.isfinite(shares) | (shares < 0)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        domain = column if names is None else names[int(column)]
        raise ValueError(
            f"`{argument}`: run {row} has a share of {shares[row, column]} of domain {domain}; "
            f"shares lie between 0 and 1."
        )
    sums = shares.sum(1)
    off = np.abs(sums - 1)
    if off.max() > _tolerance(shares):
        row = int(off.argmax())
        raise ValueError(
            f"`{argument}`: the shares of run {row} sum to {sums[row]:.6g}, and "
            f"{(off > _tolerance(shares)).sum()} of {len(sums)} runs do not sum to 1. Give the "
            f"shares of all domains, as parts of 1."
        )
    return shares / sums[:, None]


def _tolerance(shares: np.ndarray) -> float:
    for decimals in (3, 4, 5):
        if np.abs(shares - shares.round(decimals)).max() < 1e-9:
            explained = shares.shape[1] * 0.5 * 10.0**-decimals
            return min(max(TOLERANCE, explained), ROUNDING) + 1e-9
    return TOLERANCE + 1e-9


def check_losses(values: ArrayLike, runs: int, names: Sequence | None = None) -> np.ndarray:
    """Losses as float64, NaN where a run has none.

    Args:
        values: (n, m), or (n,) for one target. A loss that is not finite counts as missing.
        runs: Number n of runs.
        names: m names, for error messages.

    Returns:
        (n, m), a copy.

    Raises:
        ValueError: `values` holds no numbers, another number of runs, or a target without a loss.
    """
    try:
        losses = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`losses` must be numbers, runs by targets: {error}.") from error
    losses = losses[:, None] if losses.ndim == 1 else losses
    if losses.ndim != 2 or losses.shape[0] != runs or not losses.shape[1]:
        raise ValueError(
            f"`losses` must be runs by targets, of the {runs} runs of `mixtures`; got shape "
            f"{np.shape(values)}."
        )
    if names is not None and len(names) != losses.shape[1]:
        raise ValueError(
            f"`losses` has {losses.shape[1]} targets, and {len(names)} names: {list(names)}."
        )
    losses[~np.isfinite(losses)] = np.nan
    empty = np.flatnonzero(np.isnan(losses).all(0))
    if len(empty):
        named = [str(j if names is None else names[j]) for j in empty.tolist()]
        raise ValueError(f"`losses`: no run has a loss of {', '.join(named)}. Leave it out.")
    return losses


def by_name(given: Any) -> Any:
    """A mapping or pandas series as a dictionary with text keys; anything else unchanged."""
    if isinstance(given, Mapping) or (hasattr(given, "to_dict") and hasattr(given, "index")):
        return {str(name): number for name, number in dict(given).items()}
    return given


def canonical_order(mixtures: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, ...]:
    """An order of runs, domains and targets that does not depend on the order in which they came.

    A sum in another order rounds differently, and a search may magnify that. Fits are made in this
    order, so that permuted inputs give permuted results, to the last digit.

    Args:
        mixtures: (n, k).
        losses: (n, m).

    Returns:
        Indices of the runs (n,), the domains (k,) and the targets (m,).
    """
    filled = np.nan_to_num(losses, nan=np.inf)
    targets = np.lexsort(np.sort(filled, 0)[::-1])
    columns = np.hstack([np.sort(mixtures, 1)[:, ::-1], filled[:, targets[::-1]]])
    runs = np.lexsort(columns.T)
    domains = np.lexsort(mixtures[runs][::-1])
    return runs, domains, targets
