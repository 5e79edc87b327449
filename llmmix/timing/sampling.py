"""Sampling: `llmmix.sampling.sample` against `generate`, and the matrix products that it takes."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmmix.timing.clock import Case


def sampling_cases(
    *, models: Sequence[str], device: str, prompts: int, num_samples: int, max_new_tokens: int
) -> list[list[Case]]:
    """Rows of sampling: ours first, then `generate`, prompt by prompt, as many rows at once.

    Args:
        models: Hub ids, folders, `.gguf` files or built-ins.
        device: "cpu" or "cuda".
        prompts: Problems of `builtin:math`.
        num_samples: Completions of each.
        max_new_tokens: Tokens after which a completion is cut.
    """
    sizes = {"prompts": prompts, "num_samples": num_samples, "max_new_tokens": max_new_tokens}
    size = f"{prompts} prompts x {num_samples}, up to {max_new_tokens} tokens"
    return [
        [
            Case(
                f"Sampling {Path(model).name}, {size}",
                engine,
                sampling_call,
                {"model": model, "device": device, **sizes, "engine": engine},
            )
            for engine in ("llmmix", "generate")
        ]
        for model in models
    ]


def sampling_call(
    *,
    model: str,
    device: str,
    prompts: int,
    num_samples: int,
    max_new_tokens: int,
    engine: str,
) -> Callable[[], dict]:
    """Completions of problems of all levels, until each stops by itself or is cut."""
    from llmmix.rows.prompts import encode
    from llmmix.sampling import sample

    loaded, tokenizer = _load(model, device)
    rows = _spread(prompts)
    longest = max(len(encode(tokenizer, prompt)) for prompt in rows)
    # What `generate` holds for the samples of the longest prompt
    budget = num_samples * (longest + max_new_tokens)
    torch.manual_seed(0)

    def ours() -> dict:
        found = sample(
            loaded,
            tokenizer,
            rows,
            num_samples,
            max_new_tokens=max_new_tokens,
            token_budget=budget,
            fall_back=False,  # it is the engine that is timed
        )
        tokens = [completion.tokens for completion in found]
        return {"completions": len(tokens), "tokens": sum(tokens)}

    def theirs() -> dict:
        completions = tokens = 0
        for prompt in rows:
            ids = torch.tensor([encode(tokenizer, prompt)], device=loaded.device)
            out = loaded.generate(
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


def matrix_products(name: str, device: str, rows: int, tokens: int) -> float:
    """Seconds that a model's linear layers alone take for so many tokens, `rows` at a time."""
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


def _spread(count: int) -> list:
    """Prompts spread over the test split, so over its levels."""
    from llmmix.data import load_splits

    rows = load_splits("builtin:math")["test"]
    return [rows[i * len(rows) // count]["prompt"] for i in range(count)]


def _load(name: str, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmmix.models import resolve_checkpoint

    checkpoint = resolve_checkpoint(name)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    # Any: transformers types no model that has both `to` and `generate`
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(checkpoint)
