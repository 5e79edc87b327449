"""What a law is fitted to, checked: shares on the simplex and losses, with the names of both."""

from collections.abc import Mapping

import numpy as np

TOLERANCE = 1e-3  # by which shares may miss a sum of one
ROUNDING = 5e-3  # and by which those may that were written with three decimals or more


def check_mixtures(values, names=None, argument: str = "mixtures") -> np.ndarray:
    """Shares as float64, every row scaled to a sum of one.

    Args:
        values: (n, k) shares, or (k,) of one mixture. Rows may miss a sum of one by 1e-3, or by
            what rounding k shares to their number of decimals explains, up to 5e-3.
        names: k names for the messages.
        argument: For the messages.

    Returns:
        (n, k), a copy.

    Raises:
        ValueError: No numbers, no rows, a negative or missing share, or a sum that is not one.
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
        domain = column if names is None else names[column]
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


def check_losses(values, runs: int, names=None) -> np.ndarray:
    """Losses as float64, NaN where a run has none.

    Args:
        values: (n, m), or (n,) of one target. What is not finite counts as missing.
        runs: n.
        names: m names for the messages.

    Returns:
        (n, m), a copy.

    Raises:
        ValueError: No numbers, another number of runs, or a target without a single loss.
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
        named = [str(j if names is None else names[j]) for j in empty]
        raise ValueError(f"`losses`: no run has a loss of {', '.join(named)}. Leave it out.")
    return losses


def by_name(given):
    """A mapping or a pandas series as a dictionary by text; what is none as it is."""
    if isinstance(given, Mapping) or (hasattr(given, "to_dict") and hasattr(given, "index")):
        return {str(name): number for name, number in dict(given).items()}
    return given


def canonical_order(mixtures: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, ...]:
    """An order of runs, domains and targets that is the same however they came.

    A sum in another order rounds otherwise, and a search may magnify that. Fits are made in this
    order, so that what was permuted gives what is permuted, to the last digit.

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
