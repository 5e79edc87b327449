"""The head alone: ours against TRL's fused head and against plain cross-entropy on full logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmmix.timing.clock import Case

OUTPUTS = ("log_probs", "entropy", "is_top1")  # what TRL's SFTTrainer logs

KINDS: dict[str, dict] = {
    "frozen head": {"trained": False},
    "trained head, recomputing": {"trained": True, "memory_budget": 0},
    "trained head, within the budget": {"trained": True, "memory_budget": 2**40},
}
CONTENDERS = {"llmmix": "llmmix", "TRL's head": "trl", "full logits": "plain"}


def head_cases(
    *, rows: int, hidden_size: int, vocab_size: int, masked: Sequence[float], device: str
) -> list[list[Case]]:
    """Rows of the head alone: ours first, then TRL's head and plain cross-entropy.

    Args:
        rows: Positions.
        hidden_size: H.
        vocab_size: V.
        masked: Shares of positions whose label is ignored, a group of rows each.
        device: "cpu" or "cuda".
    """
    shape = {"rows": rows, "hidden_size": hidden_size, "vocab_size": vocab_size, "device": device}
    groups = []
    for share in masked:
        for kind, options in KINDS.items():
            row = f"{kind}, {share:.0%} masked" if share else kind
            shared = {**shape, **options, "masked": share}
            groups.append(
                [
                    Case(row, contender, head_call, {**shared, "head": head})
                    for contender, head in CONTENDERS.items()
                ]
            )
    return groups


def head_call(
    *,
    rows: int,
    hidden_size: int,
    vocab_size: int,
    device: str,
    trained: bool,
    masked: float,
    head: str,
    memory_budget: int | None = None,
) -> Callable[[], None]:
    """Forward and backward of the loss of a model that is a norm and a head, and nothing else."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from llmmix.head import attach_head

    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=rows + 1,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)  # transformers' wrapper of `to` hides its type
    model = model.to(device, dtype)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(trained)
    if head == "llmmix":
        attach_head(model, outputs=OUTPUTS, memory_budget=memory_budget)
    elif head == "trl":
        add_fused_lm_head(model, outputs=OUTPUTS)
    hidden = torch.randn(1, rows + 1, hidden_size, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab_size, (1, rows + 1), device=device)
    labels[0, 1 + torch.randperm(rows, device=device)[: round(masked * rows)]] = -100
    fused = {} if head == "plain" else {"fused_lm_head": True}

    def call() -> None:
        hidden.grad = model.lm_head.weight.grad = None
        model(inputs_embeds=hidden, labels=labels, use_cache=False, **fused).loss.backward()

    return call
