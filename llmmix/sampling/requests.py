"""Requests to a sampler and its completions: checked once, read by every backend."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmmix.models import context_length

LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny  # what fp32 logits can be divided by


@dataclass(frozen=True)
class Completion:
    """One completion, without its stop token.

    Attributes:
        prompt: Which prompt, as numbered by the caller.
        sample: Which of its samples, from 0.
        text: What was generated, special tokens left out.
        tokens: How many tokens were generated, the stop token not counted.
        finished: Whether it stopped by itself; else `max_new_tokens` cut it.
    """

    prompt: int
    sample: int
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; checked when it is made.

    Attributes:
        temperature: Divisor of the logits; 0 takes the most probable token, the first of equals.
        top_p: Nucleus mass in (0, 1].
        max_new_tokens: Tokens after which a completion is cut.
        seed: Seed of the draws, 0 or above.
        num_samples: Completions of each prompt.
        token_budget: Tokens whose keys and values are held at once.

    Raises:
        ValueError: `temperature`, `top_p` or `seed` is out of its range, or `num_samples` or
            `max_new_tokens` is below 1.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    num_samples: int
    token_budget: int

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                "`temperature` must be 0, for the most probable token, or lie between "
                f"{LEAST_TEMPERATURE:g} and infinity, got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}.")
        if min(self.num_samples, self.max_new_tokens) < 1:
            raise ValueError(
                f"`num_samples` and `max_new_tokens` must be 1 or more, got {self.num_samples} and "
                f"{self.max_new_tokens}."
            )
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or above, got {self.seed}.")


@dataclass
class PromptRequest:
    """A prompt, and which of its samples are wanted.

    Attributes:
        number: Number of the prompt, which decides the random streams of its samples.
        ids: Token ids of the prompt.
        samples: Numbers of the samples that are still to be started.
    """

    number: int
    ids: list[int]
    samples: list[int]


def requests_for(
    ids: Sequence[list[int]],
    num_samples: int,
    numbers: Sequence[int],
    done: Collection[tuple[int, int]],
) -> list[PromptRequest]:
    """A request for each prompt of which a sample is wanted.

    Args:
        ids: Token ids of each prompt.
        num_samples: Completions of each prompt.
        numbers: What to call the prompts.
        done: Pairs (prompt, sample) that are not wanted.

    Raises:
        ValueError: A prompt has no token.
    """
    if empty := [number for number, row in zip(numbers, ids, strict=True) if not row]:
        raise ValueError(f"{len(empty)} prompts have no token (first: prompt {empty[0]}).")
    done = set(done)
    requests = []
    for number, row in zip(numbers, ids, strict=True):
        if samples := [s for s in range(num_samples) if (number, s) not in done]:
            requests.append(PromptRequest(number, row, samples))
    return requests


def too_long(ids: Sequence[list[int]], model: Any, max_new_tokens: int) -> list[int]:
    """Which prompts leave no room for `max_new_tokens` in the model's context."""
    context = context_length(model)
    if context is None:
        return []
    return [row for row, prompt in enumerate(ids) if len(prompt) + max_new_tokens > context]


def check_room(
    ids: Sequence[list[int]],
    model: Any,
    max_new_tokens: int,
    token_budget: int,
    numbers: Sequence[int] | None = None,
) -> None:
    """Refuse prompts that leave no room for a completion.

    Args:
        ids: Token ids of each prompt.
        model: A causal language model of transformers, or a `vllm.LLM`.
        max_new_tokens: Tokens of a completion.
        token_budget: Tokens held at once; not checked for vLLM.
        numbers: What to call the prompts.

    Raises:
        ValueError: A prompt is too long for the context, or for the budget.
    """
    numbers = range(len(ids)) if numbers is None else numbers
    if long := too_long(ids, model, max_new_tokens):
        raise ValueError(
            f"{len(long)} prompts (first: prompt {numbers[long[0]]}, {len(ids[long[0]])} tokens) "
            f"leave no room for max_new_tokens={max_new_tokens} in a context of "
            f"{context_length(model)}. Lower `max_new_tokens` or drop those rows."
        )
    longest = max(map(len, ids), default=0)
    if isinstance(model, torch.nn.Module) and longest + max_new_tokens > token_budget:
        raise ValueError(
            f"`token_budget` of {token_budget} is less than one prompt of {longest} tokens and a "
            f"completion of {max_new_tokens}. Raise it, or lower `max_new_tokens`."
        )
