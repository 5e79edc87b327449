"""Prints the results of mixture laws: tables, and notes in sentences.

`Study` (llmmix/laws/study.py) and eval/mixture_laws.py call it.
"""

import math
from collections.abc import Sequence

import numpy as np

from llmmix.laws.design import Design
from llmmix.laws.fidelity import Fidelity
from llmmix.laws.judge import Judgement
from llmmix.laws.proposal import Proposal
from llmmix.laws.tables import Runs
from llmmix.laws.transfer import Transfer
from llmmix.terminal import number, print_table


def print_runs(runs: Runs) -> None:
    """Print the number of runs, their domains, and the notes on them."""
    print(f"{len(runs.ids)} runs of {len(runs.domains)} domains: {', '.join(runs.domains)}.")
    for note in runs.notes:
        print(f"Note: {note}")


def print_judged(judged: dict[str, Judgement | str], levels: Sequence[float]) -> None:
    """Print the scores of laws side by side, as `judge.compare` returns them."""
    title = "Held-out runs: error over all targets (1: as the mean); the objective"
    head = ["law", "error", "rank corr.", "MAE, nats", "regret"]
    head += [f"in {level:.0%}" for level in levels] + ["s"]
    rows = []
    for name, found in judged.items():
        if isinstance(found, str):
            rows.append([name, "-", *[""] * (len(head) - 2)])
            continue
        rank = found.objective_spearman
        shown = f"{rank.estimate:z.3f} ({rank.low:z.3f} to {rank.high:z.3f})"
        rows.append(
            [name, number(found.error), "-" if math.isnan(rank.estimate) else shown]
            + [number(found.objective_mae, 4), number(found.regret, 4)]
            + [f"{found.coverage[level]:.0%}" for level in levels]
            + [number(found.seconds, 1)]
        )
    print_table(title, head, rows)
    for name, found in judged.items():
        for problem in [found] if isinstance(found, str) else found.problems:
            print(f"Note: {name}: {problem}")


def print_by_target(judged: dict[str, Judgement | str]) -> None:
    """Print the scores of laws target by target, as `judge.compare` returns them."""
    known = {name: found for name, found in judged.items() if not isinstance(found, str)}
    targets = next(iter(known.values())).targets
    rows = [
        [str(target)]
        + [f"{found.mae[i]:z.4f}  {100 * found.spearman[i]:z5.1f}" for found in known.values()]
        for i, target in enumerate(targets)
    ]
    print_table("By target: MAE in nats, and rank correlation in %", ["target", *known], rows)


def print_proposal(
    name: str, found: Proposal, runs: Runs, shown: dict[str, np.ndarray], level: float
) -> None:
    """Print a proposal: its shares beside other mixtures, its losses, and how far to trust it."""
    rows = [
        [domain, *(number(shares[j]) for shares in shown.values())]
        for j, domain in enumerate(runs.domains)
    ]
    print_table(f"The mixture that {name} proposes ({found.found.method})", ["", *shown], rows)
    numbers = np.column_stack([found.losses, found.low, found.high])
    rows = [
        [target, *(number(value, 4) for value in row)]
        for target, row in zip(runs.targets, numbers, strict=True)
    ]
    print_table("Its losses", ["target", "predicted", f"{level:.0%} from", "to"], rows)
    print(
        f"Objective: {found.objective:z.4f} predicted. The best run, {runs.ids[found.best_run]}, "
        f"has {found.best_observed:z.4f} (predicted {found.best_predicted:z.4f}). If the law is "
        f"right, the proposal beats it with a probability of {found.better:z.2f}."
    )
    print(
        f"Distance (share to be moved): {found.distance:z.3f} from the nearest run, "
        f"{runs.ids[found.nearest_run]}; the runs are {found.spacing:z.3f} apart; "
        f"{found.outside:z.3f} outside of what they span."
    )
    if found.distance > 2 * found.spacing or found.outside > found.spacing:
        print(
            "Note: that is far from the runs, where laws go wrong: run a mixture in between first."
        )
    bound = ", ".join(str(runs.domains[j]) for j in found.found.at_bounds)
    if bound:
        print(f"At a bound (0, `lower`, `upper`, or what there is): {bound}.")
    if not found.found.converged:
        print("Note: the search did not converge: the proposal may be short of the law's best.")


def print_transfers(name: str, found: dict[str, Transfer]) -> None:
    """Print laws on the runs of other models, as `transfer.judge_transfer` judges them."""
    rows = []
    for law, one in found.items():
        rank, ranks, some = one.objective, one.by_target.spearman, one.calibrated.get(8)
        mean = ranks[~np.isnan(ranks)].sum() / max((~np.isnan(ranks)).sum(), 1)
        rows.append(
            [law, number(100 * rank.spearman, 2)]
            + [f"{100 * rank.spearman_low:z.2f} to {100 * rank.spearman_high:z.2f}"]
            + [number(100 * mean, 2), number(one.regret, 4)]
            + [number(some.objective_mae, 4) if some else "-"]
        )
    head = ["law", "rank corr. of the objective, %", "95% interval", "mean over targets, %"]
    head += ["regret", "MAE, calibrated on 8"]
    print_table(f"Laws on the runs of {name}", head, rows)


def print_transfer(law: str, found: Transfer) -> None:
    """Print a law on the runs of other models, by target, and after calibration on a few runs."""
    rows = [
        [str(name)]
        + [number(getattr(found.by_target, key)[i]) for key in ("spearman", "kendall")]
        + [number(getattr(found.by_target, key)[i], 4) for key in ("mae", "mae_in_sample")]
        for i, name in enumerate(found.targets)
    ]
    whole = found.objective
    rows.append(["objective", number(whole.spearman), number(whole.kendall)])
    rows[-1] += [number(whole.mae, 4), number(whole.mae_in_sample, 4)]
    head = ["target", "rank corr.", "Kendall", "MAE as predicted", "calibrated to all"]
    print_table(f"{law} on these {found.runs} runs", head, rows)
    rows = [
        [str(count), number(c.objective_mae, 4), number(c.mean_mae, 4), number(c.regret, 4)]
        for count, c in found.calibrated.items()
    ]
    head = ["runs used", "MAE of the objective", "mean MAE by target", "regret"]
    print_table("Calibrated on a few of them, judged on the others (medians)", head, rows)


def _mixture(shares: np.ndarray, domains: Sequence[str], most: int = 5) -> str:
    """The largest shares in words."""
    order = [j for j in np.argsort(-shares, kind="stable") if shares[j] > 0]
    named = " ".join(f"{domains[j]} {shares[j]:z.3f}" for j in order[:most])
    return named + (f" +{len(order) - most}" if len(order) > most else "")


def _pm(value: float, sd: float) -> str:
    return "-" if math.isnan(value) else f"{value:z.3f} +- {sd:z.3f}"


def print_plan(plan: Design, domains: Sequence[str]) -> None:
    """Print mixtures to run next, as `design.next_mixtures` returns them."""
    rows = [
        [str(i + 1), _mixture(p, domains), f"{plan.expected[i]:z.4f} +- {plan.std[i]:z.4f}"]
        + [number(plan.nearest[i]), f"{plan.after[i]:.2g}"]
        for i, p in enumerate(plan.mixtures)
    ]
    head = ["", "mixture", "objective", "from nearest run", "uncertain after"]
    title = f"Next runs, the most useful first; the optimum is uncertain by {plan.before:.2g} nats"
    print_table(title, head, rows)
    for note in plan.notes:
        print(f"Note: {note}")


def print_curves(curves: dict[str, list[dict]]) -> None:
    """Print scores against the number of runs, by law, as from `budget.learning_curve`."""
    rows = [
        [law, str(point["runs"])]
        + [_pm(point[key], point[f"{key}_sd"]) for key in ("error", "spearman", "mae")]
        for law, curve in curves.items()
        for point in curve
    ]
    head = ["law", "runs", "error", "rank corr. of the objective", "its MAE, nats"]
    print_table("Fitted to fewer runs", head, rows)


def print_fidelity(found: Fidelity, folder: str) -> None:
    """Print how well a method's law fits its run, as `fidelity.assess` returns it."""
    rows = [
        ["similarity of the method's matrix and the fitted one", number(found.similarity_of_mean)],
        ["   90% interval", "{:z.3f} to {:z.3f}".format(*found.interval)],
        ["   with shuffled domains", number(found.chance)],
        ["R2 of the method's law on intervals after its decisions", number(found.implied_r2)],
        ["R2 of the fitted law there, each left out", number(found.fitted_r2)],
    ]
    print_table(f"{found.method}: {found.intervals} intervals, {folder}", ["", ""], rows)
    for note in found.notes:
        print(f"Note: {note}")
