"""N completions a prompt: a prompt is computed once, and finished rows leave the batch at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    num_samples: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    max_rows: int = 1024,
) -> Iterator[list[str]]:
    """Draw completions, yielding those of one prompt at a time, in order.

    Args:
        model: A causal language model; its mode and the random state are left as they were.
        tokenizer: Its tokenizer, with a pad token.
        prompts: Text, or lists of chat messages.
        num_samples: Completions a prompt.
        temperature: Divisor of the logits, positive.
        top_p: Nucleus mass in (0, 1]; 1 samples from the whole distribution.
        max_new_tokens: Tokens after which a completion is cut.
        seed: Of the draws; each batch of prompts has a stream of its own.
        max_rows: Completions decoded at once, at least one prompt's.

    Raises:
        ValueError: A temperature or nucleus out of range, no pad token, or a prompt that leaves no
            room for a completion.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must lie in (0, 1], got {top_p}.")
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token. Set `tokenizer.pad_token` to one.")
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    _check_room(ids, model.config, max_new_tokens)
    stop = _stop_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        size = max(1, max_rows // num_samples)
        for start in range(0, len(ids), size):
            batch = tokenizer.pad(
                {"input_ids": ids[start : start + size]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + start)
            rows = _decode(
                model, batch, num_samples, stop, max_new_tokens, temperature, top_p, generator
            )
            text = tokenizer.batch_decode(rows, skip_special_tokens=True)
            for row in range(0, len(text), num_samples):
                yield text[row : row + num_samples]
    finally:
        model.train(was_training)


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


@torch.inference_mode()
def _decode(
    model, batch, num_samples: int, stop: Tensor, max_new_tokens: int, temperature, top_p, generator
) -> list[list[int]]:
    """Token ids of `num_samples` completions of each left-padded prompt, without the stop token."""
    mask = batch["attention_mask"]
    cache = DynamicCache(config=model.config)
    position = mask.cumsum(1) - 1
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=position.clamp(min=0),
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(num_samples)
    mask = mask.repeat_interleave(num_samples, 0)
    position = position[:, -1:].repeat_interleave(num_samples, 0)
    logits = logits.repeat_interleave(num_samples, 0)
    alive = torch.arange(len(mask), device=mask.device)
    out = torch.full((len(mask), max_new_tokens), -1, device=mask.device)
    for step in range(max_new_tokens):
        tokens = _draw(logits, temperature, top_p, generator)
        keep = ~torch.isin(tokens, stop)
        if not keep.all():
            alive, tokens, mask, position = (x[keep] for x in (alive, tokens, mask, position))
            cache.batch_select_indices(keep.nonzero().squeeze(1))
        if not len(alive):
            break
        out[alive, step] = tokens
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        if step + 1 < max_new_tokens:
            logits = model(
                input_ids=tokens.unsqueeze(1),
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
            ).logits[:, -1]
    return [[token for token in row if token >= 0] for row in out.tolist()]


def _draw(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        # Keep the fewest tokens whose mass reaches top_p: those with less than it above them
        ordered, order = p.sort(descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        p = torch.zeros_like(p).scatter(1, order, ordered)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    stop = model.generation_config.eos_token_id
    stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
    return torch.tensor(sorted({*stop, tokenizer.eos_token_id} - {None}), device=model.device)


def _check_room(ids: list[list[int]], config, max_new_tokens: int) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    long = [row for row, prompt in enumerate(ids) if len(prompt) + max_new_tokens > context]
    if long:
        raise ValueError(
            f"{len(long)} prompts (first: row {long[0]}, {len(ids[long[0]])} tokens) leave no room "
            f"for max_new_tokens={max_new_tokens} in a context of {context}. Lower "
            "`max_new_tokens` or drop those rows."
        )
