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
from typing import TYPE_CHECKING, Any

from llmmix.files import claim, write_whole
from llmmix.grading.estimators import pass_at_n
from llmmix.grading.evaluation import evaluate, judge_again
from llmmix.grading.ground_truth import reference_loss
from llmmix.grading.printing import print_tables
from llmmix.grading.problems import encode_prompts, read_problems
from llmmix.grading.sample_log import SampleLog
from llmmix.grading.summary import compare, summarize
from llmmix.grading.verify import Verifier
from llmmix.models import Checkpoint, Loader, check_checkpoints, named_checkpoints
from llmmix.processes import evaluation_state
from llmmix.sampling.requests import SamplingOptions

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["PassAtNArguments", "evaluate", "main", "pass_at_n", "reference_loss"]


@dataclass
class PassAtNArguments:
    """What `llmmix eval pass_at_n` takes."""

    model_name_or_path: list[str] = field(
        metadata={"help": "Models to evaluate: hub ids, folders, .gguf files or builtin:tiny."}
    )
    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "PEFT folders, each on the one model; 'none' evaluates the model alone."},
    )
    dataset_name: str = field(
        default="builtin:math",
        metadata={"help": "Dataset whose rows hold a prompt and a reference answer."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of a hub dataset, or levels of builtin:math."},
    )
    dataset_split: str = field(
        default="test",
        metadata={"help": "Split of the dataset to evaluate on. Default: test, or the only one."},
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column with the prompt, as text or messages."}
    )
    answer_column: str = field(
        default="answer", metadata={"help": "Column with the reference answer."}
    )
    prompt_template: str = field(
        default="{prompt}",
        metadata={"help": "Template for a prompt of text, which takes the place of {prompt}."},
    )
    apply_chat_template: bool = field(
        default=False,
        metadata={"help": "Give a prompt of text to the model as a user's message."},
    )
    max_problems: int | None = field(
        default=None,
        metadata={"help": "Number of rows to use, from the first. Default: all of them."},
    )
    num_samples: int = field(
        default=64, metadata={"help": "Number of samples drawn for each problem."}
    )
    n: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64],
        metadata={"help": "Values of N for which pass@N is reported; none above num_samples."},
    )
    maj: bool = field(
        default=False, metadata={"help": "Report maj@N, the majority vote, beside pass@N."}
    )
    temperature: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Sampling temperatures, each a run of its own. Default 1.0: the model's own "
            "distribution. 0: the most probable token."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "Nucleus mass to sample from. Default 1.0: all of the distribution."},
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Number of tokens after which a completion is cut."}
    )
    token_budget: int = field(
        default=16384,
        metadata={"help": "Number of tokens whose keys and values are held in memory at once."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    verifier: str = field(
        default="math",
        metadata={
            "help": "What judges a completion: math, exact, normalized, choice, or a function of "
            "yours as module:function."
        },
    )
    verifier_timeout: float = field(
        default=10.0, metadata={"help": "Seconds that judging one completion may take."}
    )
    verifier_workers: int = field(
        default=1, metadata={"help": "Number of processes that judge completions."}
    )
    backend: str = field(
        default="transformers", metadata={"help": "What samples: transformers or vllm."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights. Default auto: the checkpoint's, fp32 on a CPU."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoint."}
    )
    output_dir: str = field(
        default="runs/pass_at_n", metadata={"help": "Folder for samples, results and report."}
    )


def main(args: PassAtNArguments) -> dict[str, dict[str, Any]]:
    """Evaluate each model; print the tables and write what the module's docstring lists.

    Returns:
        The document of each run, by its name; nothing on any process but the first.

    Raises:
        ValueError: An argument names a split, column or backend that does not exist, two runs would
            share a folder, another run has claimed `output_dir`, or vLLM is asked for on several
            processes.
    """
    from transformers.utils import logging

    runs = _runs(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.backend == "vllm":
        raise ValueError("`backend` 'vllm' uses all GPUs from one process: no `--num_processes`.")
    state = evaluation_state()
    check_checkpoints([run.checkpoint for run in runs])
    claim(args.output_dir)
    logging.disable_progress_bar()
    rows = _load_rows(args)
    results = {}
    with Verifier(
        args.verifier, timeout=args.verifier_timeout, workers=args.verifier_workers
    ) as verifier:
        loader = Loader(state.device, args.dtype, args.trust_remote_code)
        for checkpoint in dict.fromkeys(run.checkpoint for run in runs):
            encode_prompts(loader.tokenizer(checkpoint), rows)  # before the first is sampled
        for run in runs:
            result = _evaluate_one(run, rows, verifier, args, state)
            if state.is_main_process:
                results[run.name] = result
    state.destroy_process_group()
    if state.is_main_process:
        _conclude(args, results, len(rows))
    return results


@dataclass(frozen=True)
class _Run:
    """A checkpoint at a temperature, and the name of its folder."""

    name: str
    checkpoint: Checkpoint
    temperature: float


def _runs(args: PassAtNArguments) -> list[_Run]:
    """A run for each model or adapter and each temperature, with a folder of its own."""
    if args.backend not in ("transformers", "vllm"):
        raise ValueError(f"`backend` must be 'transformers' or 'vllm', got {args.backend!r}.")
    if not args.verifier_timeout > 0 or args.verifier_workers < 1:
        raise ValueError(
            "`verifier_timeout` must be positive and `verifier_workers` 1 or more, got "
            f"{args.verifier_timeout} and {args.verifier_workers}."
        )
    rest = (args.top_p, args.max_new_tokens, args.seed, args.num_samples, args.token_budget)
    for temperature in args.temperature:
        SamplingOptions(temperature, *rest)
    pass_at_n(args.num_samples, 0, args.n)
    if args.max_problems is not None and args.max_problems < 1:
        raise ValueError(f"`max_problems` must be 1 or more, got {args.max_problems}.")
    if "{prompt}" not in args.prompt_template:
        raise ValueError(f"`prompt_template` lacks {{prompt}}: {args.prompt_template!r}.")
    if len(set(args.temperature)) < len(args.temperature):
        raise ValueError(f"`temperature` names one twice: {args.temperature}.")
    several = len(args.temperature) > 1
    return [
        _Run(f"{given.name}-T{t:g}" if several else given.name, given, t)
        for given in named_checkpoints(args.model_name_or_path, args.adapter)
        for t in args.temperature
    ]


def _load_rows(args: PassAtNArguments) -> "Dataset":
    """The rows to evaluate on, with columns `prompt` and `answer`, one in each row."""
    from llmmix.rows.sources import load_splits, pick_split

    splits = load_splits(args.dataset_name, args.dataset_config)
    return read_problems(
        pick_split(splits, args.dataset_split, "dataset_split", default="test"),
        prompt_column=args.prompt_column,
        answer_column=args.answer_column,
        prompt_template=args.prompt_template,
        apply_chat_template=args.apply_chat_template,
        most=args.max_problems,
    )


def _evaluate_one(
    run: _Run, rows: "Dataset", verifier: Verifier, args: PassAtNArguments, state: "PartialState"
) -> dict[str, Any]:
    """Sample and judge one run, and return its document, which only the main process has whole."""
    loader = Loader(state.device, args.dtype, args.trust_remote_code)
    log = SampleLog(Path(args.output_dir) / run.name, _settings(run, loader, args))
    if state.is_main_process and state.num_processes > 1:
        judge_again(log, rows, verifier)
    state.wait_for_everyone()
    tokenizer = loader.tokenizer(run.checkpoint)
    if args.backend == "vllm":
        model = loader.held(run.checkpoint, lambda: _vllm(run, args))
    else:
        model = loader.model(run.checkpoint)
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "token_budget": args.token_budget,
        "temperature": run.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    result = evaluate(
        model,
        tokenizer,
        rows,
        num_samples=args.num_samples,
        n=args.n,
        verifier=verifier,
        maj=args.maj,
        log=log,
        process=(state.process_index, state.num_processes),
        description=f"Sampling {run.name}",
        **options,
    )
    state.wait_for_everyone()
    left_out = result["left_out"]
    if state.num_processes > 1 and state.is_main_process:
        n, records = sorted(set(args.n)), list(log.read())
        result |= summarize(records, len(rows), args.num_samples, n, left_out, maj=args.maj)
    result = {
        "eval": "pass_at_n",
        "model": run.checkpoint.model,
        "adapter": run.checkpoint.adapter,
        "dataset": args.dataset_name,
        "verifier": verifier.name,
        **options,
        **result,
    }
    if state.is_main_process:
        file = Path(args.output_dir, run.name, "pass_at_n.json")
        write_whole(file, json.dumps(result, indent=1))
        if "completion" in rows.column_names and args.backend == "transformers":
            kept = [row for row in range(len(rows)) if row not in set(left_out)]
            result["loss"] = _loss_if_any(model, tokenizer, rows.select(kept))
            write_whole(file, json.dumps(result, indent=1))
    del model
    loader.let_go()  # before the next model is loaded
    return result


def _loss_if_any(model: Any, tokenizer: "PreTrainedTokenizerBase", rows: "Dataset") -> float | None:
    """The loss of the reference completions; None, said in a line, where it cannot be had."""
    try:
        return reference_loss(model, tokenizer, rows)
    except Exception as error:  # of the model's own making: no result is lost for it
        print(f"No loss of the reference completions: {type(error).__name__}: {error}")
        return None


def _settings(run: _Run, loader: Loader, args: PassAtNArguments) -> dict[str, Any]:
    """The settings that decide the samples of a run; a log holds samples of one such set."""
    return {
        **loader.fingerprint(run.checkpoint),
        "temperature": run.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "backend": args.backend,
    }


def _vllm(run: _Run, args: PassAtNArguments) -> Any:
    from llmmix.models import resolve_checkpoint
    from llmmix.sampling.vllm_backend import load_vllm

    checkpoint = resolve_checkpoint(run.checkpoint.model)
    return load_vllm(
        checkpoint,
        run.checkpoint.adapter,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )


def _conclude(args: PassAtNArguments, results: dict[str, dict[str, Any]], problems: int) -> None:
    """Compare the runs, print the tables, write summary and report."""
    from llmmix.report import print_report

    differences = compare(results)
    summary = {"runs": results, "differences": differences}
    write_whole(Path(args.output_dir, "summary.json"), json.dumps(summary, indent=1))
    print_tables(results, differences)
    temperatures = ", ".join(f"{t:g}" for t in args.temperature)
    note = (
        f"{problems} problems of {args.dataset_name}, {args.num_samples} samples each at "
        f"temperature {temperatures}, seed {args.seed}, judged by {args.verifier}."
    )
    print_report(args.output_dir, note=note, runs=results)


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((PassAtNArguments,), __file__))
