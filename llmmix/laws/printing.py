"""Prints the results of mixture laws: tables, and notes in sentences.

`Study` (llmmix/laws/study.py) and eval/mixture_laws.py call it.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np

from llmmix.laws.design import Design
from llmmix.laws.fidelity import Fidelity
from llmmix.laws.judge import Judgement
from llmmix.laws.proposal import Proposal
from llmmix.laws.tables import Runs
from llmmix.laws.transfer import Transfer


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
        shown = f"{rank.estimate:.3f} ({rank.low:.3f} to {rank.high:.3f})"
        rows.append(
            [name, f"{found.error:.3f}", "-" if math.isnan(rank.estimate) else shown]
            + [f"{found.objective_mae:.4f}", f"{found.regret:.4f}"]
            + [f"{found.coverage[level]:.0%}" for level in levels]
            + [f"{found.seconds:.1f}"]
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
        + [f"{found.mae[i]:.4f}  {100 * found.spearman[i]:5.1f}" for found in known.values()]
        for i, target in enumerate(targets)
    ]
    print_table("By target: MAE in nats, and rank correlation in %", ["target", *known], rows)


def print_proposal(
    name: str, found: Proposal, runs: Runs, shown: dict[str, np.ndarray], level: float
) -> None:
    """Print a proposal: its shares beside other mixtures, its losses, and how far to trust it."""
    rows = [
        [domain, *(f"{shares[j]:.3f}" for shares in shown.values())]
        for j, domain in enumerate(runs.domains)
    ]
    print_table(f"The mixture that {name} proposes ({found.found.method})", ["", *shown], rows)
    numbers = np.column_stack([found.losses, found.low, found.high])
    rows = [
        [target, *(f"{number:.4f}" for number in row)]
        for target, row in zip(runs.targets, numbers, strict=True)
    ]
    print_table("Its losses", ["target", "predicted", f"{level:.0%} from", "to"], rows)
    print(
        f"Objective: {found.objective:.4f} predicted. The best run, {runs.ids[found.best_run]}, "
        f"has {found.best_observed:.4f} (predicted {found.best_predicted:.4f}). If the law is "
        f"right, the proposal beats it with a probability of {found.better:.2f}."
    )
    print(
        f"Distance (share to be moved): {found.distance:.3f} from the nearest run, "
        f"{runs.ids[found.nearest_run]}; the runs are {found.spacing:.3f} apart; "
        f"{found.outside:.3f} outside of what they span."
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
            [law, f"{100 * rank.spearman:.2f}"]
            + [f"{100 * rank.spearman_low:.2f} to {100 * rank.spearman_high:.2f}"]
            + [f"{100 * mean:.2f}", f"{one.regret:.4f}"]
            + [f"{some.objective_mae:.4f}" if some else "-"]
        )
    head = ["law", "rank corr. of the objective, %", "95% interval", "mean over targets, %"]
    head += ["regret", "MAE, calibrated on 8"]
    print_table(f"Laws on the runs of {name}", head, rows)


def print_transfer(law: str, found: Transfer) -> None:
    """Print a law on the runs of other models, by target, and after calibration on a few runs."""
    rows = [
        [str(name)]
        + [f"{getattr(found.by_target, key)[i]:.3f}" for key in ("spearman", "kendall")]
        + [f"{getattr(found.by_target, key)[i]:.4f}" for key in ("mae", "mae_in_sample")]
        for i, name in enumerate(found.targets)
    ]
    whole = found.objective
    rows.append(["objective", f"{whole.spearman:.3f}", f"{whole.kendall:.3f}"])
    rows[-1] += [f"{whole.mae:.4f}", f"{whole.mae_in_sample:.4f}"]
    head = ["target", "rank corr.", "Kendall", "MAE as predicted", "calibrated to all"]
    print_table(f"{law} on these {found.runs} runs", head, rows)
    rows = [
        [str(count), f"{c.objective_mae:.4f}", f"{c.mean_mae:.4f}", f"{c.regret:.4f}"]
        for count, c in found.calibrated.items()
    ]
    head = ["runs used", "MAE of the objective", "mean MAE by target", "regret"]
    print_table("Calibrated on a few of them, judged on the others (medians)", head, rows)


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table of text with the first column aligned left and the others right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for i, name in enumerate(head):
        table.add_column(escape(name), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    console = console if sys.stdout.isatty() else Console(width=160)
    console.print(f"\n[bold]{escape(title)}", highlight=False)
    console.print(table)


def _mixture(shares: np.ndarray, domains: Sequence[str], most: int = 5) -> str:
    """The largest shares in words."""
    order = [j for j in np.argsort(-shares, kind="stable") if shares[j] > 0]
    named = " ".join(f"{domains[j]} {shares[j]:.3f}" for j in order[:most])
    return named + (f" +{len(order) - most}" if len(order) > most else "")


def _pm(value: float, sd: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} +- {sd:.3f}"


def print_plan(plan: Design, domains: Sequence[str]) -> None:
    """Print mixtures to run next, as `design.next_mixtures` returns them."""
    rows = [
        [str(i + 1), _mixture(p, domains), f"{plan.expected[i]:.4f} +- {plan.std[i]:.4f}"]
        + [f"{plan.nearest[i]:.3f}", f"{plan.after[i]:.2g}"]
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
        ["similarity of the method's matrix and the fitted one", f"{found.similarity_of_mean:.3f}"],
        ["   90% interval", "{:.3f} to {:.3f}".format(*found.interval)],
        ["   with shuffled domains", f"{found.chance:.3f}"],
        ["R2 of the method's law on intervals after its decisions", f"{found.implied_r2:.3f}"],
        ["R2 of the fitted law there, each left out", f"{found.fitted_r2:.3f}"],
    ]
    print_table(f"{found.method}: {found.intervals} intervals, {folder}", ["", ""], rows)
    for note in found.notes:
        print(f"Note: {note}")
