r"""Fit mixture laws to finished runs, judge them on held-out runs, and propose mixtures.

    llmmix eval mixture_laws --ratios ratios.csv --metrics metrics.csv --objective code=2 docs=1
    llmmix eval mixture_laws --ratios ratios.csv --metrics metrics.csv --next 8 --budget \
        --transfer ratios_1b.csv metrics_1b.csv --available code=4e9 docs=9e9 \
        --tokens 1e10 --max_epochs 4
    llmmix eval mixture_laws --run runs/aioli

The tables have a line for each run and are joined by the run's id: those of `llmmix run
mixture_sweep`, of RegMix or of Olmix. Every law is refitted with a part of the mixtures held out
(`--holdout`) and judged on these; the best one, fitted to all runs, proposes a mixture. The results
are in `--output_dir`: mixture_laws.json, proposal.csv and next.csv (tables of mixtures, as
`--ratios`), and figures. `--run` shows how well a method's own law fits the run that it steered
(llmmix/laws/fidelity.py). The steps are in llmmix/laws/study.py.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmmix.files import claim, plain, write_whole

if TYPE_CHECKING:
    from llmmix.laws import Law
    from llmmix.laws.fidelity import Fidelity

LAWS = ["linear", "log_linear", "exponential", "boosted", "effective"]
DEFAULT = "effective"  # the law that proposes unless another is significantly better


@dataclass
class MixtureLawsArguments:
    """Arguments of `llmmix eval mixture_laws`."""

    ratios: str | None = field(
        default=None, metadata={"help": "Table of mixtures, a line for each run."}
    )
    metrics: str | None = field(
        default=None, metadata={"help": "Table of losses, a line for each run."}
    )
    objective: list[str] = field(
        default_factory=lambda: ["mean"],
        metadata={"help": "Loss to minimize: mean (over targets), a target, or TARGET=WEIGHT ..."},
    )
    laws: list[str] = field(
        default_factory=lambda: list(LAWS),
        metadata={"help": f"Laws to fit and judge, one or more of: {', '.join(LAWS)}."},
    )
    law: str | None = field(
        default=None,
        metadata={
            "help": "Law that proposes the mixture. Default: the best on held-out runs, or "
            "effective if it is not significantly worse."
        },
    )
    max_runs: int | None = field(
        default=None,
        metadata={"help": "Number of runs to use, drawn with --seed. Default: all."},
    )
    holdout: float = field(
        default=0.2, metadata={"help": "Fraction of the mixtures that is held out at a time."}
    )
    level: float = field(
        default=0.9, metadata={"help": "Level of the intervals, between 0.5 and 1."}
    )
    prior: list[str] | None = field(
        default=None,
        metadata={
            "help": "Mixture to stay close to, DOMAIN=SHARE ... Default: the mean of the runs."
        },
    )
    closeness: float = field(
        default=0.0,
        metadata={"help": "Nats of loss that a KL divergence of 1 from the prior costs."},
    )
    lower: list[str] | None = field(
        default=None, metadata={"help": "Smallest shares, DOMAIN=SHARE ..."}
    )
    upper: list[str] | None = field(
        default=None, metadata={"help": "Largest shares, DOMAIN=SHARE ..."}
    )
    available: list[str] | None = field(
        default=None, metadata={"help": "Number of tokens of each domain, DOMAIN=TOKENS ..."}
    )
    tokens: float | None = field(
        default=None, metadata={"help": "Number of tokens of the planned run."}
    )
    max_epochs: float | None = field(
        default=None,
        metadata={"help": "Largest number of passes of the planned run over a domain."},
    )
    search: str = field(
        default="auto",
        metadata={
            "help": "Search for the best mixture: gradient, sample (as RegMix does), or auto "
            "(gradient where the law has one)."
        },
    )
    transfer: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tables of other models' runs on which the laws are judged too, RATIOS "
            "METRICS ..."
        },
    )
    next: int = field(
        default=0, metadata={"help": "Number of mixtures to propose for the next runs."}
    )
    budget: bool = field(
        default=False, metadata={"help": "Also measure the error against the number of runs."}
    )
    run: str | None = field(
        default=None, metadata={"help": "Folder of a mixture run whose method is to be assessed."}
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the folds, of the drawn runs and of sampled searches."},
    )
    output_dir: str = field(
        default="runs/mixture_laws", metadata={"help": "Folder that the results are written to."}
    )


def main(args: MixtureLawsArguments) -> dict:
    """Judge, propose and assess as asked; print tables, write files, return the document."""
    _check(args)
    folder = claim(args.output_dir)
    document: dict = {"arguments": asdict(args)}
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"Note: {message}")
        if args.run:  # first: it takes a moment, and the study minutes
            document["fidelity"] = _assess(args.run)
        if args.ratios and args.metrics:
            document |= _study(args, args.ratios, args.metrics, folder)
    document = plain(document)
    write_whole(folder / "mixture_laws.json", json.dumps(document, indent=1))
    print(f"Results: {folder}")
    return document


def _study(args: MixtureLawsArguments, ratios: str, metrics: str, folder: Path) -> dict:
    """Judge the laws on the tables, and propose mixtures with the best one."""
    from llmmix.laws.printing import print_runs
    from llmmix.laws.study import Study, choose_law, summaries
    from llmmix.laws.tables import read_runs, read_runs_like

    runs = read_runs(ratios, metrics).sample(args.max_runs, args.seed)
    print_runs(runs)
    study = Study(runs, _objective(args.objective, runs.targets), folder, args.seed)
    given = args.transfer or []
    pairs = list(zip(given[::2], given[1::2], strict=True))
    large = [read_runs_like(runs, *pair) for pair in pairs]
    shares: dict[str, Any] = {
        name: _shares(getattr(args, name), name, runs.domains)
        for name in ("lower", "upper", "available", "prior")
    }
    document: dict = {"domains": runs.domains, "targets": runs.targets}
    judged = study.judge(_laws(args.laws), args.holdout, args.level)
    document["judged"] = summaries(judged)
    document["law"] = name = args.law or choose_law(judged, DEFAULT)
    study.adopt(name, _laws([name])[name], judged[name])
    options: dict[str, Any] = {"tokens": args.tokens, "max_epochs": args.max_epochs}
    options |= {"closeness": args.closeness, "method": args.search}
    document["proposal"] = study.propose(args.level, **options, **shares)
    if args.next:
        limits = {name: shares[name] for name in ("lower", "upper", "prior")}
        document["next"] = study.plan(args.next, **limits)
    if args.budget:
        document["budget"] = study.budget(_laws([*dict.fromkeys([name, DEFAULT, "linear"])]))
    if large:
        others = [n for n in args.laws if n != name and not isinstance(judged[n], str)]
        fitted = {n: law.fit(study.mixtures, study.losses) for n, law in _laws(others).items()}
        document["transfer"] = [
            study.transfer(metrics, one, fitted, number)
            for number, (one, (_, metrics)) in enumerate(zip(large, pairs, strict=True), 1)
        ]
    return document


def _assess(folder: str) -> "Fidelity":
    from llmmix.laws.fidelity import assess
    from llmmix.laws.printing import print_fidelity

    found = assess(folder)
    print_fidelity(found, folder)
    return found


def _laws(names: list[str]) -> dict[str, "Law"]:
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


def _objective(given: list[str], targets: Sequence[str]) -> str | dict[str, float] | None:
    """The objective as `Law.propose` takes it: None, a target's name, or weights by name."""
    from llmmix.laws.names import find_target

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


def _shares(
    given: list[str] | None, argument: str, domains: Sequence[str]
) -> dict[str, float] | None:
    if given is None:
        return None
    pairs = _pairs(given, argument)
    unknown = [name for name in pairs if name not in domains]
    if unknown:
        raise ValueError(f"`{argument}`: no domain {', '.join(unknown)}; there are {domains}.")
    if argument != "prior":
        return pairs
    return {str(name): pairs.get(name, 0.0) for name in domains}


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
    if args.search not in ("auto", "gradient", "sample"):
        raise ValueError(f"`search` must be auto, gradient or sample, got {args.search!r}.")
    if args.next < 0:
        raise ValueError(f"`next` must be 0 or more, got {args.next}.")


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((MixtureLawsArguments,), __file__))
