r"""pass@N: the chance that at least one of N sampled answers is right, estimated without bias.

    pass@N = 1 - C(n - c, N) / C(n, N)      n samples of a problem, c of them right

    llmmix eval pass_at_n --model_name_or_path builtin:tiny --dataset_name builtin:math \
        --num_samples 64 --n 1 16 64

Rows need a `prompt` (text or messages) and an `answer`; the completion's last \boxed{...} is
compared with it. Several models are evaluated side by side. Prints a table, and writes a JSON
document a model and `report.html` to `--output_dir`.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np


def pass_at_n(n_samples, n_correct, n):
    """Unbiased estimate of pass@N from the samples of each problem.

    Args:
        n_samples: Samples drawn, int or array.
        n_correct: How many of them were right, int or array.
        n: N, int or array.

    Returns:
        A float, or an array in the broadcast shape of the arguments.

    Raises:
        ValueError: N above the samples drawn (there is no unbiased estimate then), N below 1, or
            more right answers than samples.
    """
    n_samples, n_correct, n = np.broadcast_arrays(n_samples, n_correct, n)
    if (n > n_samples).any() or (n < 1).any():
        raise ValueError(
            f"`n` must lie between 1 and the {n_samples.min()} samples drawn, got {n.min()} to "
            f"{n.max()}; draw more samples."
        )
    if (n_correct > n_samples).any() or (n_correct < 0).any():
        raise ValueError(
            f"`n_correct` must lie between 0 and `n_samples`, got up to {n_correct.max()}."
        )
    estimates = np.array(
        [
            _estimate(int(a), int(c), int(k))
            for a, c, k in zip(n_samples.flat, n_correct.flat, n.flat, strict=True)
        ]
    ).reshape(n.shape)
    return float(estimates) if estimates.ndim == 0 else estimates


@lru_cache(maxsize=65536)
def _estimate(n_samples: int, n_correct: int, n: int) -> float:
    if n_samples - n_correct < n:
        return 1.0
    # C(n-c, N) / C(n, N) is symmetric in c and N: take the shorter product
    few, many = sorted((n_correct, n))
    i = np.arange(n_samples - few + 1, n_samples + 1)
    return float(-np.expm1(np.log1p(-many / i).sum()))


def evaluate(
    model,
    tokenizer,
    dataset,
    *,
    num_samples: int,
    n: Sequence[int],
    verify: Callable[[str, str], bool] | None = None,
    description: str = "Sampling",
    **sampling,
) -> dict:
    """Sample, judge and estimate.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        dataset: Rows with `prompt` and `answer`.
        num_samples: Samples a problem.
        n: The N to report.
        verify: (completion, answer) -> right or not; exact match of the boxed answer by default.
        description: Title of the progress bar.
        **sampling: Options of `llmmix.sampling.sample`.

    Returns:
        `pass_at_n` {N: mean over problems}, `standard_error` {N: over problems}, `n_correct` and
        `boxed` (samples with a boxed answer at all) of each problem, and the settings.

    Raises:
        ValueError: A row without a reference answer, or N above `num_samples`.
    """
    from rich.progress import track

    from llmmix.sampling import sample
    from llmmix.verify import boxed_answer, exact_match

    verify = verify or exact_match
    missing = [row for row, answer in enumerate(dataset["answer"]) if answer in (None, "")]
    if missing:
        raise ValueError(f"Row {missing[0]} has no `answer` ({len(missing)} such rows).")
    pass_at_n(num_samples, 0, list(n))  # refuse N before sampling
    draws = sample(model, tokenizer, dataset["prompt"], num_samples, **sampling)
    correct, boxed = [], []
    problems = zip(dataset["answer"], draws, strict=True)
    for answer, completions in track(problems, description=description, total=len(dataset)):
        correct.append(sum(verify(completion, answer) for completion in completions))
        boxed.append(sum(boxed_answer(completion) is not None for completion in completions))
    estimates = {k: pass_at_n(num_samples, correct, k) for k in n}
    return {
        "pass_at_n": {str(k): float(e.mean()) for k, e in estimates.items()},
        "standard_error": {
            str(k): float(e.std(ddof=1) / np.sqrt(len(e))) if len(e) > 1 else None
            for k, e in estimates.items()
        },
        "estimator": "unbiased",
        "num_samples": num_samples,
        "n_correct": correct,
        "boxed": boxed,
        "sampling": sampling,
    }


@dataclass
class PassAtNArguments:
    """What `llmmix eval pass_at_n` takes."""

    model_name_or_path: list[str] = field(
        metadata={"help": "One or several: hub id, folder, .gguf file or builtin:tiny."}
    )
    dataset_name: str = field(
        default="builtin:math", metadata={"help": "Rows with `prompt` and `answer`."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Hub configuration, or levels of builtin:math."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    max_problems: int | None = field(default=None, metadata={"help": "Use the first so many rows."})
    num_samples: int = field(default=64, metadata={"help": "Samples a problem."})
    n: list[int] = field(default_factory=lambda: [1, 4, 16, 64], metadata={"help": "N to report."})
    temperature: float = field(default=1.0, metadata={"help": "Divisor of the logits."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus mass."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens a completion."})
    max_rows: int = field(default=256, metadata={"help": "Completions decoded at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    output_dir: str = field(default="runs/pass_at_n", metadata={"help": "Where the results go."})


def main(args: PassAtNArguments) -> dict[str, dict]:
    """Evaluate each model; print one table, write NAME/pass_at_n.json and report.html."""
    from transformers.utils import logging

    from llmmix.report import write_report

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("pass_at_n runs on one process: leave `--num_processes` out.")
    logging.disable_progress_bar()
    rows = _load_rows(args)
    results = {}
    for name, run in zip(args.model_name_or_path, _run_names(args), strict=True):
        result = {"eval": "pass_at_n", "model": name, **_evaluate_one(name, run, rows, args)}
        out = Path(args.output_dir) / run / "pass_at_n.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1))
        results[run] = result
    _print_table(results, args.num_samples, len(rows))
    note = (
        f"{len(rows)} problems of {args.dataset_name}, {args.num_samples} samples each at "
        f"temperature {args.temperature:g}, seed {args.seed}."
    )
    print(f"Report: {write_report(args.output_dir, note=note)}")
    return results


def _run_names(args: PassAtNArguments) -> list[str]:
    """The last part of each model's name, or all of it where two would share a folder."""
    short = [Path(name).name for name in args.model_name_or_path]
    names = short if len(set(short)) == len(short) else args.model_name_or_path
    if len(set(names)) < len(names):
        raise ValueError(f"`model_name_or_path` names a model twice: {', '.join(names)}.")
    return [name.strip("./").replace("/", "-").replace(":", "-") for name in names]


def _load_rows(args: PassAtNArguments):
    from llmmix.data import load_splits

    splits = load_splits(args.dataset_name, args.dataset_config)
    if args.dataset_split not in splits:
        raise ValueError(f"`dataset_split`: no {args.dataset_split!r} among {list(splits)}.")
    rows = splits[args.dataset_split]
    if missing := {"prompt", "answer"} - set(rows.column_names):
        raise ValueError(f"`dataset_name` lacks {sorted(missing)}; it has {rows.column_names}.")
    return rows if args.max_problems is None else rows.take(args.max_problems)


def _evaluate_one(name: str, run: str, rows, args: PassAtNArguments) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmmix.data import resolve_checkpoint

    checkpoint = resolve_checkpoint(name)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    result = evaluate(
        model,
        tokenizer,
        rows,
        num_samples=args.num_samples,
        n=args.n,
        description=f"Sampling {run}",
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        max_rows=args.max_rows,
        seed=args.seed,
    )
    if "completion" in rows.column_names:
        result["loss"] = reference_loss(model, tokenizer, rows)
    return result


def reference_loss(model, tokenizer, dataset, batch_size: int = 32) -> float:
    """Mean NLL in nats a token of the reference completions (`completion`), given their prompts."""
    import torch
    from trl.data_utils import common_prefix_length

    from llmmix.head import attach_head
    from llmmix.sampling import encode

    attach_head(model)
    nll = tokens = 0
    for start in range(0, len(dataset), batch_size):
        examples = []
        for row in dataset.select(range(start, min(start + batch_size, len(dataset)))):
            full = encode(tokenizer, row["prompt"] + row["completion"], generation=False)
            prompt_length = common_prefix_length(encode(tokenizer, row["prompt"]), full)
            examples.append((full, [-100] * prompt_length + full[prompt_length:]))
        width = max(len(ids) for ids, _ in examples)
        batch = {
            "input_ids": [
                ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in examples
            ],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples],
            "labels": [labels + [-100] * (width - len(labels)) for _, labels in examples],
        }
        batch = {key: torch.tensor(value, device=model.device) for key, value in batch.items()}
        with torch.inference_mode():
            output = model(**batch, fused_lm_head=True)
        nll -= output.log_probs.double().sum().item()
        tokens += int(output.label_mask.sum())
    return nll / tokens


def _print_table(results: dict[str, dict], num_samples: int, problems: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{problems} problems, {num_samples} samples each (± standard error)")
    table.add_column("model")
    with_loss = any("loss" in result for result in results.values())
    if with_loss:
        table.add_column("loss", justify="right")
    for n in next(iter(results.values()))["pass_at_n"]:
        table.add_column(f"pass@{n}", justify="right")
    for run, result in results.items():
        cells = [f"{result['loss']:.3f}" if "loss" in result else ""] if with_loss else []
        for n, value in result["pass_at_n"].items():
            error = result["standard_error"][n]
            cells.append(f"{value:.3f}" + ("" if error is None else f" ±{error:.2f}"))
        table.add_row(run, *cells)
    Console().print(table)


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((PassAtNArguments,), __file__))
