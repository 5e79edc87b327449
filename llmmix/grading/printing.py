"""Tables in the terminal: pass@N of each run with its interval, and what the numbers rest on."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_tables(
    results: dict[str, dict[str, Any]], differences: dict[str, dict[str, Any]]
) -> None:
    """Print pass@N of each run, maj@N and differences where there are any, and remarks.

    Args:
        results: Document of each run, as `llmmix eval pass_at_n` writes it.
        differences: What `llmmix.grading.summary.compare` returns.
    """
    console, first = Console(), next(iter(results.values()))
    title = f"{first['rows']} problems, {first['num_samples']} samples each, 95% intervals"
    columns = [f"pass@{n}" for n in first["pass_at_n"]]
    with_loss = any("loss" in result for result in results.values())
    table = _table(title, ["loss", *columns] if with_loss else columns)
    for run, result in results.items():
        loss = result.get("loss")
        cells = ["" if loss is None else f"{loss:.3f}"] if with_loss else []
        estimates = result["pass_at_n"].items()
        table.add_row(
            escape(run), *cells, *(_cell(value, result["interval"][n]) for n, value in estimates)
        )
    console.print(table)
    if "maj_at_n" in first:
        table = _table("Majority votes", [f"maj@{n}" for n in first["maj_at_n"]])
        for run, result in results.items():
            votes = result["maj_at_n"].items()
            table.add_row(escape(run), *(_cell(v, result["maj_interval"][n]) for n, v in votes))
        console.print(table)
    if differences:
        title = f"pass@N minus that of {next(iter(results))}, problem by problem"
        table = _table(title, columns)
        for run, by_n in differences.items():
            found = (by_n.get(n) for n in first["pass_at_n"])
            shown = ("" if d is None else _cell(d["difference"], d["interval"], "+") for d in found)
            table.add_row(escape(run), *shown)
        console.print(table)
    for remark in _remarks(results):
        console.print(remark, markup=False, highlight=False)


def _table(title: str, columns: list[str]) -> Table:
    # Escaped, since a name may hold what rich takes for markup
    table = Table(title=escape(title))
    table.add_column("model", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(value: float | None, interval: list[float] | None, sign: str = "") -> str:
    if value is None:
        return "none"
    bounds = "" if interval is None else f"\n{interval[0]:{sign}.2f} to {interval[1]:{sign}.2f}"
    return f"{value:{sign}.3f}{bounds}"


def _remarks(results: dict[str, dict[str, Any]]) -> list[str]:
    """Samples that the estimates leave out, or that were cut, run by run."""
    remarks = []
    for run, result in results.items():
        verdicts, total = result["verdicts"], sum(result["verdicts"].values())
        parts = {
            "unparsable": verdicts["unparsable"],
            "cut at max_new_tokens": result["cut"],
            "failed verification (not counted as wrong)": verdicts["failed"],
        }
        said = [f"{count} {what}" for what, count in parts.items() if count]
        if said:
            remarks.append(f"{run}: of {total} samples {', '.join(said)}.")
        for error, count in result["errors"].items():
            remarks.append(f"  {count} x {error}")
        if left_out := result["left_out"]:
            remarks.append(
                f"{run}: {len(left_out)} problems left out, whose prompts leave no room for "
                f"max_new_tokens={result['max_new_tokens']} in the context (first: row "
                f"{left_out[0]})."
            )
        short = {n: count for n, count in result["problems"].items() if count < result["rows"]}
        if any(count < result["rows"] - len(left_out) for count in short.values()):
            counts = ", ".join(f"pass@{n} on {count}" for n, count in short.items())
            remarks.append(f"{run}: too few judged samples for some problems: {counts} problems.")
    return remarks
