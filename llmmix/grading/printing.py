"""Tables in the terminal: pass@N of each run with its interval, and what the numbers rest on."""

from typing import Any

from llmmix.terminal import number, print_lines, print_table


def print_tables(
    results: dict[str, dict[str, Any]], differences: dict[str, dict[str, Any]]
) -> None:
    """Print pass@N of each run, maj@N and differences where there are any, and remarks.

    Args:
        results: Document of each run, as `llmmix eval pass_at_n` writes it.
        differences: What `llmmix.grading.summary.compare` returns.
    """
    first = next(iter(results.values()))
    head = ["model", *(f"pass@{n}" for n in first["pass_at_n"])]
    rows = [
        [run, *(_cell(v, result["interval"][n]) for n, v in result["pass_at_n"].items())]
        for run, result in results.items()
    ]
    losses = [result.get("loss") for result in results.values()]
    if any(loss is not None for loss in losses):
        head.insert(1, "loss")
        for row, loss in zip(rows, losses, strict=True):
            row.insert(1, number(loss, missing=""))
    title = f"{first['rows']} problems, {first['num_samples']} samples each, 95% intervals"
    print_table(title, head, rows)
    if "maj_at_n" in first:
        head = ["model", *(f"maj@{n}" for n in first["maj_at_n"])]
        rows = [
            [run, *(_cell(v, result["maj_interval"][n]) for n, v in result["maj_at_n"].items())]
            for run, result in results.items()
        ]
        print_table("Majority votes", head, rows)
    if differences:
        head = ["model", *(f"pass@{n}" for n in first["pass_at_n"])]
        rows = [
            [run, *(_difference(by_n.get(n)) for n in first["pass_at_n"])]
            for run, by_n in differences.items()
        ]
        title = f"pass@N minus that of {next(iter(results))}, problem by problem"
        print_table(title, head, rows)
    print_lines(*_remarks(results))


def _difference(found: dict[str, Any] | None) -> str:
    return "" if found is None else _cell(found["difference"], found["interval"], "+")


def _cell(value: float | None, interval: list[float] | None, sign: str = "") -> str:
    if value is None or interval is None:
        return number(value, sign=sign)
    low, high = (number(bound, 2, sign) for bound in interval)
    return f"{number(value, sign=sign)}\n{low} to {high}"


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
