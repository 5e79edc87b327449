"""The decoding loop on transformers: rows start, decode side by side and make way when they end."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from llmmix.models import configs_of
from llmmix.precision import evaluating
from llmmix.rows.prompts import stop_tokens
from llmmix.sampling.kv_cache import SharedPromptCache, next_logits
from llmmix.sampling.requests import Completion, PromptRequest, SamplingOptions
from llmmix.sampling.token_draws import draw, probabilities, uniforms

ROWS_STARTED_AT_ONCE = 1024


@dataclass
class _Prompt:
    """A prompt whose keys and values are in the cache."""

    request: PromptRequest
    place: int
    unstarted: list[int]  # samples
    running: int = 0  # samples


@dataclass
class _Row:
    """A completion that is being decoded."""

    prompt: _Prompt
    sample: int
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Decodes what is wanted of a model; rows [0, len(rows)) of the cache are alive.

    Args:
        model: A causal language model that `servability.why_not` has no objection to.
        tokenizer: The model's tokenizer.
        wanted: Prompts, one or more, and their samples.
        options: How to sample.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        wanted: Sequence[PromptRequest],
        options: SamplingOptions,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.stop = stop_tokens(model, tokenizer)
        self.configs = configs_of(model)
        longest = max(len(prompt.ids) for prompt in wanted)
        self.capacity, places = _capacity(options, [len(p.samples) for p in wanted], longest)
        # The last token of a completion is never read, so it needs no key
        own = max(1, options.max_new_tokens - 1)
        self.cache = SharedPromptCache(self.capacity, places, longest, own)
        self.free = list(range(places))[::-1]
        self.waiting = deque(wanted)
        # The prompt whose samples are being started, and the weights of their first token
        self.open: tuple[_Prompt, Tensor] | None = None
        self.rows: list[_Row] = []
        device = model.device
        self.places = torch.zeros(self.capacity, dtype=torch.long, device=device)
        self.inputs = torch.zeros_like(self.places)  # last token of each row
        self.lengths = torch.zeros_like(self.places)  # keys of each row, without its prompt's
        self.starts = torch.zeros_like(self.places)  # tokens of each row's prompt
        self.uniforms = torch.zeros(
            self.capacity, options.max_new_tokens, dtype=torch.float64, device=device
        )

    def run(self) -> Iterator[Completion]:
        """Start rows, decode, retire rows, until none is left.

        Raises:
            ValueError: The model gives NaN or infinity.
        """
        while True:
            with evaluating(self.model), torch.inference_mode():
                finished = self._admit()
                if self.rows:
                    finished += self._step()
            yield from finished
            if not (self.rows or self.open or self.waiting):
                return

    def _admit(self) -> list[Completion]:
        """Fill the free rows; what stops or is cut at its first token is finished here."""
        finished: list[Completion] = []
        # Where all stop at their first token, what is finished is handed over before more starts
        while len(self.rows) < self.capacity and len(finished) < ROWS_STARTED_AT_ONCE:
            if self.open is None:
                if not (self.waiting and self.free):
                    break
                self.open = self._prefill(self.waiting.popleft(), self.free.pop())
            prompt, weights = self.open
            room = min(self.capacity - len(self.rows), ROWS_STARTED_AT_ONCE)
            samples, prompt.unstarted = prompt.unstarted[:room], prompt.unstarted[room:]
            finished += self._start(prompt, samples, weights)
            if not prompt.unstarted:
                self.open = None
                self._release(prompt)
        return finished

    def _prefill(self, request: PromptRequest, place: int) -> tuple[_Prompt, Tensor]:
        """Compute a prompt once, for all of its samples."""
        computed = DynamicCache()
        ids = torch.tensor([request.ids], device=self.model.device)
        logits = self.model(input_ids=ids, past_key_values=computed, logits_to_keep=1).logits
        weights = probabilities(logits[:, -1], self.options)
        self.cache.put_prompt(place, computed)
        return _Prompt(request, place, list(request.samples)), weights

    def _start(self, prompt: _Prompt, samples: list[int], weights: Tensor) -> list[Completion]:
        """Draw the first token of some samples; those that go on become rows."""
        seed, number, length = self.options.seed, prompt.request.number, len(prompt.request.ids)
        count = self.options.max_new_tokens
        drawn = np.stack([uniforms(seed, number, sample, count) for sample in samples])
        streams = torch.from_numpy(drawn).to(self.uniforms.device)
        tokens = draw(weights.expand(len(samples), -1), streams[:, 0].contiguous()).tolist()
        finished = []
        for sample, stream, token in zip(samples, streams, tokens, strict=True):
            row = _Row(prompt, sample)
            prompt.running += 1
            if (completion := self._take(row, token)) is not None:
                finished.append(completion)
                continue
            at = len(self.rows)
            self.rows.append(row)
            self.places[at], self.inputs[at], self.lengths[at] = prompt.place, token, 0
            self.starts[at], self.uniforms[at] = length, stream
        return finished

    def _step(self) -> list[Completion]:
        """Draw one token for every row."""
        count = len(self.rows)
        state = (self.places, self.inputs, self.starts, self.lengths)
        logits = next_logits(
            self.model, self.configs, self.cache, *(of_row[:count] for of_row in state)
        )
        weights = probabilities(logits, self.options)
        self.lengths[:count] += 1
        u = self.uniforms[:count].gather(1, self.lengths[:count, None]).squeeze(1)
        drawn = draw(weights, u)
        self.inputs[:count] = drawn
        finished, left = [], []
        for at, (row, token) in enumerate(zip(self.rows, drawn.tolist(), strict=True)):
            if (completion := self._take(row, token)) is not None:
                finished.append(completion)
                left.append(at)
        for at in reversed(left):
            self._leave(at)
        return finished

    def _take(self, row: _Row, token: int) -> Completion | None:
        """Add a drawn token to a row; the completion, where this ends it."""
        stopped = token in self.stop
        if not stopped:
            row.tokens.append(token)
            if len(row.tokens) < self.options.max_new_tokens:
                return None
        row.prompt.running -= 1
        self._release(row.prompt)
        # Declared as a list too, which only a batch gives
        text = cast(str, self.tokenizer.decode(row.tokens, skip_special_tokens=True))
        number = row.prompt.request.number
        return Completion(number, row.sample, text, len(row.tokens), stopped)

    def _release(self, prompt: _Prompt) -> None:
        """Give a prompt's place back once nothing reads it any more."""
        is_open = self.open is not None and self.open[0] is prompt
        if not (prompt.running or prompt.unstarted or is_open):
            self.free.append(prompt.place)

    def _leave(self, at: int) -> None:
        """Put the last row in the place of a finished one."""
        last = len(self.rows) - 1
        if at != last:
            self.rows[at] = self.rows[last]
            self.cache.move(last, at)
            for state in (self.places, self.inputs, self.lengths, self.starts, self.uniforms):
                state[at] = state[last]
        self.rows.pop()


def _capacity(options: SamplingOptions, samples: list[int], longest: int) -> tuple[int, int]:
    """Rows, and places for prompts, that fit into the budget.

    Args:
        options: Sampling options, with the token budget.
        samples: Number of samples wanted of each prompt.
        longest: Tokens of the longest prompt.
    """
    own, each = options.max_new_tokens, -(-sum(samples) // len(samples))

    def places(rows: int) -> int:
        # Twice the prompts that the rows fill, for stragglers, and two more
        return min(len(samples), rows, 2 * -(-rows // each) + 2)

    def fits(rows: int) -> bool:
        return rows * own + places(rows) * longest <= options.token_budget

    rows = 1
    while rows < sum(samples) and fits(rows + 1):
        rows += 1
    return rows, places(rows)
