"""Learning curves: how well a law predicts when fitted to fewer runs, and how many it needs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from sklearn.model_selection import ShuffleSplit

from llmmix.laws.held_out import JudgedRuns, judged_runs
from llmmix.laws.judge import judge_folds
from llmmix.laws.law import Law
from llmmix.laws.objective import Objective

HELD_OUT = 0.2  # fraction of the mixtures on which a learning curve is judged
SCORES = ("error", "spearman", "mae")  # of a learning curve


def learning_curve(
    law: Law,
    mixtures: ArrayLike,
    losses: ArrayLike,
    *,
    objective: Objective = None,
    sizes: Sequence[int] | None = None,
    repeats: int = 3,
    seed: int = 0,
) -> list[dict]:
    """How well a law predicts when it is fitted to fewer runs.

    Every repeat holds out a fifth of the mixtures and fits the law to n runs of the others, each of
    a different mixture. The runs of a smaller n are among the runs of a larger n.

    Args:
        law: The law; it is cloned and stays as it is.
        mixtures: (n, k).
        losses: (n, m).
        objective: As in `Law.propose`.
        sizes: Numbers of runs. Default: 8, 16, 32, ... and four fifths of the mixtures.
        repeats: Number of times that runs are drawn.
        seed: Seed of the draws.

    Returns:
        A dict for each size, with `runs`, the size; `error` (as in `Judgement`), `spearman` and
        `mae` of the objective, each a mean over the repeats; `error_sd`, `spearman_sd` and
        `mae_sd`, their standard deviations over the repeats; and `reason`, why the law could not be
        fitted in some or all of the repeats, else "".

    Raises:
        ValueError: There are fewer than 5 mixtures, or a size is below 1 or above the number of
            mixtures that are not held out.
    """
    runs = judged_runs(mixtures, losses, objective)
    count = runs.mixture.max() + 1
    held = int(np.ceil(HELD_OUT * count))
    most = count - held
    if count < 5:
        raise ValueError(
            f"`mixtures`: a learning curve takes 5 different ones, got {count}. Add runs."
        )
    if sizes is None:
        sizes = [n for n in (8 * 2 ** np.arange(20)).tolist() if n < most] + [most]
    if min(sizes) < 1 or max(sizes) > most:
        raise ValueError(
            f"`sizes` must lie between 1 and {most}, which is what {count} mixtures leave when "
            f"{held} are held out; got {list(sizes)}."
        )
    trials: dict[int, list] = {int(n): [] for n in sorted(sizes)}
    rng = np.random.default_rng(seed)
    split = ShuffleSplit(repeats, test_size=held, random_state=seed).split(np.arange(count))
    for others, apart in split:
        test = np.flatnonzero(np.isin(runs.mixture, apart))
        pool = [rng.choice(np.flatnonzero(runs.mixture == group)) for group in others]
        for n, results in trials.items():
            results.append(_trial(law, runs, np.sort(pool[:n]), test))
    return [_point(n, results) for n, results in trials.items()]


def _trial(law: Law, runs: JudgedRuns, train: np.ndarray, test: np.ndarray) -> tuple | str:
    try:
        judged = judge_folds(law, runs, [(train, test)], (), 0)
    except ValueError as error:
        return str(error)
    return judged.error, judged.objective_spearman.estimate, judged.objective_mae


def _point(n: int, results: list) -> dict:
    reasons = [result for result in results if isinstance(result, str)]
    numbers = [result for result in results if not isinstance(result, str)] or [[np.nan] * 3]
    point: dict = {"runs": n}
    for name, values in zip(SCORES, np.transpose(numbers), strict=True):
        point |= {name: float(values.mean()), f"{name}_sd": float(values.std())}
    partly = f"{len(reasons)} of {len(results)} draws: " if len(reasons) < len(results) else ""
    return point | {"reason": partly + reasons[0] if reasons else ""}


def runs_needed(curve: list[dict], within: float = 0.1) -> int:
    """Smallest number of runs with an error at most `within` (a fraction) above that of all runs.

    Raises:
        ValueError: The law could be fitted at no size of `curve`.
    """
    known = [point for point in curve if np.isfinite(point["error"])]
    if not known:
        raise ValueError("`curve` has no error: the law could be fitted at none of its sizes.")
    bar = (1 + within) * max(known, key=lambda point: point["runs"])["error"]
    return min(point["runs"] for point in known if point["error"] <= bar)
