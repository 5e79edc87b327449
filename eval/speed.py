"""Speed and memory of the fused head, training steps and sampling, beside their peers.

    llmmix eval speed
    llmmix eval speed --model_name_or_path builtin:tiny HuggingFaceTB/SmolLM2-135M-Instruct
    llmmix eval speed --kinds sampling --rounds 1 --model_name_or_path SmolLM2-135M.gguf
    llmmix eval speed --device cuda
    llmmix eval speed --kinds draws

The head alone (frozen or trained, some positions masked) is timed against TRL's fused head and
against plain cross-entropy on full logits; steps of SFT, DCO, SFTMix and RPO against TRL's
SFTTrainer and DPOTrainer, and of FLAT against the form its authors released;
`llmmix.sampling.sample` against transformers' `generate` with `num_return_sequences`, prompt by
prompt, and against the matrix products that its tokens take; the draws of a mixture against
`datasets.interleave_datasets` with the same shares.
The contenders of a row take turns in one process (sampling: a process each), and the ratios are of
their medians. Peak memory is what one call, the first, adds to what its inputs take, each contender
in a process of its own. Nothing else should run on the machine. Prints a table and writes
`speed.json` to `--output_dir`.
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmmix.files import claim, write_whole
from llmmix.terminal import number, print_table
from llmmix.timing import Case, machine, measure, measure_apart, quiet
from llmmix.timing.draws import draw_cases
from llmmix.timing.head import head_cases
from llmmix.timing.sampling import matrix_products, sampling_cases
from llmmix.timing.steps import STEPS, step_cases

KINDS = ("head", "steps", "sampling", "draws")
HEAD_SIZES = {  # of the head alone, where the arguments leave them open
    "rows": {"cpu": 1024, "cuda": 8192},
    "hidden_size": {"cpu": 576, "cuda": 2048},
    "vocab_size": {"cpu": 49152, "cuda": 128256},
}


@dataclass
class SpeedArguments:
    """What `llmmix eval speed` takes."""

    model_name_or_path: list[str] = field(
        default_factory=lambda: ["builtin:tiny"],
        metadata={
            "help": "Models whose steps and sampling are timed: hub ids, folders, .gguf files or "
            "builtin:tiny."
        },
    )
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={"help": f"What to time, among {', '.join(KINDS)}."},
    )
    methods: list[str] = field(
        default_factory=lambda: [step.name for step in STEPS],
        metadata={
            "help": "Methods whose training steps are timed, among "
            f"{', '.join(step.name for step in STEPS)}."
        },
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Device: 'cpu' or 'cuda'. Default: a GPU where there is one."},
    )
    rows: int | None = field(
        default=None,
        metadata={"help": "Positions that the head alone scores. Default 1024, on a GPU 8192."},
    )
    hidden_size: int | None = field(
        default=None,
        metadata={"help": "Hidden size of the head alone. Default 576, on a GPU 2048."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Vocabulary of the head alone. Default 49152, on a GPU 128256."},
    )
    masked: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.9],
        metadata={"help": "Shares of ignored positions at which the head alone is timed."},
    )
    batch_size: int = field(default=4, metadata={"help": "Rows of a training step, even."})
    max_length: int = field(
        default=256, metadata={"help": "Tokens of each row of a training step."}
    )
    draws: int = field(default=1_000_000, metadata={"help": "Rows to draw from a mixture."})
    prompts: int = field(default=8, metadata={"help": "Prompts of builtin:math to sample."})
    num_samples: int = field(default=64, metadata={"help": "Completions sampled of each prompt."})
    max_new_tokens: int = field(
        default=128, metadata={"help": "Tokens after which a completion is cut."}
    )
    rounds: int = field(default=5, metadata={"help": "Timed calls of each contender."})
    memory: bool = field(
        default=True,
        metadata={"help": "Measure peak memory too, in a process of its own for each contender."},
    )
    output_dir: str = field(
        default="runs/speed", metadata={"help": "Folder that speed.json is written to."}
    )


def main(args: SpeedArguments) -> dict:
    """Time each row; print one table, write speed.json as the rows come."""
    args, device = _resolve(args)
    quiet()
    rows: list[dict] = []
    result = {
        "eval": "speed",
        "settings": asdict(args),
        "machine": machine(device),
        "rows": rows,
    }
    out = claim(args.output_dir) / "speed.json"
    for kind in args.kinds:
        for group in cases(kind, args, device):
            print(f"{group[0].row} ...", flush=True)
            rows.append(_measure(kind, group, args, device))
            write_whole(out, json.dumps(result, indent=1))
    _print_table(result)
    print(f"Written: {out}")
    return result


def cases(kind: str, args: SpeedArguments, device: str) -> list[list[Case]]:
    """The contenders of each row of a kind, ours first.

    Args:
        kind: One of `KINDS`.
        args: The arguments, with the sizes of the head filled in.
        device: "cpu" or "cuda".
    """
    if kind == "head":
        shape = {name: getattr(args, name) for name in HEAD_SIZES}
        return head_cases(**shape, masked=args.masked, device=device)
    if kind == "steps":
        return step_cases(
            models=args.model_name_or_path,
            methods=args.methods,
            device=device,
            batch_size=args.batch_size,
            max_length=args.max_length,
        )
    if kind == "sampling":
        return sampling_cases(
            models=args.model_name_or_path,
            device=device,
            prompts=args.prompts,
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
        )
    return draw_cases(draws=args.draws)


def _measure(kind: str, group: list[Case], args: SpeedArguments, device: str) -> dict:
    if kind != "sampling":
        return measure(group, rounds=args.rounds, device=device, memory=args.memory)
    row = measure_apart(group, rounds=args.rounds, device=device)
    ours = next(iter(row["contenders"].values()))
    model = group[0].options["model"]
    seconds = matrix_products(model, device, args.num_samples, ours["tokens"])
    row["contenders"][f"its matrix products, {args.num_samples} rows at a time"] = {
        "seconds": seconds,
        "peak_mib": None,
        "time_ratio": ours["seconds"] / seconds,
    }
    return row


def _resolve(args: SpeedArguments) -> tuple[SpeedArguments, str]:
    """The arguments with the device and its sizes filled in, and the device."""
    import torch

    from llmmix.models import check_checkpoints, named_checkpoints

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("speed runs on one process: leave `--num_processes` out.")
    if unknown := set(args.kinds) - set(KINDS):
        raise ValueError(f"`kinds` has {sorted(unknown)}; there are {', '.join(KINDS)}.")
    if unknown := set(args.methods) - {step.name for step in STEPS}:
        names = ", ".join(step.name for step in STEPS)
        raise ValueError(f"`methods` has {sorted(unknown)}; there are {names}.")
    if bad := [share for share in args.masked if not 0 <= share < 1]:
        raise ValueError(f"`masked` must hold shares from 0 to below 1, got {bad}.")
    if args.rounds < 1:
        raise ValueError(f"`rounds` must be 1 or more, got {args.rounds}.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is 'cuda', and torch sees no GPU here.")
    if {"steps", "sampling"} & set(args.kinds):
        check_checkpoints(named_checkpoints(args.model_name_or_path))
    weighed = args.memory or "sampling" in args.kinds
    if weighed and device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError(
            "Memory is read from Linux's /proc, which is not there: pass `--memory false` and "
            "leave 'sampling' out of `kinds`."
        )
    given: dict[str, Any] = {
        name: getattr(args, name) or sizes[device] for name, sizes in HEAD_SIZES.items()
    }
    return replace(args, device=device, **given), device


def _print_table(result: dict) -> None:
    machine, settings = result["machine"], result["settings"]
    rows = []
    for row in result["rows"]:
        rows.append([row["row"]])
        for name, figures in row["contenders"].items():
            memory = number(figures["peak_mib"], 0, missing="")
            cells = [f"  {name}", number(figures["seconds"]), memory]
            for ratio in (figures.get("time_ratio"), figures.get("memory_ratio")):
                cells.append("" if ratio is None else f"{number(ratio, 2)}x")
            rows.append(cells)
    print_table(
        f"{machine['device']}, {machine['threads']} threads; medians of {settings['rounds']}",
        ["", "seconds", "peak MiB", "time", "memory"],
        rows,
        notes=[
            "The last two columns: llmmix's time and memory as a share of the other's.",
            f"Head: {settings['rows']} x {settings['hidden_size']} x {settings['vocab_size']}; "
            f"steps: {settings['batch_size']} rows of {settings['max_length']} tokens.",
        ],
    )
    for row in result["rows"]:
        for name, figures in row["contenders"].items():
            if "tokens" in figures:
                rates = (figures[key] / figures["seconds"] for key in ("completions", "tokens"))
                print("{}: {:.2f} completions, {:.0f} tokens a second".format(name, *rates))


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((SpeedArguments,), __file__))
