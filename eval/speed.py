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

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llmmix.timing import Case, machine, measure, measure_apart, quiet

SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what TRL's SFTTrainer logs


STEPS = (  # what is timed, its name, and its peer's
    ("sft_our_head", "SFT on our head", "sft", "SFTTrainer"),
    ("dco", "DCO", "sft_completion", "SFTTrainer"),
    ("sftmix", "SFTMix", "sft_completion", "SFTTrainer"),
    ("rpo", "RPO", "dpo", "DPOTrainer"),
    ("flat", "FLAT", "flat_published", "two forwards, softmax"),
)


@dataclass
class SpeedArguments:
    """What `llmmix eval speed` takes."""

    model_name_or_path: list[str] = field(
        default_factory=lambda: ["builtin:tiny"],
        metadata={"help": "Models whose steps are timed: hub id, folder, .gguf or builtin:tiny."},
    )
    kinds: list[str] = field(
        default_factory=lambda: ["head", "steps", "sampling", "draws"],
        metadata={"help": "What to time."},
    )
    methods: list[str] = field(
        default_factory=lambda: [row[1] for row in STEPS],
        metadata={"help": "Which steps, of those that the table names first."},
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
    draws: int = field(default=1_000_000, metadata={"help": "Rows to draw from a mixture."})
    prompts: int = field(default=8, metadata={"help": "Prompts to sample, of builtin:math."})
    num_samples: int = field(default=64, metadata={"help": "Completions a prompt."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens of a completion."})
    rounds: int = field(default=5, metadata={"help": "Timed calls of each contender."})
    memory: bool = field(
        default=True, metadata={"help": "Measure peak memory too, a process a contender."}
    )
    output_dir: str = field(default="runs/speed", metadata={"help": "Where speed.json goes."})


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
            for method, name, peer, peer_name in STEPS:
                if name not in args.methods:
                    continue
                row = f"{name}, {tuned}"
                groups.append(
                    [case(row, "llmmix", method, lora=lora), case(row, peer_name, peer, lora=lora)]
                )
    return groups


def step_call(*, model, device, batch_size, max_length, method, lora) -> Callable[[], None]:
    """One optimizer step of a trainer at its default settings, AdamW included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmmix.models import resolve_checkpoint

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
        "flat": (llmmix.FLATTrainer, llmmix.FLATConfig),
        "flat_published": (_published_flat(), llmmix.FLATConfig),
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


def _published_flat():
    """FLAT as its authors released it: a forward a part, and softmax over all of its logits."""
    import torch

    import llmmix
    from llmmix.unlearning.flat import flat_loss

    class PublishedFLAT(llmmix.FLATTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            template, forget = (
                self.mean_probability(model, inputs, rows)
                for rows in torch.arange(len(inputs["labels"])).chunk(2)
            )
            return flat_loss(template, forget).mean()

        def mean_probability(self, model, inputs, rows):
            names = ("input_ids", "attention_mask")
            logits = model(**{name: inputs[name][rows] for name in names}, use_cache=False).logits
            probs = torch.softmax(logits[:, :-1], -1).transpose(1, 2)
            labels = inputs["labels"][rows, 1:]
            taken = torch.nn.functional.nll_loss(probs, labels, reduction="none")
            return -taken.sum(1) / (labels != -100).sum(1)

    return PublishedFLAT


def _rows(tokenizer, method: str, batch_size: int, max_length: int):
    """Rows of random numbers, as long as `max_length` or longer; a quarter of it is the prompt.

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
    if method in ("flat", "flat_published"):
        fitting = max_length - max_length // 4 - 8  # too long a row would be left out
        responses = {"completion": column(fitting), "template": column(fitting)}
    elif method in ("dpo", "rpo"):
        responses = {"chosen": column(2 * max_length), "rejected": column(2 * max_length)}
    else:
        responses = {
            "completion": column(2 * max_length),
            "confidence": [float(row) for row in range(batch_size)],
        }
    return Dataset.from_dict(prompts | responses)


def sampling_cases(args: SpeedArguments) -> list[list[Case]]:
    """Rows of sampling: ours first, then `generate`, prompt by prompt, as many rows at once."""
    groups = []
    for model in args.model_name_or_path:
        size = f"{args.prompts} prompts x {args.num_samples}, up to {args.max_new_tokens} tokens"
        options = {
            "model": model,
            "device": args.device,
            "prompts": args.prompts,
            "num_samples": args.num_samples,
            "max_new_tokens": args.max_new_tokens,
        }
        groups.append(
            [
                Case(
                    f"Sampling {Path(model).name}, {size}",
                    engine,
                    sampling_call,
                    options | {"engine": engine},
                )
                for engine in ("llmmix", "generate")
            ]
        )
    return groups


def sampling_call(
    *, model, device, prompts, num_samples, max_new_tokens, engine
) -> Callable[[], dict]:
    """Completions of problems of all levels, until each stops by itself or is cut."""
    import torch

    from llmmix.models import encode
    from llmmix.sampling import sample

    model, tokenizer = _load(model, device)
    rows = _spread(prompts)
    longest = max(len(encode(tokenizer, prompt)) for prompt in rows)
    # What `generate` holds for the samples of the longest prompt
    budget = num_samples * (longest + max_new_tokens)
    torch.manual_seed(0)

    def ours() -> dict:
        found = sample(
            model,
            tokenizer,
            rows,
            num_samples,
            max_new_tokens=max_new_tokens,
            token_budget=budget,
        )
        tokens = [completion.tokens for completion in found]
        return {"completions": len(tokens), "tokens": sum(tokens)}

    def theirs() -> dict:
        completions = tokens = 0
        for prompt in rows:
            ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                # the model's distribution, whatever its generation_config says
                **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
                num_return_sequences=num_samples,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
            )[:, ids.size(1) :]
            completions += len(out)
            tokens += int((out != tokenizer.eos_token_id).cumprod(1).sum())
        return {"completions": completions, "tokens": tokens}

    return ours if engine == "llmmix" else theirs


MIXTURE = {"web": (100_000, 0.5), "code": (60_000, 0.3), "books": (40_000, 0.2)}  # rows, share


def draw_cases(args: SpeedArguments) -> list[list[Case]]:
    """The draws of a mixture: which rows, and then the rows themselves."""
    contenders = {
        f"which of {args.draws} rows come next": {
            "llmmix, one by one": "one_by_one",
            "llmmix, a step at a time": "steps",
            "interleave_datasets": "interleave",
        },
        f"{args.draws // 50} rows read": {
            "llmmix": "rows",
            "interleave_datasets": "interleave_rows",
            "interleave_datasets, streaming": "interleave_stream",
        },
    }
    return [
        [
            Case(row, name, draw_call, {"how": how, "draws": args.draws})
            for name, how in group.items()
        ]
        for row, group in contenders.items()
    ]


def draw_call(*, how: str, draws: int) -> Callable[[], dict]:
    """Draws from three domains, from the first on."""
    import datasets

    from llmmix.mixing import MixtureSampler

    shares = [share for _, share in MIXTURE.values()]
    rows = {name: datasets.Dataset.from_dict({"row": range(n)}) for name, (n, _) in MIXTURE.items()}
    together = datasets.concatenate_datasets(list(rows.values()))
    settings = {"probabilities": shares, "seed": 0, "stopping_strategy": "all_exhausted"}

    def draw() -> dict:
        sampler = MixtureSampler(rows, shares)
        if how == "one_by_one":
            done = sum(1 for _ in itertools.islice(sampler, draws))
        elif how == "steps":
            done = 0
            while done < draws:
                block = sampler.take(1024)
                sampler.use(len(block.rows))
                done += len(block.rows)
        elif how == "interleave":
            done = 0
            while done < draws:
                done += len(datasets.interleave_datasets(list(rows.values()), **settings))
        elif how == "rows":
            done = sum(1 for i in itertools.islice(sampler, draws // 50) if together[i])
        else:
            parts = list(rows.values())
            if how == "interleave_stream":
                parts = [part.to_iterable_dataset() for part in parts]
            mixed = datasets.interleave_datasets(parts, **settings)
            done = sum(1 for _ in itertools.islice(mixed, draws // 50))
        return {"draws": done}

    return draw


def _spread(count: int) -> list:
    """Prompts spread over the test split, so over its levels."""
    from llmmix.data import load_splits

    rows = load_splits("builtin:math")["test"]
    return [rows[i * len(rows) // count]["prompt"] for i in range(count)]


def _load(name: str, device: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmmix.models import resolve_checkpoint

    checkpoint = resolve_checkpoint(name)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(checkpoint)


def matrix_products(name: str, device: str, rows: int, tokens: int) -> float:
    """Seconds that a model's linear layers alone take for so many tokens, `rows` at a time."""
    import torch

    model, _ = _load(name, device)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {
        size: torch.randn(rows, size, device=device, dtype=model.dtype)
        for size in {layer.in_features for layer in layers}
    }
    taken = []
    with torch.inference_mode():
        for _ in range(6):
            started = time.perf_counter()
            for layer in layers:
                layer(inputs[layer.in_features])
            if device != "cpu":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:]) * tokens / rows


def main(args: SpeedArguments) -> dict:
    """Time each row; print one table, write speed.json as the rows come."""
    args = _resolve(args)
    quiet()
    result = {
        "eval": "speed",
        "settings": asdict(args),
        "machine": machine(args.device),
        "rows": [],
    }
    out = Path(args.output_dir) / "speed.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        for group in CASES[kind](args):
            print(f"{group[0].row} ...", flush=True)
            result["rows"].append(_measure(kind, group, args))
            out.write_text(json.dumps(result, indent=1))
    _print_table(result)
    print(f"Written: {out}")
    return result


CASES = {
    "head": head_cases,
    "steps": step_cases,
    "sampling": sampling_cases,
    "draws": draw_cases,
}


def _measure(kind: str, group: list[Case], args: SpeedArguments) -> dict:
    if kind != "sampling":
        return measure(group, rounds=args.rounds, device=args.device, memory=args.memory)
    row = measure_apart(group, rounds=args.rounds, device=args.device)
    ours = next(iter(row["contenders"].values()))
    model = group[0].options["model"]
    seconds = matrix_products(model, args.device, args.num_samples, ours["tokens"])
    row["contenders"][f"its matrix products, {args.num_samples} rows at a time"] = {
        "seconds": seconds,
        "peak_mib": None,
        "time_ratio": ours["seconds"] / seconds,
    }
    return row


def _resolve(args: SpeedArguments) -> SpeedArguments:
    """The arguments with the device and its sizes filled in, or what is wrong with them."""
    import torch

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("speed runs on one process: leave `--num_processes` out.")
    if unknown := set(args.kinds) - set(CASES):
        raise ValueError(f"`kinds` has {sorted(unknown)}; there are {', '.join(CASES)}.")
    if unknown := set(args.methods) - {row[1] for row in STEPS}:
        names = ", ".join(row[1] for row in STEPS)
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
    weighed = args.memory or "sampling" in args.kinds
    if weighed and device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError(
            "Memory is read from Linux's /proc, which is not there: pass `--memory false` and "
            "leave 'sampling' out of `kinds`."
        )
    sizes = (1024, 576, 49152) if device == "cpu" else (8192, 2048, 128256)
    names = ("rows", "hidden_size", "vocab_size")
    given = {name: getattr(args, name) or size for name, size in zip(names, sizes, strict=True)}
    return replace(args, device=device, **given)


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
    for row in result["rows"]:
        for name, figures in row["contenders"].items():
            if "tokens" in figures:
                rates = (figures[key] / figures["seconds"] for key in ("completions", "tokens"))
                print("{}: {:.2f} completions, {:.0f} tokens a second".format(name, *rates))


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((SpeedArguments,), __file__))
