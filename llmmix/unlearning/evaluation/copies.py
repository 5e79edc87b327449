"""Copies of a model that are trained a little, or rounded; the model itself stays as it is.

A LoRA adapter is merged into the weights first.
"""

import copy
import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from llmmix.data import pad
from llmmix.models import context_length
from llmmix.rows.prompts import encode_answer, options_of

GROUP = 64  # weights of one output channel that share a scale under int4


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy in eval mode, with a LoRA adapter merged into the weights."""
    model = copy.deepcopy(model)
    merge = getattr(model, "merge_and_unload", None)  # PEFT's
    if merge is not None:
        model = merge()
    for weight in model.parameters():
        weight.requires_grad_(weight.is_floating_point())
    return model.eval()


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    steps: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    seed: int = 0,
) -> PreTrainedModel:
    """Train a copy for a few AdamW steps on the answers of rows, prompts not scored.

    Args:
        model: A causal language model of transformers; left as it is.
        tokenizer: The model's tokenizer.
        rows: The rows to relearn, with `prompt` and `answer`; measure on others.
        steps: Optimizer steps.
        learning_rate: Constant learning rate.
        batch_size: Rows a step.
        seed: Seed of the order of rows and of dropout.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: `steps` or `batch_size` is below 1, `learning_rate` is not positive, or no row
            fits the context.
    """
    check_relearning(steps, learning_rate, batch_size)
    room = context_length(model) or float("inf")
    triples = zip(rows["prompt"], rows["answer"], options_of(rows), strict=True)
    encoded = [encode_answer(tokenizer, *pair, options=asked) for *pair, asked in triples]
    encoded = [e for e in encoded if e.prompt_length < len(e.ids) <= room]
    if not encoded:
        raise ValueError(f"None of the {len(rows)} `rows` fits the context of {room} tokens.")
    learner = merged_copy(model)
    dtype = learner.dtype
    learner.float()  # a small step is lost in the rounding of half precision
    optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, weight_decay=0.0)
    draw, order = random.Random(f"relearn {seed}"), list[int]()
    devices = [learner.device] if learner.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=learner.device.type), torch.enable_grad():
        torch.manual_seed(seed)
        learner.train()
        for _ in range(steps):
            while len(order) < batch_size:
                order += draw.sample(range(len(encoded)), len(encoded))
            taken, order = order[:batch_size], order[batch_size:]
            batch = pad([encoded[place] for place in taken])
            batch = {name: x.to(learner.device) for name, x in batch.items()}
            learner(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    learner.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return learner.eval()


def check_relearning(steps: int, learning_rate: float, batch_size: int) -> None:
    """Refuse a number that `relearn` cannot train with.

    Raises:
        ValueError: `steps` or `batch_size` is below 1, or `learning_rate` is not positive.
    """
    if min(steps, batch_size) < 1 or not learning_rate > 0:
        raise ValueError(
            "`steps` and `batch_size` must be 1 or more and `learning_rate` positive, got "
            f"{steps}, {batch_size} and {learning_rate}."
        )


def quantized(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy whose linear layers hold weights rounded to nearest, on symmetric grids.

        w -> s round(w / s),    s = max |w| / (2^(bits - 1) - 1)

    One scale s an output channel for 8 bits, one for each 64 weights of a channel for 4. The
    embeddings and the output head stay as they are.

    Args:
        model: A causal language model of transformers; left as it is.
        bits: 8 or 4.

    Raises:
        ValueError: `bits` is neither 8 nor 4, or most weights are not in linear layers.
    """
    if bits not in (4, 8):
        raise ValueError(f"`bits` must be 4 or 8, got {bits}.")
    model = merged_copy(model)
    spared = {m for m in model.modules() if isinstance(m, nn.Embedding)}
    spared.add(model.get_output_embeddings())
    weights = [
        (module.weight, isinstance(module, Conv1D))
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in spared
    ]
    kept = {id(p) for module in spared if module is not None for p in module.parameters()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in kept)
    reached = sum(w.numel() for w, _ in weights if w.is_floating_point())
    if 2 * reached < total:
        raise ValueError(
            f"Only {reached} of {total} weights of {type(model).__name__} are in linear layers of "
            "floating point: it cannot be quantized here. Leave the probe out."
        )
    with torch.no_grad():
        for weight, transposed in weights:
            rows = weight.T if transposed else weight  # one for each output channel
            rounded = round_to_nearest(rows, bits, GROUP if bits == 4 else None)
            weight.copy_(rounded.T if transposed else rounded)
    return model


def round_to_nearest(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Weights on a symmetric grid of 2^bits - 1 points; see `quantized`.

    Args:
        weight: (channels, inputs).
        bits: Bits a weight.
        group: Inputs that share a scale; all of a channel by default. The last group may be
            smaller.

    Returns:
        The rounded weights, in the dtype of `weight`.
    """
    parts: Sequence[Tensor] = weight.float().split(group or max(1, weight.size(1)), dim=1)
    top = 2 ** (bits - 1) - 1
    scales = [part.abs().amax(1, keepdim=True) / top for part in parts]
    # A group of zeros has no scale, and needs none
    rounded = [
        torch.where(scale > 0, (part / scale).round() * scale, 0)
        for part, scale in zip(parts, scales, strict=True)
    ]
    return torch.cat(rounded, 1).to(weight.dtype)
