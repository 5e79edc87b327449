"""Prompts and answers as tokens: the same in training, sampling and scoring."""

from typing import Any

from transformers import PreTrainedTokenizerBase


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str | list[dict], *, generation: bool = True
) -> list[int]:
    """Token ids of text, or of messages under the chat template.

    Args:
        tokenizer: The model's tokenizer, with a chat template where `text` is messages.
        text: Plain text or messages.
        generation: Whether the assistant's turn is opened at the end of messages.
    """
    encoded: Any  # one of seven types, depending on the arguments
    if isinstance(text, str):
        encoded = tokenizer(text)
    else:
        encoded = tokenizer.apply_chat_template(
            text, add_generation_prompt=generation, tokenize=True, return_dict=True
        )
    return encoded["input_ids"]
