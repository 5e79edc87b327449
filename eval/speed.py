"""Speed and memory of the fused head and of whole training steps, beside TRL's.

    llmmix eval speed
    llmmix eval speed --model_name_or_path builtin:tiny HuggingFaceTB/SmolLM2-135M-Instruct
    llmmix eval speed --device cuda

The head alone (frozen or trained, some positions masked) is timed against TRL's fused head and
against plain cross-entropy on full logits; steps of SFT, DCO, SFTMix and RPO against TRL's
SFTTrainer and DPOTrainer. The contenders of a row take turns in one process, and the ratios are of
their medians. Peak memory is what one call, the first, adds to what its inputs take, each contender
in a process of its own. Nothing else should run on the machine. Prints a table and writes
`speed.json` to `--output_dir`.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what TRL's SFTTrainer logs


@dataclass
class SpeedArguments:
    """What `llmmix eval speed` takes."""

    model_name_or_path: list[str] = field(
        default_factory=lambda: ["builtin:tiny"],
        metadata={"help": "Models whose steps are timed: hub id, folder, .gguf or builtin:tiny."},
    )
    kinds: list[str] = field(
        default_factory=lambda: ["head", "steps"], metadata={"help": "What to time."}
    )
    device: str | None = field(
        default=None, metadata={"help": "'cpu' or 'cuda'; a GPU where there is one by default."}
    )
    rows: int | None = field(
        default=None, metadata={"help": "Positions of the head alone; 1024, 8192 on a GPU."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Of the head alone; 576, 2048 on a GPU."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Of the head alone; 49152, 128256 on a GPU."}
    )
    masked: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.9],
        metadata={"help": "Shares of positions whose label is ignored, for the head alone."},
    )
    batch_size: int = field(default=4, metadata={"help": "Rows a training step; even."})
    max_length: int = field(default=256, metadata={"help": "Tokens of each row of a step."})
    rounds: int = field(default=5, metadata={"help": "Timed calls of each contender."})
    memory: bool = field(
        default=True, metadata={"help": "Measure peak memory too, a process a contender."}
    )
    output_dir: str = field(default="runs/speed", metadata={"help": "Where speed.json goes."})


@dataclass(frozen=True)
class Case:
    """One thing to time: picklable, so that it can be built again in a process of its own."""

    row: str
    contender: str
    build: Callable[..., Callable[[], None]]
    options: dict

    def built(self) -> Callable[[], None]:
        """A call that does it once."""
        return self.build(**self.options)


def head_cases(args: SpeedArguments) -> list[list[Case]]:
    """Rows of the head alone: ours first, then TRL's head and plain cross-entropy."""
    shape = {
        "rows": args.rows,
        "hidden_size": args.hidden_size,
        "vocab_size": args.vocab_size,
        "device": args.device,
    }
    kinds = {
        "frozen head": {"trained": False},
        "trained head, recomputing": {"trained": True, "memory_budget": 0},
        "trained head, within the budget": {"trained": True, "memory_budget": 2**40},
    }
    groups = []
    for masked in args.masked:
        for kind, options in kinds.items():
            row = f"{kind}, {masked:.0%} masked" if masked else kind
            groups.append(
                [
                    Case(
                        row,
                        contender,
                        head_call,
                        {**shape, **options, "masked": masked, "head": head},
                    )
                    for contender, head in (
                        ("llmmix", "llmmix"),
                        ("TRL's head", "trl"),
                        ("full logits", "plain"),
                    )
                ]
            )
    return groups


def head_call(
    *, rows, hidden_size, vocab_size, device, trained, masked, head, memory_budget=None
) -> Callable[[], None]:
    """Forward and backward of the loss of a model that is a norm and a head, and nothing else."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from llmmix.head import attach_head

    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=rows + 1,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(trained)
    if head == "llmmix":
        attach_head(model, outputs=SFT_OUTPUTS, memory_budget=memory_budget)
    elif head == "trl":
        add_fused_lm_head(model, outputs=SFT_OUTPUTS)
    hidden = torch.randn(1, rows + 1, hidden_size, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab_size, (1, rows + 1), device=device)
    labels[0, 1 + torch.randperm(rows, device=device)[: int(masked * rows)]] = -100
    fused = {} if head == "plain" else {"fused_lm_head": True}

    def call():
        hidden.grad = model.lm_head.weight.grad = None
        model(inputs_embeds=hidden, labels=labels, use_cache=False, **fused).loss.backward()

    return call


def step_cases(args: SpeedArguments) -> list[list[Case]]:
    """Rows of whole training steps: ours first, then TRL's trainer on the same rows."""
    groups = []
    for model in args.model_name_or_path:
        shared = {
            "model": model,
            "device": args.device,
            "batch_size": args.batch_size,
            "max_length": args.max_length,
        }

        def case(row, contender, method, *, shared=shared, **options):
            return Case(row, contender, step_call, {**shared, "method": method, **options})

        for lora in (False, True):
            tuned = f"{Path(model).name}, {'LoRA' if lora else 'full'}"
            for method, name, peer, peer_name in (
                ("sft_our_head", "SFT on our head", "sft", "SFTTrainer"),
                ("dco", "DCO", "sft_completion", "SFTTrainer"),
                ("sftmix", "SFTMix", "sft_completion", "SFTTrainer"),
                ("rpo", "RPO", "dpo", "DPOTrainer"),
            ):
                row = f"{name}, {tuned}"
                groups.append(
                    [case(row, "llmmix", method, lora=lora), case(row, peer_name, peer, lora=lora)]
                )
    return groups


def step_call(*, model, device, batch_size, max_length, method, lora) -> Callable[[], None]:
    """One optimizer step of a trainer at its default settings, AdamW included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmmix.data import resolve_checkpoint

    checkpoint = resolve_checkpoint(model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = _trainer(
        method,
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", use_safetensors=True),
        _rows(tokenizer, method, batch_size, max_length),
        tokenizer,
        lora,
        {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": batch_size,
            "max_length": max_length,
            "use_cpu": device == "cpu",
            "bf16": device != "cpu",
            "report_to": "none",
            "disable_tqdm": True,
        },
    )
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    loader = trainer.get_train_dataloader()
    wrapped = trainer.accelerator.prepare(trainer.model)
    optimizer = trainer.accelerator.prepare(trainer.create_optimizer())

    def call():
        batches, count = trainer.get_batch_samples(iter(loader), 1, trainer.args.device)
        trainer.training_step(wrapped, batches[0], count)
        optimizer.step()
        optimizer.zero_grad()

    return call


def _trainer(method, model, rows, tokenizer, lora, options):
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    import llmmix

    trainer, config = {
        "sft": (SFTTrainer, SFTConfig),
        "sft_our_head": (SFTTrainer, SFTConfig),
        "sft_completion": (SFTTrainer, SFTConfig),
        "dco": (llmmix.DCOTrainer, llmmix.DCOConfig),
        "sftmix": (llmmix.SFTMixTrainer, llmmix.SFTMixConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "rpo": (llmmix.RPOTrainer, llmmix.RPOConfig),
    }[method]
    built = trainer(
        model=model,
        args=config(**options),
        train_dataset=rows,
        processing_class=tokenizer,
        # What `trl sft --use_peft` makes
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05) if lora else None,
    )
    if method == "sft_our_head":
        llmmix.attach_head(built.model, outputs=SFT_OUTPUTS)
    return built


def _rows(tokenizer, method: str, batch_size: int, max_length: int):
    """Rows of random numbers, all longer than `max_length`; a quarter of it is the prompt.

    The rows of plain SFT have no prompt: every position is scored.
    """
    import numpy as np
    from datasets import Dataset

    rng = np.random.default_rng(0)

    def text(tokens: int) -> str:
        numbers = " ".join(map(str, rng.integers(100, 1000, size=tokens)))
        return tokenizer.decode(tokenizer(numbers, add_special_tokens=False)["input_ids"][:tokens])

    def column(tokens: int) -> list[str]:
        return [text(tokens) for _ in range(batch_size)]

    if method in ("sft", "sft_our_head"):
        return Dataset.from_dict({"text": column(2 * max_length)})
    prompts = {"prompt": column(max_length // 4)}
    if method in ("dpo", "rpo"):
        responses = {"chosen": column(2 * max_length), "rejected": column(2 * max_length)}
    else:
        responses = {
            "completion": column(2 * max_length),
            "confidence": [float(row) for row in range(batch_size)],
        }
    return Dataset.from_dict(prompts | responses)


def measure(cases: list[Case], args: SpeedArguments) -> dict:
    """One row of the table: the contenders in turns, then each alone for its memory."""
    import torch

    calls = [case.built() for case in cases]
    seconds = [[] for _ in cases]
    for turn in range(args.rounds + 1):  # the first warms up
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if turn:
                taken.append(time.perf_counter() - started)
    del call, calls
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()
    row = {"row": cases[0].row, "contenders": {}}
    for case, taken in zip(cases, seconds, strict=True):
        row["contenders"][case.contender] = {
            "seconds": statistics.median(taken),
            "range": [min(taken), max(taken)],
            "peak_mib": _in_its_own_process(case, args.device) if args.memory else None,
        }
    ours, *peers = row["contenders"].values()
    for peer in peers:
        peer["time_ratio"] = ours["seconds"] / peer["seconds"]
        # None too where a call fits into what the process holds already
        peer["memory_ratio"] = ours["peak_mib"] / peer["peak_mib"] if peer["peak_mib"] else None
    return row


def _in_its_own_process(case: Case, device: str) -> float:
    # Forked from a process that has imported everything and computed nothing
    context = get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.dpo_trainer", "llmmix.sftmix", "peft"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_mib, case, device).result()


def _peak_mib(case: Case, device: str) -> float:
    """What the first call adds, at its peak, to the memory that its inputs take."""
    import torch

    _quiet()
    call = case.built()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    return _resident_mib("VmHWM") - before


def _resident_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name)
    )


def main(args: SpeedArguments) -> dict:
    """Time each row; print one table, write speed.json as the rows come."""
    args = _resolve(args)
    _quiet()
    cases = {"head": head_cases, "steps": step_cases}
    result = {
        "eval": "speed",
        "settings": asdict(args),
        "machine": _machine(args.device),
        "rows": [],
    }
    out = Path(args.output_dir) / "speed.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        for group in cases[kind](args):
            print(f"{group[0].row} ...", flush=True)
            result["rows"].append(measure(group, args))
            out.write_text(json.dumps(result, indent=1))
    _print_table(result)
    print(f"Written: {out}")
    return result


def _resolve(args: SpeedArguments) -> SpeedArguments:
    """The arguments with the device and its sizes filled in, or what is wrong with them."""
    import torch

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("speed runs on one process: leave `--num_processes` out.")
    if unknown := set(args.kinds) - {"head", "steps"}:
        raise ValueError(f"`kinds` has {sorted(unknown)}; there are 'head' and 'steps'.")
    if bad := [share for share in args.masked if not 0 <= share < 1]:
        raise ValueError(f"`masked` must hold shares from 0 to below 1, got {bad}.")
    if args.rounds < 1:
        raise ValueError(f"`rounds` must be 1 or more, got {args.rounds}.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is 'cuda', and torch sees no GPU here.")
    if args.memory and device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError("`memory` is read from Linux's /proc: pass `--memory false` here.")
    sizes = (1024, 576, 49152) if device == "cpu" else (8192, 2048, 128256)
    names = ("rows", "hidden_size", "vocab_size")
    given = {name: getattr(args, name) or size for name, size in zip(names, sizes, strict=True)}
    return replace(args, device=device, **given)


def _machine(device: str) -> dict:
    import torch
    import transformers
    import trl

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "CPU")


def _print_table(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    machine, settings = result["machine"], result["settings"]
    table = Table(
        title=f"{machine['device']}, {machine['threads']} threads; medians of {settings['rounds']}",
        caption="The last two columns: llmmix's time and memory as a share of the other's. Head: "
        f"{settings['rows']} x {settings['hidden_size']} x {settings['vocab_size']}; steps: "
        f"{settings['batch_size']} rows of {settings['max_length']} tokens.",
    )
    for name in ("", "seconds", "peak MiB", "time", "memory"):
        table.add_column(name, justify="right" if name else "left")
    for row in result["rows"]:
        table.add_section()
        table.add_row(f"[bold]{row['row']}")
        for name, figures in row["contenders"].items():
            ratios = (figures.get("time_ratio"), figures.get("memory_ratio"))
            table.add_row(
                f"  {name}",
                f"{figures['seconds']:.3f}",
                "" if figures["peak_mib"] is None else f"{figures['peak_mib']:.0f}",
                *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            )
    Console().print(table)


def _quiet() -> None:
    import logging
    import warnings

    import datasets
    import transformers.utils.logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # such as that every row fills `max_length`
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((SpeedArguments,), __file__))
