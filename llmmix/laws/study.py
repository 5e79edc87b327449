"""`Study`: laws judged on finished runs, the best law's proposal, and mixtures to run next.

Each step prints its tables (llmmix/laws/printing.py), writes figures (llmmix/laws/figures.py) and
tables into the study's folder, and returns its part of a JSON document. eval/mixture_laws.py runs
the steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmmix.figures import never_fatal
from llmmix.files import write_whole
from llmmix.laws.budget import learning_curve, runs_needed
from llmmix.laws.design import next_mixtures
from llmmix.laws.figures import (
    draw_budget,
    draw_effects,
    draw_judgement,
    draw_mixtures,
    draw_transfer,
)
from llmmix.laws.judge import Judgement, as_good_as, best_of, compare
from llmmix.laws.law import Law
from llmmix.laws.objective import Objective
from llmmix.laws.printing import (
    print_by_target,
    print_curves,
    print_judged,
    print_plan,
    print_proposal,
    print_transfer,
    print_transfers,
)
from llmmix.laws.proposal import examine_proposal
from llmmix.laws.tables import Runs, write_mixtures
from llmmix.laws.transfer import calibrated_objective, judge_transfer

MOVED = 0.05  # part of the mixture that the figure of effects moves to each domain
TABLES = ("observed", "predictions", "stds", "standardized", "mixture")  # by run, in a judgement


@dataclass
class Study:
    """Finished runs, and the law that proposes mixtures from them.

    Args:
        runs: The finished runs.
        objective: What to minimize, as `Law.propose` takes it.
        folder: Folder for figures and tables.
        seed: Seed of the folds and of sampled searches.
        name: Name of the law that proposes, set by `adopt`.
        law: That law, fitted to all runs.
    """

    runs: Runs
    objective: Objective
    folder: Path
    seed: int = 0
    name: str = field(default="", init=False)
    law: Law = field(init=False)

    def __post_init__(self) -> None:
        self.mixtures, self.losses = self.runs.frames()

    def judge(
        self, laws: Mapping[str, Law], holdout: float, level: float
    ) -> dict[str, Judgement | str]:
        """Judge laws on held-out runs, with the coverage of intervals at levels 0.5 and `level`.

        Raises:
            ValueError: `judge.compare` refuses the runs or the objective.
        """
        levels = (0.5, level)
        print("Judging: " + ", ".join(laws) + " ...", flush=True)
        judged = compare(
            laws,
            self.mixtures,
            self.losses,
            objective=self.objective,
            holdout=holdout,
            seed=self.seed,
            levels=levels,
        )
        print_judged(judged, levels)
        print_by_target(judged)
        return judged

    def adopt(self, name: str, law: Law, judgement: Judgement | str) -> None:
        """Choose the law that proposes: fit it to all runs, and draw its predictions and effects.

        Raises:
            ValueError: The law cannot be fitted to the runs.
        """
        self.name, self.law = name, law.fit(self.mixtures, self.losses)
        if not isinstance(judgement, str):
            weights = self.law.target_weights(self.objective)
            self._draw("predicted.png", draw_judgement, judgement, weights, name)
        effects = self.law.effects(self.runs.mixtures.mean(0), MOVED)
        names = self.runs.domains, self.runs.targets
        self._draw("effects.png", draw_effects, effects, *names, MOVED)

    def _draw(self, name: str, draw: Callable[..., bytes], *given: Any) -> None:
        """Write a figure; one that cannot be drawn is told in one line."""
        with never_fatal(f"figure {name}"):
            write_whole(self.folder / name, draw(*given))

    def propose(
        self, level: float, prior: Mapping[str, float] | None = None, **options: Any
    ) -> dict[str, Any]:
        """The law's best mixture compared with the runs; takes the arguments of `examine_proposal`.

        Raises:
            ValueError: `examine_proposal` refuses the arguments.
        """
        runs, options = self.runs, options | {"prior": prior, "level": level, "seed": self.seed}
        found = examine_proposal(self.law, self.objective, **options)
        before = np.array(list(prior.values())) if prior else runs.mixtures.mean(0)
        shown = {"prior" if prior else "mean of the runs": before}
        shown |= {"best run": runs.mixtures[found.best_run], "proposed": found.mixture}
        self._draw("proposal.png", draw_mixtures, shown, runs.domains)
        mixture = found.mixture[None]
        write_mixtures(self.folder / "proposal.csv", runs.domains, mixture, "proposal")
        print_proposal(self.name, found, runs, shown, level)
        document = vars(found) | {
            "mixture": dict(zip(runs.domains, found.mixture, strict=True)),
            "best_run": runs.ids[found.best_run],
            "nearest_run": runs.ids[found.nearest_run],
        }
        for key in ("losses", "low", "high"):
            document[key] = dict(zip(runs.targets, getattr(found, key), strict=True))
        return document

    def plan(self, count: int, **limits: Any) -> dict[str, Any]:
        """Mixtures to run next; takes the bounds and prior of `design.next_mixtures`.

        Raises:
            ValueError: `next_mixtures` refuses the arguments.
        """
        plan = next_mixtures(self.law, count, objective=self.objective, seed=self.seed, **limits)
        write_mixtures(self.folder / "next.csv", self.runs.domains, plan.mixtures, "next")
        print_plan(plan, self.runs.domains)
        mixtures = [dict(zip(self.runs.domains, p, strict=True)) for p in plan.mixtures]
        return {**vars(plan), "mixtures": mixtures}

    def budget(self, laws: Mapping[str, Law]) -> dict[str, Any]:
        """Error against the number of runs, for laws by name, the adopted one among them.

        Raises:
            ValueError: The runs are too few for a curve, or the adopted law has no error.
        """
        tables = self.mixtures, self.losses
        options: dict[str, Any] = {"objective": self.objective, "seed": self.seed}
        curves = {name: learning_curve(law, *tables, **options) for name, law in laws.items()}
        self._draw("budget.png", draw_budget, curves)
        print_curves(curves)
        needed = runs_needed(curves[self.name])
        print(f"{self.name}: {needed} runs are enough for an error within 10% of that of all.")
        return {"curves": curves, "runs_needed": needed}

    def transfer(
        self, metrics: str, large: Runs, others: Mapping[str, Law], number: int
    ) -> dict[str, Any]:
        """Judge laws on the runs of other models; draw and calibrate the adopted law.

        Args:
            metrics: Name of the other runs' table of losses.
            large: The other runs, as `tables.read_runs_like` reads them.
            others: Further fitted laws to judge, by name.
            number: Number of the figure.

        Raises:
            ValueError: The runs have no target in common with the law.
        """
        mixtures, losses = large.frames()
        mixtures = mixtures[[str(domain) for domain in self.runs.domains]]
        options: dict[str, Any] = {"objective": self.objective, "seed": self.seed}
        found = {
            name: judge_transfer(law, mixtures, losses, **options)
            for name, law in {**others, self.name: self.law}.items()
        }
        mine = found[self.name]
        for note in dict.fromkeys([*large.notes, *mine.notes]):
            print(f"Note: {note}")
        print_transfers(metrics, found)
        print_transfer(self.name, mine)
        fitted, predicted, observed = calibrated_objective(
            self.law, mine, mixtures, losses, self.objective
        )
        named = Path(metrics).stem, mine.objective.spearman
        self._draw(f"transfer_{number}.png", draw_transfer, predicted, observed, *named)
        calibration = {"intercept": fitted.intercept_, "slope": fitted.slope_}
        return {"metrics": metrics, "laws": found, "calibration": calibration}


def choose_law(judged: Mapping[str, Judgement | str], default: str) -> str:
    """Name of the law to propose: the best, or the default if it is not significantly worse.

    Raises:
        ValueError: No law could be judged.
    """
    best = best_of(judged)
    equal = as_good_as(best, judged)
    told = f"; the runs do not tell it from {', '.join(equal)}" if equal else ""
    print(f"Best on held-out runs: {best}{told}.")
    if default not in equal:
        return best
    print(f"{default} proposes: it is the default where the runs do not speak against it.")
    return default


def summaries(judged: Mapping[str, Judgement | str]) -> dict[str, Any]:
    """Judgements by name, without their tables by run."""

    def summary(found: Judgement | str) -> dict[str, Any] | str:
        if isinstance(found, str):
            return found
        return {key: value for key, value in vars(found).items() if key not in TABLES}

    return {name: summary(found) for name, found in judged.items()}
