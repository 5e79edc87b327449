"""Which prompts the engine can decode of a model: tried out before the first step.

The engine replaces a model's attention, keeps keys and values and nothing else, and puts rows of
all lengths into one batch. A trial decodes two short rows that way, beside each other and at the
first and the last positions that the prompts reach. Its logits must be those of plain forwards over
each row alone, up to the rounding of the model's precision:

    ||ours - model's|| <= 4 sqrt(eps) ||model's - mean||     over the vocabulary and the steps
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llmmix.models import configs_of
from llmmix.positions import rope_switches
from llmmix.precision import evaluating, rounding
from llmmix.sampling.kv_cache import SharedPromptCache, Unservable, next_logits
from llmmix.sampling.requests import PromptRequest, SamplingOptions

PROMPTS = (3, 5)  # tokens of the prompts of the trial's rows, where nothing asks for more
STEPS = 4  # tokens that follow each


def assigned(
    model: PreTrainedModel, wanted: Sequence[PromptRequest], options: SamplingOptions
) -> Iterator[tuple[list[PromptRequest], str | None]]:
    """Prompts that may share the engine's batches, with None; or others, with why they may not.

    Where the longest row of a batch changes the positions of all (long RoPE), rows that stay below
    that length, rows that begin beyond it and rows that pass it are apart.
    """
    switches = rope_switches(model)
    groups: dict[tuple[int, ...], list[PromptRequest]] = {}
    for prompt in wanted:
        first, last = len(prompt.ids), len(prompt.ids) + options.max_new_tokens - 1
        key = tuple((first > switch) + (last > switch) for switch in switches)
        groups.setdefault(key, []).append(prompt)
    for key, prompts in groups.items():
        if 1 in key:
            passed = switches[key.index(1)]
            yield prompts, f"its positions change where a row passes {passed} tokens"
        else:
            begin = max((s for s, of_rows in zip(switches, key, strict=True) if of_rows), default=0)
            yield prompts, why_not(model, prompts, options, begin)


def why_not(
    model: PreTrainedModel,
    wanted: Sequence[PromptRequest],
    options: SamplingOptions,
    begin: int = 0,
) -> str | None:
    """Why the engine cannot decode these prompts beside each other; None where it can.

    Args:
        model: A causal language model of transformers.
        wanted: Prompts.
        options: How they are to be sampled.
        begin: The first position at which the trial may stand.
    """
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "its layers stand on several devices"
    longest = max(len(prompt.ids) for prompt in wanted) + options.max_new_tokens - 1
    if _numbers_named(model, "attention_chunk_size", below=longest):
        return "it attends in chunks"
    try:
        with evaluating(model), torch.inference_mode():
            return _tried(model, _rows(model, wanted, begin, longest))
    except Unservable as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model with an attention of its own may break anywhere
        says = (str(error).splitlines() or [""])[0]
        return f"a trial step ends in {type(error).__name__}: {says}"


@dataclass
class _Row:
    """A row of the trial: its tokens, and the position of the first."""

    ids: Tensor
    start: int

    def logits(self, model: PreTrainedModel, stop: int, **options: Any) -> Tensor:
        """The model's own logits of the first tokens."""
        if self.start:  # else the model numbers them, as it does when it reads a prompt
            at = torch.arange(self.start, self.start + stop, device=self.ids.device)
            options["position_ids"] = at[None]
        return model(input_ids=self.ids[None, :stop], **options).logits[0]


def _rows(
    model: PreTrainedModel, wanted: Sequence[PromptRequest], begin: int, longest: int
) -> list[_Row]:
    """Two rows: one at the beginning, and one at the end, which is longer than any window."""
    window = max(_numbers_named(model, "window", "topk", below=longest), default=0)
    sizes = (PROMPTS[0] + STEPS, max(PROMPTS[1], min(window + 2, longest - STEPS)) + STEPS)
    vocabulary = model.config.get_text_config().vocab_size
    # Tokens of the prompts, each once: one that is repeated looks alike from everywhere
    tokens = dict.fromkeys(chain(*(prompt.ids[:64] for prompt in wanted[:64]), range(99)))
    known = [token for token in tokens if token < vocabulary]
    starts = (begin, max(begin, longest - sizes[1]))
    return [
        _Row(torch.tensor(list(islice(cycle(known), size)), device=model.device), start)
        for size, start in zip(sizes, starts, strict=True)
    ]


def _tried(model: PreTrainedModel, rows: Sequence[_Row]) -> str | None:
    """What is wrong with the engine's logits of two rows beside each other; None if nothing is."""
    prompts = [len(row.ids) - STEPS for row in rows]
    cache = SharedPromptCache(len(rows), len(rows), max(prompts), STEPS)
    whole, ours = [], []
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        logits = row.logits(model, len(row.ids), use_cache=False, logits_to_keep=STEPS + 1)
        whole.append(logits[-STEPS - 1 :])
        computed = DynamicCache()
        ours.append([row.logits(model, prompt, past_key_values=computed, logits_to_keep=1)[-1]])
        cache.put_prompt(place, computed)
    if not all(logits.float().softmax(-1).isfinite().all() for logits in whole):
        return None  # no engine can sample it, and the first draw says so
    device, configs = model.device, configs_of(model)
    places = torch.arange(len(rows), device=device)
    ends = torch.tensor([row.start + n for row, n in zip(rows, prompts, strict=True)]).to(device)
    for step in range(STEPS):
        read = [row.ids[prompt + step] for row, prompt in zip(rows, prompts, strict=True)]
        lengths = torch.full_like(places, step)
        step_logits = next_logits(model, configs, cache, places, torch.stack(read), ends, lengths)
        for found, logits in zip(ours, step_logits, strict=True):
            found.append(logits)
    error = max(
        _relative_error(torch.stack(found), truth) for found, truth in zip(ours, whole, strict=True)
    )
    if error <= 4 * rounding(cache.dtype, device) ** 0.5:  # false for NaN too
        return None
    return f"its logits come out wrong by {error:.2g} of their spread"


def _relative_error(found: Tensor, truth: Tensor) -> float:
    """Distance of log-probabilities from the true ones, over the spread of these."""
    # Below -80 a token has no weight in a draw
    found, truth = (x.double().log_softmax(-1).clamp(min=-80) for x in (found, truth))
    spread = (truth - truth.mean(-1, keepdim=True)).norm()
    return ((found - truth).norm() / spread.clamp(min=1e-6)).item()


def _numbers_named(model: PreTrainedModel, *parts: str, below: int) -> list[int]:
    """Whole numbers in the configurations under names with one of these parts, below a length."""
    return [
        value
        for config in configs_of(model)
        for name, value in vars(config).items()
        if type(value) is int and 0 < value < below and any(part in name for part in parts)
    ]
