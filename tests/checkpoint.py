"""The random checkpoint that most tests share."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

# Frequencies that change for a whole batch once one of its rows passes 24 tokens
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "factor": 8.0,
    "original_max_position_embeddings": 24,
}


def save_random_checkpoint(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A random two-layer Llama and its tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,  # far from uniform, so that losses differ between rows
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
