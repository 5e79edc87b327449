"""Speed and memory of the fused head, of training steps and of sampling, beside their peers.

    llmmix eval speed
    llmmix eval speed --model_name_or_path builtin:tiny HuggingFaceTB/SmolLM2-135M-Instruct
    llmmix eval speed --kinds sampling --rounds 1 --model_name_or_path SmolLM2-135M.gguf
    llmmix eval speed --device cuda
    llmmix eval speed --kinds draws
    llmmix eval speed --kinds padding --dataset_name rows.jsonl --batch_sizes 8

The head alone (frozen or trained, some positions masked) is timed against TRL's fused head and
against plain cross-entropy on full logits; steps of SFT, DCO, SFTMix, RPO and the token losses dft
and eaft against TRL's SFTTrainer and DPOTrainer, of FLAT against the form its authors released, and
of asft against nll; steps without padding against padded ones, on a batch of a dataset;
`llmmix.sampling.sample` against transformers' `generate` with `num_return_sequences`, prompt by
prompt, and against the matrix products that its tokens take; the draws of a mixture against
`datasets.interleave_datasets` with the same shares.
The contenders of a row take turns in one process (padding and sampling: a process for each call),
and the ratios are of their medians. Peak memory is what one call, the first, adds to what its
inputs take, each contender in a process of its own. Nothing else should run on the machine. Prints
a table and writes `speed.json` to `--output_dir`.
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
from llmmix.timing.padding import METHODS as UNEVEN
from llmmix.timing.padding import padding_cases
from llmmix.timing.sampling import matrix_products, sampling_cases
from llmmix.timing.steps import STEPS, TUNING, step_cases

KINDS = ("head", "steps", "padding", "sampling", "draws")
APART = ("padding", "sampling")  # a process for each call, which yields time and memory at once
METHODS = tuple(dict.fromkeys([*(step.name for step in STEPS), *UNEVEN]))
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
        default_factory=lambda: list(METHODS),
        metadata={
            "help": f"Methods whose training steps are timed, among {', '.join(METHODS)}. "
            f"Without padding: {', '.join(UNEVEN)}."
        },
    )
    tuning: list[str] = field(
        default_factory=lambda: list(TUNING),
        metadata={"help": f"What the methods of `steps` train, among {', '.join(TUNING)}."},
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
    dataset_name: str = field(
        default="builtin:math",
        metadata={"help": "Prompts and completions that are timed without their padding."},
    )
    preference_dataset_name: str = field(
        default="builtin:preferences",
        metadata={"help": "Preference pairs that are timed without their padding."},
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [8, 16],
        metadata={"help": "Rows of a batch that is timed without its padding; pairs, for RPO."},
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
            tuning=args.tuning,
        )
    if kind == "padding":
        return padding_cases(
            models=args.model_name_or_path,
            methods=args.methods,
            device=device,
            batch_sizes=args.batch_sizes,
            dataset=args.dataset_name,
            preferences=args.preference_dataset_name,
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
    if kind not in APART:
        return measure(group, rounds=args.rounds, device=device, memory=args.memory)
    row = measure_apart(group, rounds=args.rounds, device=device)
    if kind == "padding":
        return row
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

    _check(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is 'cuda', and torch sees no GPU here.")
    if {"steps", "padding", "sampling"} & set(args.kinds):
        check_checkpoints(named_checkpoints(args.model_name_or_path))
    weighed = args.memory or set(APART) & set(args.kinds)
    if weighed and device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError(
            "Memory is read from Linux's /proc, which is not there: pass `--memory false` and "
            "leave 'padding' and 'sampling' out of `kinds`."
        )
    given: dict[str, Any] = {
        name: getattr(args, name) or sizes[device] for name, sizes in HEAD_SIZES.items()
    }
    return replace(args, device=device, **given), device


def _check(args: SpeedArguments) -> None:
    """Refuse names and numbers that cannot be timed."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("speed runs on one process: leave `--num_processes` out.")
    for name, known in {"kinds": KINDS, "methods": METHODS, "tuning": TUNING}.items():
        if unknown := set(getattr(args, name)) - set(known):
            raise ValueError(f"`{name}` has {sorted(unknown)}; there are {', '.join(known)}.")
    if bad := [share for share in args.masked if not 0 <= share < 1]:
        raise ValueError(f"`masked` must hold shares from 0 to below 1, got {bad}.")
    if bad := [size for size in args.batch_sizes if size < 2 or size % 2]:
        raise ValueError(f"`batch_sizes` must hold even numbers from 2 on, got {bad}.")
    if args.rounds < 1:
        raise ValueError(f"`rounds` must be 1 or more, got {args.rounds}.")


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
            if "completions" in figures:
                rates = (figures[key] / figures["seconds"] for key in ("completions", "tokens"))
                print("{}: {:.2f} completions, {:.0f} tokens a second".format(name, *rates))
        if any("padding" in figures for figures in row["contenders"].values()):
            _print_padding(row)


def _print_padding(row: dict) -> None:
    """What a step without padding is worth: real tokens a second, beside the share of padding."""
    free, padded = row["contenders"].values()
    rates = [figures["tokens"] / figures["seconds"] for figures in (free, padded)]
    print(
        f"{row['row']}: {padded['padding']:.0%} padding ({padded['padding_of_an_epoch']:.0%} of an "
        f"epoch)\n  {rates[0]:.0f} real tokens a second without it, {rates[1]:.0f} padded: "
        f"{rates[0] / rates[1]:.2f}x"
    )


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((SpeedArguments,), __file__))
