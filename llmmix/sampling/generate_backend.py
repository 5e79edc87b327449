"""`llmmix.sampling.sample` on the `generate` of transformers, for what the engine cannot decode.

Prompts of one length make a batch, so that nothing is padded: padding would change the state of a
recurrent model, and the positions of one whose positions depend on the longest row. The draws are
the engine's, from the stream of each completion. What is slow: each completion computes its prompt
anew, and a batch goes on until its last completion ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmmix.precision import evaluating
from llmmix.rows.prompts import stop_tokens
from llmmix.sampling.requests import Completion, PromptRequest, SamplingOptions
from llmmix.sampling.token_draws import draw, probabilities, uniforms


def sample_by_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[PromptRequest],
    options: SamplingOptions,
) -> Iterator[Completion]:
    """Draw what is wanted, a batch at a time; a batch holds as many rows as the budget lets it."""
    lengths = sorted({len(prompt.ids) for prompt in wanted})
    for length in lengths:
        alike = [prompt for prompt in wanted if len(prompt.ids) == length]
        rows = [(prompt, sample) for prompt in alike for sample in prompt.samples]
        size = max(1, options.token_budget // (length + options.max_new_tokens))
        for start in range(0, len(rows), size):
            yield from _batch(model, tokenizer, rows[start : start + size], options)


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[PromptRequest, int]],
    options: SamplingOptions,
) -> Iterator[Completion]:
    """Completions of prompts of one length."""
    stop = stop_tokens(model, tokenizer)
    ids = torch.tensor([prompt.ids for prompt, _ in rows], device=model.device)
    streams = np.stack(
        [uniforms(options.seed, p.number, s, options.max_new_tokens) for p, s in rows]
    )
    draws = _Draws(torch.from_numpy(streams).to(model.device), options)
    with evaluating(model), _plain_generation(model) as config:
        config.max_new_tokens = options.max_new_tokens
        config.eos_token_id = sorted(stop) or None
        config.pad_token_id = min(stop, default=0)  # what follows a row that has ended
        generated: Any = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([draws]),
        )
    for (prompt, sample), drawn in zip(rows, generated[:, ids.size(1) :].tolist(), strict=True):
        ends = [at for at, token in enumerate(drawn) if token in stop]
        tokens = drawn[: ends[0]] if ends else drawn
        text = cast(str, tokenizer.decode(tokens, skip_special_tokens=True))
        yield Completion(prompt.number, sample, text, len(tokens), bool(ends))


class _Draws(LogitsProcessor):
    """Leaves one token a row, which `generate` then takes for the most probable.

    Args:
        streams: (R, max_new_tokens) uniforms in fp64.
        options: How to sample.
    """

    def __init__(self, streams: Tensor, options: SamplingOptions):
        self.streams, self.options, self.step = streams, options, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (R, V) that are 0 for the token that is drawn and -inf elsewhere."""
        u = self.streams[:, self.step].contiguous()
        self.step += 1
        drawn = draw(probabilities(scores, self.options), u)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[GenerationConfig]:
    """Settings for `generate` under which the logits are the model's own.

    What is unset there is taken from the model's settings, which may penalize or suppress tokens.
    """
    config: Any = GenerationConfig()
    holders: list[Any] = [model, getattr(model, "get_base_model", lambda: model)()]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield config
    finally:
        for holder, settings in zip(holders, before, strict=True):
            holder.generation_config = settings
