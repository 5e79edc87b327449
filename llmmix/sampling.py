"""N completions a prompt, fast: a prompt is computed once, and a finished row makes way at once.

Every completion has a random stream of its own, drawn by a counter from (seed, prompt, sample): it
does not depend on what is decoded beside it, on the number of processes, or on what was sampled
before. Two runs differ only where rounding, which does depend on the batch, tips a draw that falls
within it of the edge between two tokens: about one token in a million in fp32, more in bf16.

    token = the first whose cumulative probability exceeds u,   u uniform of (seed, prompt, sample)
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from llmmix.kv_cache import ATTENTION, SharedPromptCache


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


def sample(
    model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    num_samples: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    token_budget: int = 16384,
    numbers: Sequence[int] | None = None,
    done: Collection[tuple[int, int]] = (),
) -> Iterator[Completion]:
    """Draw completions, yielding each when it is finished.

    Args:
        model: A causal language model of transformers, whose mode and attention are put back at the
            end, or a `vllm.LLM`.
        tokenizer: Its tokenizer; it needs no pad token, since nothing is padded.
        prompts: Text, or lists of chat messages.
        num_samples: Completions a prompt.
        temperature: Divisor of the logits, positive.
        top_p: Nucleus mass in (0, 1]; 1 samples from the whole distribution.
        max_new_tokens: Tokens after which a completion is cut.
        seed: Of the draws, 0 or above.
        token_budget: Tokens of prompts and completions whose keys and values are held at once; it
            bounds the memory and decides how many completions run side by side. vLLM has its own.
        numbers: What to call the prompts, which decides their random streams: 0, 1, ... by default.
        done: Pairs (prompt, sample) that are not wanted.

    Raises:
        ValueError: A temperature, nucleus or seed out of range, a prompt that is
            empty or leaves no room for a completion, a budget below one completion, or a model that
            cannot be decoded this way.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must lie in (0, 1], got {top_p}.")
    if min(num_samples, max_new_tokens) < 1:
        raise ValueError(
            f"`num_samples` and `max_new_tokens` must be 1 or more, got {num_samples} and "
            f"{max_new_tokens}."
        )
    if seed < 0:
        raise ValueError(f"`seed` must be 0 or above, got {seed}.")
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    numbers = range(len(ids)) if numbers is None else numbers
    if empty := [number for number, row in zip(numbers, ids, strict=True) if not row]:
        raise ValueError(f"{len(empty)} prompts have no token (first: prompt {empty[0]}).")
    done = set(done)
    wanted = [
        (number, row, [s for s in range(num_samples) if (number, s) not in done])
        for number, row in zip(numbers, ids, strict=True)
    ]
    wanted = [PromptRequest(*given) for given in wanted if given[2]]
    options = SamplingOptions(temperature, top_p, max_new_tokens, seed, num_samples, token_budget)
    check_room(ids, model, max_new_tokens, token_budget, numbers)
    if not isinstance(model, torch.nn.Module):
        from llmmix.vllm_backend import sample_vllm

        yield from sample_vllm(model, wanted, options)
        return
    if wanted:
        yield from _Engine(model, tokenizer, wanted, options).run()


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str | list[dict], *, generation: bool = True
) -> list[int]:
    """Token ids of text, or of messages under the chat template.

    Args:
        tokenizer: With a chat template where `text` is messages.
        text: Plain text or messages.
        generation: Whether the assistant's turn is opened at the end of messages.
    """
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template(
        text, add_generation_prompt=generation, tokenize=True, return_dict=True
    )["input_ids"]


def context_length(model) -> int | None:
    """Tokens that a model, or a `vllm.LLM`, reads at once, if it says so."""
    if not isinstance(model, torch.nn.Module):
        return model.llm_engine.model_config.max_model_len
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """The random stream of one completion: the first `count` uniforms in [0, 1)."""
    return np.random.Generator(
        np.random.Philox(key=[seed, prompt], counter=[0, 0, sample, 0])
    ).random(count)


@dataclass
class _Row:
    prompt: PromptRequest
    place: int
    sample: int
    tokens: list[int] = field(default_factory=list)


ROWS_STARTED_AT_ONCE = 1024


class _Engine:
    """The decoding loop: rows [0, len(rows)) of the cache are alive."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        wanted: list[PromptRequest],
        options: SamplingOptions,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise self._refusal("its layers stand on several devices")
        if getattr(model.config.get_text_config(), "attention_chunk_size", None):
            raise self._refusal("it attends in chunks")
        self.stop = _stop_tokens(model, tokenizer)
        configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
        self.configs = list({id(config): config for config in configs}.values())
        self.waiting = deque(wanted)
        longest = max(len(prompt.ids) for prompt in wanted)
        self.capacity, places = _capacity(options, [len(p.samples) for p in wanted], longest)
        # The last token of a completion is never read, so it needs no key
        own = max(1, options.max_new_tokens - 1)
        self.cache = SharedPromptCache(self.capacity, places, longest, own)
        self.free = list(range(places))[::-1]
        self.rows: list[_Row] = []
        self.open: tuple[PromptRequest, int] | None = (
            None  # the prompt whose samples are being started
        )
        device = model.device
        self.places = torch.zeros(self.capacity, dtype=torch.long, device=device)
        self.inputs = torch.zeros_like(self.places)  # last token of each row
        self.lengths = torch.zeros_like(self.places)  # keys of each row, its prompt's aside
        self.starts = torch.zeros_like(self.places)  # tokens of each row's prompt
        self.uniforms = torch.zeros(
            self.capacity, options.max_new_tokens, dtype=torch.float64, device=device
        )

    def run(self) -> Iterator[Completion]:
        """Start rows, decode, retire rows, until none is left."""
        checked = False
        while True:
            with eval_mode(self.model), torch.inference_mode():
                finished = self._admit()
                if self.rows and not checked:
                    self._check_decoding()
                    checked = True
                if self.rows:
                    finished += self._step()
            yield from finished
            if not (self.rows or self.open or self.waiting):
                return

    def _admit(self) -> list[Completion]:
        """Fill the free rows; what stops or is cut at its first token is finished here."""
        finished = []
        # Where all stop at their first token, what is finished is handed over before more starts
        while len(self.rows) < self.capacity and len(finished) < ROWS_STARTED_AT_ONCE:
            if self.open is None:
                if not (self.waiting and self.free):
                    break
                self.open = self._prefill(self.waiting.popleft(), self.free.pop())
            prompt, place = self.open
            room = min(self.capacity - len(self.rows), ROWS_STARTED_AT_ONCE)
            samples, prompt.samples = prompt.samples[:room], prompt.samples[room:]
            streams = torch.from_numpy(
                np.stack(
                    [
                        uniforms(self.options.seed, prompt.number, s, self.options.max_new_tokens)
                        for s in samples
                    ]
                )
            ).to(self.uniforms.device)
            tokens = _draw(
                prompt.probabilities.expand(len(samples), -1), streams[:, 0].contiguous()
            ).tolist()
            for sample_number, stream, token in zip(samples, streams, tokens, strict=True):
                row = _Row(prompt, place, sample_number)
                prompt.running += 1
                if (completion := self._take(row, token)) is not None:
                    finished.append(completion)
                    continue
                at = len(self.rows)
                self.rows.append(row)
                self.places[at], self.inputs[at], self.lengths[at] = place, token, 0
                self.starts[at], self.uniforms[at] = len(prompt.ids), stream
            if not prompt.samples:
                prompt.probabilities = self.open = None
                self._release(prompt, place)
        return finished

    def _prefill(self, prompt: PromptRequest, place: int) -> tuple[PromptRequest, int]:
        computed = DynamicCache()
        ids = torch.tensor([prompt.ids], device=self.model.device)
        logits = self.model(input_ids=ids, past_key_values=computed, logits_to_keep=1).logits
        prompt.probabilities = _probabilities(logits[:, -1], self.options)
        layers = computed.layers  # none, or without keys, where the model's state is another one
        if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
            raise self._refusal("it keeps no keys and values")
        self.cache.put_prompt(place, computed)
        return prompt, place

    def _step(self) -> list[Completion]:
        """One token of every row."""
        count = len(self.rows)
        probabilities = _probabilities(self._logits(), self.options)
        self.lengths[:count] += 1
        u = self.uniforms[:count].gather(1, self.lengths[:count, None]).squeeze(1)
        drawn = _draw(probabilities, u)
        self.inputs[:count] = drawn
        finished, left = [], []
        for at, (row, token) in enumerate(zip(self.rows, drawn.tolist(), strict=True)):
            if (completion := self._take(row, token)) is not None:
                finished.append(completion)
                left.append(at)
        for at in reversed(left):
            self._leave(at)
        return finished

    def _logits(self) -> Tensor:
        count = len(self.rows)
        self.cache.begin_step(self.places[:count], self.lengths[:count])
        with _attention(self.configs, ATTENTION):
            return self.model(
                input_ids=self.inputs[:count, None],
                position_ids=(self.starts[:count] + self.lengths[:count])[:, None],
                use_cache=False,
                shared_prompt_cache=self.cache,
            ).logits[:, -1]

    def _take(self, row: _Row, token: int) -> Completion | None:
        """Add a drawn token to a row; the completion, where this ends it."""
        stopped = token in self.stop
        if not stopped:
            row.tokens.append(token)
            if len(row.tokens) < self.options.max_new_tokens:
                return None
        row.prompt.running -= 1
        self._release(row.prompt, row.place)
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Completion(row.prompt.number, row.sample, text, len(row.tokens), stopped)

    def _release(self, prompt: PromptRequest, place: int) -> None:
        """Give a prompt's place back once nothing reads it any more."""
        if not prompt.running and not prompt.samples and (self.open or (None,))[0] is not prompt:
            self.free.append(place)

    def _leave(self, at: int) -> None:
        """The last row takes the place of a finished one."""
        last = len(self.rows) - 1
        if at != last:
            self.rows[at] = self.rows[last]
            self.cache.move(last, at)
            for state in (self.places, self.inputs, self.lengths, self.starts, self.uniforms):
                state[at] = state[last]
        self.rows.pop()

    def _check_decoding(self) -> None:
        """Refuse a model whose state is more than what its attention layers are given."""
        row = self.rows[0]
        ids = torch.tensor([[*row.prompt.ids, *row.tokens]], device=self.model.device)
        truth = self.model(input_ids=ids, logits_to_keep=1).logits[:, -1]
        ours = self._logits()[:1]
        distance = (truth.float().softmax(-1) - ours.float().softmax(-1)).abs().sum().item() / 2
        # Half precision rounds logits of 32 and above to a quarter; NaN is refused too
        if not distance < (0.05 if ours.dtype == torch.float32 else 0.25):
            raise self._refusal(
                f"its next-token distribution comes out wrong by {distance:.2f} in total variation"
            )

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"{type(self.model).__name__} cannot be decoded by llmmix's engine, which needs "
            f"plain attention in every layer: {why}. Sample it with vLLM (`backend` 'vllm')."
        )


def _capacity(options: SamplingOptions, samples: list[int], longest: int) -> tuple[int, int]:
    """Rows, and places for prompts, that fit into the budget.

    Args:
        options: With the budget.
        samples: Wanted of each prompt.
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


def _probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """(R, V) fp32, not normalised: exp((logits - max) / temperature), the tail cut by `top_p`.

    V is padded by zeros to a whole number of blocks.
    """
    logits = logits.float()
    p = logits - logits.amax(-1, keepdim=True)
    if options.temperature != 1:
        p /= options.temperature
    p.clamp_(min=-80).exp_()  # below it a result is subnormal, and torch's exp slows down a lot
    if options.top_p < 1:
        # Keep the fewest tokens whose mass reaches top_p: those with less than it above them
        ordered, order = p.sort(descending=True)
        above = ordered.cumsum(-1, dtype=torch.float64) - ordered
        limit = options.top_p * p.sum(-1, keepdim=True, dtype=torch.float64)
        p = torch.zeros_like(p).scatter(1, order, ordered.masked_fill(above >= limit, 0))
    return torch.nn.functional.pad(p, (0, -p.size(1) % BLOCK)) if p.size(1) % BLOCK else p


BLOCK = 256


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """Invert the cumulative distribution: first over blocks of the vocabulary, then inside one.

    Args:
        p: (R, V) probabilities, not normalised; V a whole number of blocks.
        u: (R,) uniforms in fp64.

    Returns:
        (R,) tokens.

    Raises:
        ValueError: A row that sums to NaN or infinity.
    """
    rows = len(p)
    p = p.view(rows, -1, BLOCK)
    mass = p.sum(-1).double().cumsum(-1)
    if not mass[:, -1].isfinite().all():
        raise ValueError("The model's logits hold NaN or infinity: nothing can be sampled.")
    target = u.unsqueeze(1) * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True).clamp(max=p.size(1) - 1)
    before = torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0)
    inside = p[torch.arange(rows, device=p.device), block.squeeze(1)].double().cumsum(-1)
    # The mass of a block was summed in another order: keep the target inside it
    target = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-53)).clamp(min=0)
    token = torch.searchsorted(inside, target, right=True)
    return (block * BLOCK + token.clamp(max=BLOCK - 1)).squeeze(1)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stop = model.generation_config.eos_token_id
    stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
    return {*stop, tokenizer.eos_token_id} - {None}


@contextmanager
def eval_mode(model: torch.nn.Module):
    """Every module in eval mode, and each as it was afterwards; `model.train()` would lose that."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _attention(configs: list, name: str):
    """The attention that these configurations of a model name, replaced and put back."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
