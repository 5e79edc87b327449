"""What is asked of a sampler, and what it answers: checked once, read by every backend."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmmix.models import context_length


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
    """What `sample` was asked for, checked."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    num_samples: int
    token_budget: int


@dataclass
class PromptRequest:
    """A prompt, and which of its samples are still to be started."""

    number: int
    ids: list[int]
    samples: list[int]
    running: int = 0
    probabilities: Tensor | None = None  # of the first token


def too_long(ids: Sequence[list[int]], model, max_new_tokens: int) -> list[int]:
    """Which prompts leave no room for `max_new_tokens` in the model's context."""
    context = context_length(model)
    if context is None:
        return []
    return [row for row, prompt in enumerate(ids) if len(prompt) + max_new_tokens > context]


def check_room(
    ids: Sequence[list[int]],
    model,
    max_new_tokens: int,
    token_budget: int,
    numbers: Sequence[int] | None = None,
) -> None:
    """Refuse prompts that leave no room for a completion.

    Args:
        ids: Token ids of each prompt.
        model: A causal language model or a `vllm.LLM`.
        max_new_tokens: Tokens of a completion.
        token_budget: Tokens held at once; not vLLM's.
        numbers: What to call the prompts.

    Raises:
        ValueError: A prompt too long for the context or for the budget.
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
