"""The metrics of several models as a table in the terminal, with remarks below it."""

from typing import Any

from llmmix import terminal
from llmmix.terminal import number

SHOWN_AFTER_A_PROBE = ("forget_rouge", "forget_probability", "forget_extraction_strength")
ARROWS = {"lower": "↓", "higher": "↑", "retained": "→"}
ABSOLUTE = {"forget_quality": "1", "privacy_leakage": "0"}  # where no retain model is given
IN_DOCUMENTS_ALONE = ("prob_mean", "distinct")
OF_THE_FORGET_SET = ("repetition", "empty", "perplexity")
WITH_INTERVALS = ("mia_", "leak@")  # shown; the documents have all


def print_table(results: dict[str, dict[str, Any]], retained: dict[str, Any] | None = None) -> None:
    """One row a metric, one column a model, and the model trained without the forget set.

    Args:
        results: The document of each model, with `rows` (how many, by set) and perhaps `probes`.
        retained: The document of the retain model.
    """
    rows = next(iter(results.values()))["rows"]
    baseline = "the baseline" if retained is None else "the retain model"
    head = ["metric", "", *results, "baseline" if retained is None else "retain model"]
    names = list(dict.fromkeys(name for r in results.values() for name in r["metrics"]))
    table = []
    for name in filter(_is_shown, names):
        entries = [result["metrics"].get(name) for result in results.values()]
        if any(entry and entry["value"] is not None for entry in entries):
            arrow = ARROWS[next(entry for entry in entries if entry)["direction"]]
            cells = [_cell(name, entry) for entry in entries]
            table.append([name.replace("_", " "), arrow, *cells, _baseline(name, retained)])
    for probe in next(iter(results.values())).get("probes", {}):
        for name in SHOWN_AFTER_A_PROBE:
            cells = [_change(result["probes"][probe], name) for result in results.values()]
            table.append([f"{name.replace('_', ' ')}, {probe}", ARROWS["lower"], *cells, ""])
    terminal.print_table(
        f"Unlearning: rows {', '.join(f'{count} {role}' for role, count in rows.items())}",
        head,
        table,
        pinned=(0, 1, -1),
        notes=[
            f"↓ lower is better, ↑ higher is better, → nearest to {baseline} is best. Intervals "
            "and further metrics are in unlearning.json.",
            *_remarks(results),
        ],
    )


def _is_shown(name: str) -> bool:
    """Whether the table shows the metric; of fluency, it shows the forget set's alone."""
    return not name.endswith(IN_DOCUMENTS_ALONE) and (
        name.startswith("forget") or not name.endswith(OF_THE_FORGET_SET)
    )


def _cell(name: str, entry: dict[str, Any] | None) -> str:
    if not entry or entry["value"] is None:
        return "none"
    if name == "forget_quality":
        return f"p {_short(entry['value'])}, D {entry['statistic']:.2f}"
    bounds = entry.get("interval") if name.startswith(WITH_INTERVALS) else None
    said = "" if bounds is None else "\n" + " to ".join(number(bound, 2) for bound in bounds)
    return _short(entry["value"]) + said


def _short(value: float) -> str:
    return number(value) if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _baseline(name: str, retained: dict | None) -> str:
    if retained is not None and name not in ABSOLUTE:
        entry = retained["metrics"].get(name)
        return "" if not entry or entry["value"] is None else _short(entry["value"])
    return ABSOLUTE.get(name) or ("0.500" if name.startswith("mia_") else "")


def _change(probe: dict, name: str) -> str:
    before, after = probe["before"].get(name), probe["after"].get(name)
    said = ("none" if value is None else _short(value) for value in (before, after))
    return " to ".join(said)


def _remarks(results: dict[str, dict]) -> list[str]:
    """Why metrics are missing, which part of a utility has collapsed, and what was left out."""
    missing: dict[str, list[str]] = {}
    remarks = []
    for run, result in results.items():
        for name, entry in result["metrics"].items():
            if entry["value"] is None:
                names = missing.setdefault(entry.get("reason", "unknown"), [])
                names += [name.replace("_", " ")] if name.replace("_", " ") not in names else []
            elif entry.get("collapsed"):
                parts = ", ".join(part.replace("_", " ") for part in entry["collapsed"])
                remarks.append(f"{run}: {name.replace('_', ' ')} has collapsed in {parts}.")
        for role, records in result["items"].items():
            dropped = sum(record["nll"] is None for record in records)
            if dropped:
                remarks.append(
                    f"{run}: {dropped} of {len(records)} rows of {role} are not scored: they "
                    "exceed the context, or have no token."
                )
            if any(r["generation"] is not None and r["rougeL_recall"] is None for r in records):
                remarks.append(
                    f"{run}: answers of {role} have no word in a-z and 0-9: --rouge_words unicode."
                )
    return remarks + [f"{', '.join(names)}: {reason}" for reason, names in missing.items()]
