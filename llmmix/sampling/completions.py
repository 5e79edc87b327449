"""N completions a prompt, fast: a prompt is computed once, and a finished row makes way at once.

Every completion has a random stream of its own, drawn by a counter from (seed, prompt, sample): it
does not depend on what is decoded beside it, on the number of processes, or on what was sampled
before. Two runs differ only where rounding, which does depend on the batch, tips a draw that falls
within it of the edge between two tokens: seldom in fp32, often in bf16.

    token = the first whose cumulative probability exceeds u,   u uniform of (seed, prompt, sample)

A model that the engine cannot decode is sampled by its own `generate`, which is slower and draws
from the same streams.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmmix.processes import say_once
from llmmix.rows.prompts import Prompt, encode
from llmmix.sampling.engine import Engine
from llmmix.sampling.generate_backend import sample_by_generate
from llmmix.sampling.requests import (
    Completion,
    PromptRequest,
    SamplingOptions,
    check_room,
    requests_for,
)
from llmmix.sampling.servability import assigned


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | list[int]],
    num_samples: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    token_budget: int = 16384,
    numbers: Sequence[int] | None = None,
    done: Collection[tuple[int, int]] = (),
    fall_back: bool = True,
) -> Iterator[Completion]:
    """Draw completions, yielding each when it is finished.

    Args:
        model: A causal language model of transformers, whose mode and attention are put back at the
            end, or a `vllm.LLM`.
        tokenizer: The model's tokenizer; it needs no pad token, since nothing is padded.
        prompts: Text, lists of chat messages, or token ids as `encode` gives them.
        num_samples: Completions of each prompt.
        temperature: Divisor of the logits; 0 takes the most probable token, the first of equals,
            so that all samples of a prompt are one answer.
        top_p: Nucleus mass in (0, 1]; 1 samples from the whole distribution.
        max_new_tokens: Tokens after which a completion is cut.
        seed: Seed of the draws, 0 or above.
        token_budget: Tokens of prompts and completions whose keys and values are held at once; it
            bounds the memory and decides how many completions run side by side. vLLM has its own.
        numbers: What to call the prompts, which decides their random streams: 0, 1, ... by default.
        done: Pairs (prompt, sample) that are not wanted.
        fall_back: Whether prompts that the engine cannot decode are sampled by the model's own
            `generate`, which a warning says once; else they are refused.

    Raises:
        ValueError: A temperature, nucleus, seed or number is out of its range; a prompt is empty or
            leaves no room for a completion; the budget is below one completion; the engine cannot
            decode the model and `fall_back` is off, or `generate` cannot either.
    """
    options = SamplingOptions(temperature, top_p, max_new_tokens, seed, num_samples, token_budget)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    numbers = range(len(ids)) if numbers is None else numbers
    wanted = requests_for(ids, num_samples, numbers, done)
    check_room(ids, model, max_new_tokens, token_budget, numbers)
    in_torch = isinstance(model, torch.nn.Module)
    if not in_torch:
        from llmmix.sampling.vllm_backend import sample_vllm

        yield from sample_vllm(model, wanted, options)
    else:
        yield from _sample_in_torch(model, tokenizer, wanted, options, fall_back)


def _sample_in_torch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[PromptRequest],
    options: SamplingOptions,
    fall_back: bool,
) -> Iterator[Completion]:
    """By the engine, what it can decode; by `generate` the rest."""
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__  # not PEFT's
    for prompts, why in assigned(model, wanted, options):
        if why is None:
            yield from Engine(model, tokenizer, prompts, options).run()
            continue
        if not fall_back:
            raise ValueError(
                f"{name} cannot be decoded by llmmix's engine, which needs plain attention in "
                f"every layer: {why}. Leave `fall_back` on, or sample it with vLLM (`backend` "
                "'vllm')."
            )
        say_once(
            f"{name} is sampled by its own `generate`, which is slower than llmmix's engine: {why}."
        )
        draws = sample_by_generate(model, tokenizer, prompts, options)
        try:
            first = next(draws)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{name} can be decoded neither by llmmix's engine ({why}) nor by its own "
                f"`generate` ({type(error).__name__}: {error})."
            ) from error
        yield first
        yield from draws
