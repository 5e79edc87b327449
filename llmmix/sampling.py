"""N completions a prompt."""

from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_ROWS = 4096  # rows decoded at once


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
    max_rows: int = MAX_ROWS,
) -> Iterator[list[str]]:
    """Draw completions, yielding those of one prompt at a time, in order.

    Args:
        model: A causal language model; its mode and its random state are left as they were.
        tokenizer: Its tokenizer, with a pad token.
        prompts: Text, or lists of chat messages.
        num_samples: Completions a prompt.
        temperature: Divisor of the logits, positive.
        top_p: Nucleus mass; 1 samples from the whole distribution.
        max_new_tokens: Tokens after which a completion is cut.
        seed: Of the draws; each batch of prompts has a stream of its own.
        max_rows: Completions decoded at once, at least one prompt's.

    Raises:
        ValueError: No pad token, or a prompt that leaves no room for a completion.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token. Set `tokenizer.pad_token` to one.")
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    _check_room(ids, model.config, max_new_tokens)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_samples,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training = model.training
    model.eval()
    try:
        size = max(1, max_rows // num_samples)
        for start in range(0, len(ids), size):
            batch = tokenizer.pad(
                {"input_ids": ids[start : start + size]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed + start)
                out = model.generate(**batch, generation_config=config)
            text = tokenizer.batch_decode(
                out[:, batch["input_ids"].size(1) :], skip_special_tokens=True
            )
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
