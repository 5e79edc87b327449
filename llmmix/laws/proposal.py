"""A mixture that a law proposes, beside the runs: what it promises, and how far it ventures."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmmix.laws.accuracy import weighted
from llmmix.laws.law import Law
from llmmix.laws.objective import Objective
from llmmix.laws.search import Found
from llmmix.laws.simplex import hull_distance, nearest_run, typical_spacing

DRAWS = 400  # laws that the runs leave open, asked whether the proposal is better


@dataclass(frozen=True, eq=False)
class Proposal:
    """A mixture, and what to know before it is run. Distances are shares that would be moved.

    Args:
        mixture: (k,).
        objective: The law's objective there.
        losses: (m,) the law's losses there.
        low: (m,) lower end of the interval of a run's losses, at the level asked for.
        high: (m,) upper end of it.
        found: How it was found.
        best_run: Index of the run whose observed objective is smallest.
        best_observed: That objective.
        best_predicted: What the law says of it: the law's own error there.
        better: Part of the laws that the runs leave open under which the proposal beats that run.
        nearest_run: Index of the run nearest to the proposal.
        distance: Distance to that run.
        spacing: Median distance of a run to its nearest other one.
        outside: Distance to the nearest mean of runs: 0 within what they span.
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
    """The law's best mixture beside the runs behind it.

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
