r"""Mixture laws: fitted to finished runs, judged on runs held out, and what to train next.

    llmmix eval mixture_laws --ratios ratios.csv --metrics metrics.csv --objective code=2 docs=1
    llmmix eval mixture_laws --ratios ratios.csv --metrics metrics.csv --next 8 --budget \
        --transfer ratios_1b.csv metrics_1b.csv --available code=4e9 docs=9e9 \
        --tokens 1e10 --max_epochs 4
    llmmix eval mixture_laws --run runs/aioli

Tables of a line a run, joined by the run's id: those of `llmmix run mixture_sweep`, RegMix or
Olmix. Every law is refitted with a part of the mixtures held out (`--holdout`) and judged on them;
the best one, fitted to all runs, proposes the mixture. In `--output_dir`: mixture_laws.json,
proposal.csv and next.csv (tables of mixtures, as `--ratios`), and figures. `--run` asks how true a
method's own law was to the run that it steered (`llmmix.mixing.laws.fidelity`).
"""

import csv
import json
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from llmmix.files import plain
from llmmix.laws.printing import (
    print_by_target,
    print_curves,
    print_fidelity,
    print_judged,
    print_plan,
    print_proposal,
    print_transfer,
    print_transfers,
)

LAWS = ["linear", "log_linear", "exponential", "boosted", "effective"]


@dataclass
class MixtureLawsArguments:
    """What `llmmix eval mixture_laws` takes."""

    ratios: str | None = field(default=None, metadata={"help": "Table of mixtures, a line a run."})
    metrics: str | None = field(default=None, metadata={"help": "Table of losses, a line a run."})
    objective: list[str] = field(
        default_factory=lambda: ["mean"],
        metadata={"help": "What to minimise: mean, a target, or TARGET=WEIGHT ..."},
    )
    laws: list[str] = field(
        default_factory=lambda: list(LAWS), metadata={"help": f"Which: {', '.join(LAWS)}."}
    )
    law: str | None = field(
        default=None,
        metadata={"help": "Which proposes. Default: the best held out, effective where it ties."},
    )
    max_runs: int | None = field(
        default=None, metadata={"help": "Use so many runs alone, drawn by `seed`."}
    )
    holdout: float = field(default=0.2, metadata={"help": "Part of the mixtures held out a time."})
    level: float = field(default=0.9, metadata={"help": "Of the intervals."})
    prior: list[str] | None = field(
        default=None, metadata={"help": "DOMAIN=SHARE ... Default: the mean of the runs."}
    )
    closeness: float = field(
        default=0.0, metadata={"help": "Nats that a KL divergence of 1 from the prior is worth."}
    )
    lower: list[str] | None = field(default=None, metadata={"help": "DOMAIN=SHARE, at least."})
    upper: list[str] | None = field(default=None, metadata={"help": "DOMAIN=SHARE, at most."})
    available: list[str] | None = field(default=None, metadata={"help": "DOMAIN=TOKENS there are."})
    tokens: float | None = field(default=None, metadata={"help": "Of the run that is planned."})
    max_epochs: float | None = field(default=None, metadata={"help": "A domain may be repeated."})
    search: str = field(
        default="auto", metadata={"help": "gradient, sample (as RegMix), or auto: what fits."}
    )
    transfer: list[str] | None = field(
        default=None, metadata={"help": "RATIOS METRICS ... of other models."}
    )
    next: int = field(default=0, metadata={"help": "Propose so many mixtures to run next."})
    budget: bool = field(default=False, metadata={"help": "Error against the number of runs."})
    run: str | None = field(default=None, metadata={"help": "Folder of a mixture run to assess."})
    seed: int = field(default=0, metadata={"help": "Of the folds and of sampled searches."})
    output_dir: str = field(default="runs/mixture_laws", metadata={"help": "Where results go."})


def main(args: MixtureLawsArguments) -> dict:
    """Do what the arguments ask for; print tables, write the document and figures, return it."""
    _check(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    document: dict = {"arguments": asdict(args)}
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"Note: {message}")
        if args.ratios:
            document |= _Lab(args, folder).work()
        if args.run:
            document["fidelity"] = _assess(args.run)
    document = plain(document)
    (folder / "mixture_laws.json").write_text(json.dumps(document, indent=1))
    print(f"Results: {folder}")
    return document


class _Lab:
    """Runs, the laws judged on them, and the one that proposes."""

    def __init__(self, args: MixtureLawsArguments, folder: Path):
        from llmmix.laws.tables import read_runs

        self.args, self.folder = args, folder
        self.runs = _drawn(read_runs(args.ratios, args.metrics), args.max_runs, args.seed)
        runs, domains = self.runs, ", ".join(self.runs.domains)
        print(f"{len(runs.ids)} runs of {len(runs.domains)} domains: {domains}.")
        for note in runs.notes:
            print(f"Note: {note}")
        self.mixtures, self.losses = _tables(runs)
        self.objective = _objective(args.objective, runs.targets)
        pairs = args.transfer or []
        self.large = [_large(*pair, runs) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
        self.wishes = {
            name: _shares(getattr(args, name), name, runs.domains)
            for name in ("lower", "upper", "available", "prior")
        }

    def work(self) -> dict:
        document = {"domains": self.runs.domains, "targets": self.runs.targets}
        judged = self._judge()
        document["judged"] = {name: _summary(found) for name, found in judged.items()}
        self.name = name = self.args.law or _best(judged)
        document["law"] = name
        self.law = _laws([name])[name].fit(self.mixtures, self.losses)
        self._draw_law(judged[name])
        document["proposal"] = self._propose()
        if self.args.next:
            document["next"] = self._plan()
        if self.args.budget:
            document["budget"] = self._budget()
        if self.large:
            others = [n for n in self.args.laws if n != name and not isinstance(judged[n], str)]
            tables = self.mixtures, self.losses
            fitted = {n: law.fit(*tables) for n, law in _laws(others).items()} | {name: self.law}
            document["transfer"] = [
                self._transfer(number, large, fitted) for number, large in enumerate(self.large, 1)
            ]
        return document

    def _judge(self) -> dict:
        from llmmix.laws.judge import compare

        levels = (0.5, self.args.level)
        options = {"objective": self.objective, "holdout": self.args.holdout}
        options |= {"seed": self.args.seed, "levels": levels}
        print("Judging: " + ", ".join(self.args.laws) + " ...", flush=True)
        judged = compare(_laws(self.args.laws), self.mixtures, self.losses, **options)
        print_judged(judged, levels)
        print_by_target(judged)
        return judged

    def _draw_law(self, judgement) -> None:
        from llmmix.laws.figures import draw_effects, draw_predictions

        if not isinstance(judgement, str):
            u = self.law.target_weights(self.objective)
            used = u > 0
            titles = ["objective", *self.runs.targets]
            parts = judgement.observed, judgement.predictions, judgement.stds
            observed, predicted, stds = (
                np.column_stack([part[:, used] @ u[used], part]) for part in parts
            )
            stds[:, 0] = np.sqrt((judgement.stds[:, used] ** 2) @ u[used] ** 2)
            figure = draw_predictions(observed, predicted, stds, titles, self.name)
            (self.folder / "predicted.png").write_bytes(figure)
        moved = 0.05
        effects = self.law.effects(self.runs.mixtures.mean(0), moved)
        figure = draw_effects(effects, self.runs.domains, self.runs.targets, moved)
        (self.folder / "effects.png").write_bytes(figure)

    def _propose(self) -> dict:
        from llmmix.laws.figures import draw_mixtures
        from llmmix.laws.proposal import propose

        args, runs = self.args, self.runs
        options = {"tokens": args.tokens, "max_epochs": args.max_epochs, "seed": args.seed}
        options |= {"closeness": args.closeness, "method": args.search, "level": args.level}
        found = propose(self.law, self.objective, **self.wishes, **options)
        prior = self.wishes["prior"]
        prior = runs.mixtures.mean(0) if prior is None else np.array(list(prior.values()))
        shown = {"prior" if self.wishes["prior"] else "mean of the runs": prior}
        shown |= {"best run": runs.mixtures[found.best_run], "proposed": found.mixture}
        (self.folder / "proposal.png").write_bytes(draw_mixtures(shown, runs.domains))
        _write_ratios(self.folder / "proposal.csv", runs.domains, found.mixture[None], "proposal")
        print_proposal(self.name, found, runs, shown, args.level)
        document = vars(found) | {
            "mixture": dict(zip(runs.domains, found.mixture, strict=True)),
            "best_run": runs.ids[found.best_run],
            "nearest_run": runs.ids[found.nearest_run],
        }
        for key in ("losses", "low", "high"):
            document[key] = dict(zip(runs.targets, getattr(found, key), strict=True))
        return document

    def _plan(self) -> dict:
        from llmmix.laws.design import next_mixtures

        options = {name: self.wishes[name] for name in ("lower", "upper", "prior")}
        plan = next_mixtures(
            self.law, self.args.next, objective=self.objective, seed=self.args.seed, **options
        )
        _write_ratios(self.folder / "next.csv", self.runs.domains, plan.mixtures, "next")
        print_plan(plan, self.runs.domains)
        mixtures = [dict(zip(self.runs.domains, p, strict=True)) for p in plan.mixtures]
        return {**vars(plan), "mixtures": mixtures}

    def _budget(self) -> dict:
        from llmmix.laws.figures import draw_budget
        from llmmix.laws.judge import learning_curve, runs_needed

        curves = {}
        for law in dict.fromkeys([self.name, "effective", "linear"]):
            options = {"objective": self.objective, "seed": self.args.seed}
            curves[law] = learning_curve(_laws([law])[law], self.mixtures, self.losses, **options)
        (self.folder / "budget.png").write_bytes(draw_budget(curves))
        print_curves(curves)
        needed = runs_needed(curves[self.name])
        print(f"{self.name}: {needed} runs come within 10% of the error of all.")
        return {"curves": curves, "runs_needed": needed}

    def _transfer(self, number: int, large, laws: dict) -> dict:
        """Every law on the runs of other models; a figure and the calibration of the best one."""
        from llmmix.laws.figures import draw_transfer
        from llmmix.laws.accuracy import weighted
        from llmmix.laws.transfer import TransferCalibrator, judge_transfer

        mixtures, losses = _tables(large)
        mixtures = mixtures[[str(domain) for domain in self.runs.domains]]
        name = self.args.transfer[2 * number - 1]
        options = {"objective": self.objective, "seed": self.args.seed}
        found = {
            law: judge_transfer(fitted, mixtures, losses, **options) for law, fitted in laws.items()
        }
        mine = found[self.name]
        for note in dict.fromkeys([*large.notes, *mine.notes]):
            print(f"Note: {note}")
        print_transfers(name, found)
        print_transfer(self.name, mine)
        columns = [self.law.targets_.index(target) for target in mine.targets]
        weights = self.law.target_weights(self.objective)[columns]
        x, y = self.law.predict(mixtures)[:, columns], losses[mine.targets].to_numpy()
        fitted = TransferCalibrator().fit(x, y)
        sides = [weighted(part, weights / weights.sum()) for part in (fitted.predict(x), y)]
        title = f"{Path(name).stem}: rank correlation {mine.objective.spearman:.3f}"
        (self.folder / f"transfer_{number}.png").write_bytes(draw_transfer(*sides, title))
        calibration = {"intercept": fitted.intercept_, "slope": fitted.slope_}
        return {"metrics": name, "laws": found, "calibration": calibration}


def _assess(folder: str):
    from llmmix.laws.fidelity import assess

    found = assess(folder)
    print_fidelity(found, folder)
    return found


def _laws(names: list[str]) -> dict:
    from llmmix import laws

    known = [
        laws.LinearLaw,
        laws.LogLinearLaw,
        laws.ExponentialLaw,
        laws.GradientBoostedLaw,
        laws.EffectiveDataLaw,
    ]
    made = {name: law() for name, law in zip(LAWS, known, strict=True) if name in names}
    if "boosted" in made:
        made["boosted"].set_params(n_jobs=-1)
    return {name: made[name] for name in names}


def _drawn(runs, count: int | None, seed: int):
    """All runs, or so many of them."""
    if count is None or count >= len(runs.ids):
        return runs
    rows = np.sort(np.random.default_rng(seed).permutation(len(runs.ids))[:count])
    notes = [*runs.notes, f"`max_runs`: {count} of {len(runs.ids)} runs are used."]
    ids, mixtures, losses = [runs.ids[i] for i in rows], runs.mixtures[rows], runs.losses[rows]
    return replace(runs, ids=ids, mixtures=mixtures, losses=losses, notes=notes)


def _tables(runs):
    import pandas as pd

    columns = ([str(name) for name in names] for names in (runs.domains, runs.targets))
    values = zip((runs.mixtures, runs.losses), columns, strict=True)
    return tuple(pd.DataFrame(table, columns=names) for table, names in values)


def _objective(given: list[str], targets: list[str]):
    """None, a target's name, or weights by name, as `Law.propose` takes them."""
    from llmmix.laws.tables import find_target

    if given == ["mean"]:
        return None
    if len(given) == 1 and ("=" not in given[0] or given[0] in targets):
        return str(targets[find_target(given[0], targets)])
    pairs = _pairs(given, "objective")
    return {str(targets[find_target(name, targets)]): weight for name, weight in pairs.items()}


def _pairs(given: list[str], argument: str) -> dict[str, float]:
    pairs = {}
    for pair in given:
        name, equals, number = pair.rpartition("=")
        try:
            pairs[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"`{argument}` takes NAME=NUMBER ..., got {pair!r}.")
    if len(pairs) < len(given):
        raise ValueError(f"`{argument}` has a name twice: {' '.join(given)}.")
    return pairs


def _shares(given: list[str] | None, argument: str, domains: list[str]):
    if given is None:
        return None
    pairs = _pairs(given, argument)
    unknown = [name for name in pairs if name not in domains]
    if unknown:
        raise ValueError(f"`{argument}`: no domain {', '.join(unknown)}; there are {domains}.")
    if argument != "prior":
        return pairs
    return {str(name): pairs.get(name, 0.0) for name in domains}


def _large(ratios: str, metrics: str, runs):
    """Runs of other models, of the domains of `runs`."""
    from llmmix.laws.tables import read_runs

    large = read_runs(ratios, metrics)
    ours, theirs = set(runs.domains), set(large.domains)
    if ours != theirs:
        raise ValueError(
            f"`transfer`: {ratios} must have the domains of `ratios`; it lacks "
            f"{sorted(ours - theirs)} and adds {sorted(theirs - ours)}."
        )
    if len(large.ids) < 3:
        raise ValueError(f"`transfer`: 3 runs can be ranked, {ratios} has {len(large.ids)}.")
    return large


def _check(args: MixtureLawsArguments) -> None:
    if bool(args.ratios) != bool(args.metrics):
        raise ValueError("`ratios` and `metrics` go together: name both tables.")
    if not args.ratios and not args.run:
        raise ValueError("Name the tables `ratios` and `metrics`, or the folder of a `run`.")
    unknown = [name for name in [*args.laws, *filter(None, [args.law])] if name not in LAWS]
    if unknown or not args.laws:
        raise ValueError(f"`laws`: no law {', '.join(unknown)}; there are {', '.join(LAWS)}.")
    if args.law and args.law not in args.laws:
        raise ValueError(f"`law` {args.law!r} is not among the `laws`: {', '.join(args.laws)}.")
    if args.transfer and len(args.transfer) % 2:
        raise ValueError(f"`transfer` takes pairs of tables, RATIOS METRICS, got {args.transfer}.")
    if not 0.5 < args.level < 1:
        raise ValueError(f"`level` must lie between 0.5 and 1, got {args.level}.")
    if args.max_runs is not None and args.max_runs < 3:
        raise ValueError(f"`max_runs` must be 3 or more, got {args.max_runs}.")
    if args.next < 0:
        raise ValueError(f"`next` must be 0 or more, got {args.next}.")


def _best(judged: dict) -> str:
    """Name of the law to propose: the best, or the default where nothing speaks against it."""
    from llmmix.laws.judge import best_of, paired_difference

    best = best_of(judged)
    others = [n for n, j in judged.items() if n not in (best, "mean") and not isinstance(j, str)]
    equal = [n for n in others if paired_difference(judged[best], judged[n]).high >= 0]
    told = f"; the runs do not tell it from {', '.join(equal)}" if equal else ""
    print(f"Best on held-out runs: {best}{told}.")
    if "effective" not in equal:
        return best
    print("effective proposes: it is the default where the runs do not speak against it.")
    return "effective"


def _summary(found) -> dict | str:
    """A judgement without its tables of runs."""
    if isinstance(found, str):
        return found
    long = ("observed", "predictions", "stds", "standardized", "mixture")
    return {key: value for key, value in vars(found).items() if key not in long}


def _write_ratios(path: Path, domains: list[str], mixtures, name: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run_id", "name", *domains])
        for i, shares in enumerate(mixtures):
            writer.writerow([f"{name}-{i:04d}", f"{name}-{i:04d}", *(f"{p:.6f}" for p in shares)])


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((MixtureLawsArguments,), __file__))
