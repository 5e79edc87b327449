"""A law's proposal compared with the runs: its expected losses, and its distance from the runs."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmmix.laws.accuracy import weighted
from llmmix.laws.law import Law
from llmmix.laws.objective import Objective
from llmmix.laws.search import Found
from llmmix.laws.simplex import hull_distance, nearest_run, typical_spacing

DRAWS = 400  # laws drawn to estimate the probability that the proposal is better


@dataclass(frozen=True, eq=False)
class Proposal:
    """A mixture, and what to know before it is run. A distance is the share to be moved.

    Args:
        mixture: (k,).
        objective: Predicted objective of the mixture.
        losses: (m,) predicted losses of the mixture.
        low: (m,) lower ends of the intervals of a run's losses.
        high: (m,) upper ends of these intervals.
        found: Result of the search.
        best_run: Index of the run with the smallest observed objective.
        best_observed: Observed objective of that run.
        best_predicted: Predicted objective of that run; the difference is the law's error there.
        better: Fraction of laws drawn from those that fit the runs under which the proposal beats
            that run.
        nearest_run: Index of the run nearest to the proposal.
        distance: Distance to that run.
        spacing: Median distance of a run to its nearest other one.
        outside: Distance to the convex hull of the runs; 0 inside.
    """

    mixture: np.ndarray
    objective: float
    losses: np.ndarray
    low: np.ndarray
    high: np.ndarray
    found: Found
    best_run: int
    best_observed: float
    best_predicted: float
    better: float
    nearest_run: int
    distance: float
    spacing: float
    outside: float


def examine_proposal(
    law: Law, objective: Objective = None, *, level: float = 0.9, seed: int = 0, **options: Any
) -> Proposal:
    """The law's best mixture compared with the runs behind the law.

    Args:
        law: A fitted law.
        objective: As `Law.propose` takes it.
        level: Level of the intervals.
        seed: Seed of a sampled search and of the laws drawn.
        **options: The other arguments of `Law.propose`: bounds, data, prior, method.

    Raises:
        ValueError: `Law.propose` refuses the arguments, or no run has all losses of the objective.
    """
    found = law.propose(objective, seed=seed, **options)
    u, runs = law.target_weights(objective), law.mixtures_
    observed = weighted(law.losses_, u)
    if np.isnan(observed).all():
        raise ValueError("`objective`: no run has all the losses that it weighs; weigh fewer.")
    best = int(np.nanargmin(observed))
    drawn = law.draws(np.vstack([found.mixture, runs[best]]), DRAWS, seed) @ u
    low, high = (np.reshape(bound, -1) for bound in law.interval(found.mixture, level))
    predicted = np.reshape(law.predict(np.vstack([found.mixture, runs[best]])), (2, -1))
    nearest, distance = nearest_run(found.mixture, runs)
    return Proposal(
        mixture=found.mixture,
        objective=float(predicted[0] @ u),
        losses=predicted[0],
        low=low,
        high=high,
        found=found,
        best_run=best,
        best_observed=float(observed[best]),
        best_predicted=float(predicted[1] @ u),
        better=float((drawn[:, 0] < drawn[:, 1]).mean()),
        nearest_run=nearest,
        distance=distance,
        spacing=typical_spacing(runs),
        outside=hull_distance(found.mixture, runs),
    )
