r"""pass@N: the chance that at least one of N sampled answers is right, estimated without bias.

    pass@N = 1 - C(n - c, N) / C(n, N)      n samples of a problem, c of them right

    llmmix eval pass_at_n --model_name_or_path builtin:tiny --dataset_name builtin:math \
        --num_samples 64 --n 1 16 64

Rows need a prompt (text or messages) and a reference answer. Samples, judges, prints a table with
95% intervals over the problems, and compares several models problem by problem. In `--output_dir`:
NAME/samples.jsonl (every completion and verdict, written as they come; a killed run goes on from
it), NAME/pass_at_n.json, summary.json, report.html and figures/.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from llmmix.grading.estimators import pass_at_n
from llmmix.grading.evaluate import compare, evaluate, judge_again, summarize
from llmmix.grading.sample_log import SampleLog
from llmmix.grading.verify import Verifier
from llmmix.models import Checkpoint, Loader, evaluation_state, named_checkpoints

__all__ = ["PassAtNArguments", "evaluate", "main", "pass_at_n", "reference_loss"]


@dataclass
class PassAtNArguments:
    """What `llmmix eval pass_at_n` takes."""

    model_name_or_path: list[str] = field(
        metadata={"help": "One or several: hub id, folder, .gguf file or builtin:tiny."}
    )
    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "PEFT folders, each a run on the one model; 'none' for the model alone."},
    )
    dataset_name: str = field(
        default="builtin:math", metadata={"help": "Rows with a prompt and a reference answer."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Hub configuration, or levels of builtin:math."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    prompt_column: str = field(default="prompt", metadata={"help": "Text or messages."})
    answer_column: str = field(default="answer", metadata={"help": "The reference answer."})
    prompt_template: str = field(
        default="{prompt}", metadata={"help": "What to make of a prompt of text."}
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "Take a prompt of text for a user's message."}
    )
    max_problems: int | None = field(default=None, metadata={"help": "Use the first so many rows."})
    num_samples: int = field(default=64, metadata={"help": "Samples a problem."})
    n: list[int] = field(default_factory=lambda: [1, 4, 16, 64], metadata={"help": "N to report."})
    maj: bool = field(default=False, metadata={"help": "Report maj@N, the majority vote, too."})
    temperature: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Divisor of the logits; several give coverage against temperature."},
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus mass."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens a completion."})
    token_budget: int = field(
        default=16384, metadata={"help": "Tokens whose keys and values are held at once."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    verifier: str = field(
        default="math",
        metadata={"help": "math, exact, normalized, choice, or your module:function."},
    )
    verifier_timeout: float = field(default=10.0, metadata={"help": "Seconds an answer may take."})
    verifier_workers: int = field(default=1, metadata={"help": "Processes that judge."})
    backend: str = field(default="transformers", metadata={"help": "transformers or vllm."})
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights; auto: the checkpoint's, fp32 on a CPU."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the checkpoint."})
    output_dir: str = field(default="runs/pass_at_n", metadata={"help": "Where the results go."})


def main(args: PassAtNArguments) -> dict[str, dict]:
    """Evaluate each model; print the tables and write what the module's docstring lists."""
    from transformers.utils import logging

    from llmmix.report import write_report

    runs = _runs(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.backend == "vllm":
        raise ValueError("`backend` 'vllm' uses all GPUs from one process: no `--num_processes`.")
    state = evaluation_state()
    logging.disable_progress_bar()
    rows = _load_rows(args)
    results = {}
    with Verifier(
        args.verifier, timeout=args.verifier_timeout, workers=args.verifier_workers
    ) as verifier:
        for run in runs:
            result = _evaluate_one(run, rows, verifier, args, state)
            if state.is_main_process:
                folder = Path(args.output_dir) / run.name
                (folder / "pass_at_n.json").write_text(json.dumps(result, indent=1))
                results[run.name] = result
    state.destroy_process_group()
    if not state.is_main_process:
        return {}
    differences = compare(results)
    summary = {"runs": results, "differences": differences}
    Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=1))
    _print_tables(results, differences)
    temperatures = ", ".join(f"{t:g}" for t in args.temperature)
    note = (
        f"{len(rows)} problems of {args.dataset_name}, {args.num_samples} samples each at "
        f"temperature {temperatures}, seed {args.seed}, judged by {verifier.name}."
    )
    print(f"Report: {write_report(args.output_dir, note=note, runs=results)}")
    return results


@dataclass(frozen=True)
class _Run:
    name: str
    checkpoint: Checkpoint
    temperature: float


def _runs(args: PassAtNArguments) -> list[_Run]:
    """One a model or adapter and temperature, each with a folder of its own."""
    if args.backend not in ("transformers", "vllm"):
        raise ValueError(f"`backend` must be 'transformers' or 'vllm', got {args.backend!r}.")
    if len(set(args.temperature)) < len(args.temperature):
        raise ValueError(f"`temperature` names one twice: {args.temperature}.")
    several = len(args.temperature) > 1
    return [
        _Run(f"{given.name}-T{t:g}" if several else given.name, given, t)
        for given in named_checkpoints(args.model_name_or_path, args.adapter)
        for t in args.temperature
    ]


def _load_rows(args: PassAtNArguments):
    from llmmix.data import load_splits

    splits = load_splits(args.dataset_name, args.dataset_config)
    if args.dataset_split not in splits:
        raise ValueError(f"`dataset_split`: no {args.dataset_split!r} among {list(splits)}.")
    rows = splits[args.dataset_split]
    for argument in ("prompt", "answer"):
        column = getattr(args, f"{argument}_column")
        if column not in rows.column_names:
            raise ValueError(f"`{argument}_column`: no {column!r} among {rows.column_names}.")
        if column != argument:
            rows = rows.remove_columns({argument} & set(rows.column_names))
            rows = rows.rename_column(column, argument)
    rows = rows if args.max_problems is None else rows.take(args.max_problems)
    if "{prompt}" not in args.prompt_template:
        raise ValueError(f"`prompt_template` lacks {{prompt}}: {args.prompt_template!r}.")
    if not len(rows) or not isinstance(rows[0]["prompt"], str):
        return rows
    texts = [args.prompt_template.replace("{prompt}", prompt) for prompt in rows["prompt"]]
    if args.apply_chat_template:
        texts = [[{"role": "user", "content": text}] for text in texts]
    return rows.remove_columns("prompt").add_column("prompt", texts)


def _evaluate_one(run: _Run, rows, verifier: Verifier, args: PassAtNArguments, state) -> dict:
    loader = Loader(state.device, args.dtype, args.trust_remote_code)
    settings = {
        **loader.fingerprint(run.checkpoint),
        "temperature": run.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "backend": args.backend,
    }
    log = SampleLog(Path(args.output_dir) / run.name, settings)
    if state.is_main_process and state.num_processes > 1:
        judge_again(log, rows, verifier)
    state.wait_for_everyone()
    tokenizer = loader.tokenizer(run.checkpoint)
    model = _vllm(run, args) if args.backend == "vllm" else loader.model(run.checkpoint)
    options = {"max_new_tokens": args.max_new_tokens, "token_budget": args.token_budget}
    options |= {"temperature": run.temperature, "top_p": args.top_p, "seed": args.seed}
    chosen = {"num_samples": args.num_samples, "n": args.n, "maj": args.maj, "log": log}
    result = evaluate(
        model,
        tokenizer,
        rows,
        verifier=verifier,
        process=(state.process_index, state.num_processes),
        description=f"Sampling {run.name}",
        **chosen,
        **options,
    )
    state.wait_for_everyone()
    if state.num_processes > 1 and state.is_main_process:
        whole = summarize(
            list(log.read()),
            len(rows),
            args.num_samples,
            sorted(set(args.n)),
            result["left_out"],
            maj=args.maj,
        )
        result |= whole
    names = {"eval": "pass_at_n", "model": run.checkpoint.model}
    names["adapter"] = run.checkpoint.adapter
    result = names | {"dataset": args.dataset_name, "verifier": verifier.name, **options} | result
    if "completion" in rows.column_names and args.backend == "transformers":
        if state.is_main_process:
            kept = [row for row in range(len(rows)) if row not in set(result["left_out"])]
            result["loss"] = reference_loss(model, tokenizer, rows.select(kept))
    del model
    loader.let_go()  # before the next model is loaded
    return result


def _vllm(run: _Run, args: PassAtNArguments):
    from llmmix.models import resolve_checkpoint
    from llmmix.sampling.vllm_backend import load_vllm

    checkpoint = resolve_checkpoint(run.checkpoint.model)
    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    return load_vllm(checkpoint, run.checkpoint.adapter, **options)


def reference_loss(model, tokenizer, dataset, batch_size: int = 32) -> float | None:
    """Mean NLL in nats a token of the reference completions (`completion`), given their prompts.

    None where they have no token.
    """
    import torch
    from trl.data_utils import common_prefix_length

    from llmmix.head import attach_head
    from llmmix.models import encode

    attach_head(model)
    nll = tokens = 0
    for start in range(0, len(dataset), batch_size):
        examples = []
        for row in dataset.select(range(start, min(start + batch_size, len(dataset)))):
            completion = row["completion"]
            if isinstance(completion, str) and not isinstance(row["prompt"], str):
                completion = [{"role": "assistant", "content": completion}]
            full = encode(tokenizer, row["prompt"] + completion, generation=False)
            prompt_length = common_prefix_length(encode(tokenizer, row["prompt"]), full)
            examples.append((full, [-100] * prompt_length + full[prompt_length:]))
        width = max(len(ids) for ids, _ in examples)
        batch = {
            "input_ids": [ids + [0] * (width - len(ids)) for ids, _ in examples],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples],
            "labels": [labels + [-100] * (width - len(labels)) for _, labels in examples],
        }
        batch = {key: torch.tensor(value, device=model.device) for key, value in batch.items()}
        with torch.inference_mode():
            output = model(**batch, fused_lm_head=True)
        nll -= output.log_probs.double().sum().item()
        tokens += int(output.label_mask.sum())
    return nll / tokens if tokens else None


def _print_tables(results: dict[str, dict], differences: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.markup import escape

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
            cells = (by_n.get(n) for n in first["pass_at_n"])
            shown = ("" if c is None else _cell(c["difference"], c["interval"], "+") for c in cells)
            table.add_row(escape(run), *shown)
        console.print(table)
    for remark in _remarks(results):
        console.print(remark, markup=False, highlight=False)


def _table(title: str, columns: list[str]):
    from rich.markup import escape
    from rich.table import Table

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


def _remarks(results: dict[str, dict]) -> list[str]:
    """What the estimates rest on, where it is not simply every sample."""
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


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((PassAtNArguments,), __file__))
