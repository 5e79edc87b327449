"""Attention of many completions to few prompts: the keys and values of a prompt are held once.

    softmax(q [K_prompt; K_own]^T) [V_prompt; V_own]

A decoding step scores the queries of all completions of a prompt against its keys in one matrix
product, and each query against the keys of its own completion; one softmax spans both. Completions
start at any step, and each has as many keys as it has tokens: nothing is padded but the longest
length of the moment.

The model calls it through transformers' attention interface, under the name of `ATTENTION`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel

from llmmix.precision import operand_dtype

ATTENTION = "llmmix_shared_prompt"


class Unservable(ValueError):
    """A model that cannot attend this way; says why, of "it"."""


class SharedPromptCache:
    """Keys and values of up to `prompts` prompts and `rows` completions of them.

    Args:
        rows: Completions at once.
        prompts: Prompts at once.
        prompt_length: Tokens of the longest prompt.
        completion_length: Tokens of the longest completion.
    """

    def __init__(self, rows: int, prompts: int, prompt_length: int, completion_length: int):
        self.rows, self.prompts = rows, prompts
        self.prompt_length, self.completion_length = prompt_length, completion_length
        self.dtype = torch.float32  # of the products; known from the first step on
        # By layer: keys and values (place, heads, tokens, head size), of prompts and completions
        self._prompt: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        self._prompt_lengths = torch.zeros(prompts, dtype=torch.long)  # moved with the first prompt

    def put_prompt(self, place: int, computed: DynamicCache) -> None:
        """Take over what the model computed for one prompt (a batch of one).

        Raises:
            Unservable: The model did not leave keys and values, but another state or none.
        """
        layers = computed.layers
        if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
            raise Unservable("it keeps no keys and values")
        given = [_keys_and_values(layer) for layer in layers]
        if not self._own:
            self._allocate(given)
        for sources, buffers in zip(given, self._prompt, strict=True):
            for source, buffer in zip(sources, buffers, strict=True):
                buffer[place, :, : source.size(2)] = source[0]
        self._prompt_lengths[place] = computed.get_seq_length()

    def _allocate(self, computed: list[tuple[Tensor, Tensor]]) -> None:
        def zeros(like: Tensor, places: int, tokens: int) -> Tensor:
            # Zeros, since what stands behind a prompt's end is multiplied by a weight of zero
            return like.new_zeros(places, like.size(1), tokens, like.size(3))

        places, tokens = self.prompts, self.prompt_length
        self._prompt = [(zeros(k, places, tokens), zeros(v, places, tokens)) for k, v in computed]
        places, tokens = self.rows, self.completion_length
        self._own = [(zeros(k, places, tokens), zeros(v, places, tokens)) for k, v in computed]
        device = computed[0][0].device
        self._prompt_lengths = torch.zeros(self.prompts, dtype=torch.long, device=device)

    def move(self, source: int, target: int) -> None:
        """Copy one completion's keys and values to another row."""
        for buffers in self._own:
            for buffer in buffers:
                buffer[target] = buffer[source]

    def begin_step(self, places: Tensor, lengths: Tensor) -> None:
        """Say which prompt each of the first rows completes, and how many keys each has so far.

        Args:
            places: (R,) place of the prompt of each row.
            lengths: (R,) keys that the row holds; this step writes the next one.
        """
        self._row = torch.arange(len(places), device=places.device)
        self._places, self._lengths = places, lengths
        self._longest = int(lengths.max()) + 1
        # The rows of each prompt side by side: members[i, j] is row j of the i-th prompt in use
        self._used, prompt, counts = places.unique(return_inverse=True, return_counts=True)
        order = prompt.argsort(stable=True)
        numbers = self._row - (counts.cumsum(0) - counts)[prompt[order]]
        self._number = torch.empty_like(order).scatter(0, order, numbers)
        self._prompt_of_row = prompt
        self._members = order.new_zeros(len(counts), int(counts.max()))
        self._members[prompt, self._number] = self._row
        self._masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(R, 1, 1, prompt + own) 0 where a key is seen and -inf elsewhere."""
        if window not in self._masks:
            device = self._lengths.device
            prompt = self._prompt_lengths[self._places].unsqueeze(1)
            own = self._lengths.unsqueeze(1)
            at_prompt = torch.arange(self.prompt_length, device=device)
            at_own = torch.arange(self._longest, device=device)
            seen = torch.cat([at_prompt < prompt, at_own <= own], 1)
            if window is not None:
                # the query stands at prompt + own
                distance = torch.cat([prompt + own - at_prompt, own - at_own], 1)
                seen &= distance < window
            mask = torch.zeros(seen.shape, dtype=dtype, device=device)
            self._masks[window] = mask.masked_fill(~seen, -torch.inf)[:, None, None]
        return self._masks[window]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Write the step's keys and values, and attend.

        Args:
            layer: Number of the layer.
            query: (R, heads, 1, D), one token a row.
            key: (R, key heads, 1, D).
            value: (R, key heads, 1, D).
            scaling: Factor of the scores.
            softcap: Gemma's bound of the scores, if any.
            window: Keys further back than this are not seen, if given.

        Returns:
            (R, 1, heads, D).
        """
        self._hold_in(operand_dtype(value), layer)
        keys, values = self._own[layer]
        prompt_keys, prompt_values = self._prompt[layer]
        if len(self._used) < self.prompts:
            prompt_keys, prompt_values = prompt_keys[self._used], prompt_values[self._used]
        keys[self._row, :, self._lengths] = key[:, :, 0].to(keys.dtype)
        values[self._row, :, self._lengths] = value[:, :, 0].to(values.dtype)
        rows, heads, size = query.size(0), keys.size(1), query.size(3)
        query = (query.view(rows, heads, -1, size) * scaling).to(keys.dtype)
        of_prompt = self._by_row(self._by_prompt(query) @ prompt_keys.transpose(-1, -2))
        of_own = query @ keys[:rows, :, : self._longest].transpose(-1, -2)
        scores = torch.cat([of_prompt, of_own], -1)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        scores = scores + self._mask(window, scores.dtype)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        of_prompt, of_own = weights.split([self.prompt_length, self._longest], -1)
        out = of_own @ values[:rows, :, : self._longest]
        out += self._by_row(self._by_prompt(of_prompt) @ prompt_values)
        return out.view(rows, 1, -1, value.size(3))

    def _hold_in(self, dtype: torch.dtype, layer: int) -> None:
        """Hold a layer in the precision of its products.

        A prompt's keys and values come in fp32 under autocast, which would round all of them anew
        at each step.
        """
        self.dtype = dtype
        for held in (self._prompt, self._own):
            keys, values = held[layer]
            held[layer] = (keys.to(dtype), values.to(dtype))

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(R, heads, group, X) to (prompts in use, heads, members * group, X)."""
        x = x[self._members].transpose(1, 2)
        return x.reshape(*x.shape[:2], -1, x.size(-1))

    def _by_row(self, x: Tensor) -> Tensor:
        """(prompts in use, heads, members * group, X) back to (R, heads, group, X)."""
        prompts, heads, _, size = x.shape
        x = x.view(prompts, heads, self._members.size(1), -1, size)
        return x[self._prompt_of_row, :, self._number]


def _keys_and_values(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache layer, which transformers declares as possibly absent."""
    return layer.keys, layer.values


def next_logits(
    model: PreTrainedModel,
    configs: Sequence[PreTrainedConfig],
    cache: SharedPromptCache,
    places: Tensor,
    inputs: Tensor,
    starts: Tensor,
    lengths: Tensor,
) -> Tensor:
    """(R, V) logits of the next token of every row; what is read joins the row's keys.

    Args:
        model: The model whose prompts are in the cache.
        configs: Its `llmmix.models.configs_of`.
        cache: Keys and values.
        places: (R,) place of the prompt of each row.
        inputs: (R,) last token of each row, which is read.
        starts: (R,) position of each row's first token behind its prompt.
        lengths: (R,) keys that the row holds.
    """
    cache.begin_step(places, lengths)
    with _attention_named(configs, ATTENTION):
        return model(
            input_ids=inputs[:, None],
            position_ids=(starts + lengths)[:, None],
            use_cache=False,
            shared_prompt_cache=cache,
        ).logits[:, -1]


@contextmanager
def _attention_named(configs: Sequence[PreTrainedConfig], name: str) -> Iterator[None]:
    """Put another attention into the configurations of a model, and restore theirs at the end."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    cache: SharedPromptCache = kwargs["shared_prompt_cache"]
    if kwargs.get("s_aux") is not None:
        raise Unservable("it has attention sinks")
    if attention_mask is not None:
        raise Unservable("it says by a mask of its own which keys are seen")
    out = cache.attend(
        module.layer_idx,
        query,
        key,
        value,
        query.size(-1) ** -0.5 if scaling is None else scaling,
        kwargs.get("softcap"),
        kwargs.get("sliding_window"),
    )
    return out, None


AttentionInterface.register(ATTENTION, _attention)
