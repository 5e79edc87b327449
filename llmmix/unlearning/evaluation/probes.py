"""Is it gone, or only hidden? Three ways of asking an unlearned model again.

    relearn      a few steps of training on a part of the forgotten rows; measured on the others
    paraphrase   the same questions in other words
    int8, int4   weights rounded to nearest, which undoes changes smaller than a step

Nothing here touches the model that is given: copies are changed, a LoRA adapter merged first.
Measure what comes back as the model was measured before.
"""

import copy
import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmmix.models import context_length
from llmmix.unlearning.qa import encode_answer, pad, question_prompt

PROBES = ("relearn", "paraphrase", "int8", "int4")
GROUP = 64  # weights of one output channel that share a scale under int4


def merged_copy(model):
    """A deep copy in eval mode, with a LoRA adapter merged into the weights."""
    model = copy.deepcopy(model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for weight in model.parameters():
        weight.requires_grad_(weight.is_floating_point())
    return model.eval()


def relearning_parts(count: int, share: float = 0.5, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows to relearn, and rows to measure on, each in order.

    Args:
        count: Rows.
        share: Of the rows to relearn.
        seed: Of the choice.

    Raises:
        ValueError: A share that leaves one part empty.
    """
    learned = round(share * count)
    if not 0 < learned < count:
        raise ValueError(
            f"`share` of {share} parts {count} rows into {learned} to relearn and "
            f"{count - learned} to measure on; each needs one."
        )
    order = list(range(count))
    random.Random(f"relearn {seed}").shuffle(order)
    return sorted(order[:learned]), sorted(order[learned:])


def relearn(
    model,
    tokenizer,
    rows,
    *,
    steps: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    seed: int = 0,
):
    """Train a copy for a few AdamW steps on the answers of rows, prompts not scored.

    Args:
        model: A causal language model of transformers; left as it is.
        tokenizer: Its tokenizer.
        rows: What is relearnt; measure on others, see `relearning_parts`.
        steps: Optimizer steps.
        learning_rate: Constant.
        batch_size: Rows a step.
        seed: Of the order of rows and of dropout.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: Numbers below 1, or no row that fits the context.
    """
    if min(steps, batch_size) < 1 or not learning_rate > 0:
        raise ValueError(
            "`steps` and `batch_size` must be 1 or more and `learning_rate` positive, got "
            f"{steps}, {batch_size} and {learning_rate}."
        )
    room = context_length(model) or float("inf")
    pairs = zip(rows["prompt"], rows["answer"], strict=True)
    encoded = [encode_answer(tokenizer, prompt, answer) for prompt, answer in pairs]
    encoded = [e for e in encoded if e.prompt_length < len(e.ids) <= room]
    if not encoded:
        raise ValueError(f"None of the {len(rows)} `rows` fits the context of {room} tokens.")
    learner = merged_copy(model)
    dtype = learner.dtype
    learner.float()  # a small step is lost in the rounding of half precision
    optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, weight_decay=0.0)
    draw, order = random.Random(f"relearn {seed}"), []
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
    return learner.to(dtype).eval()


def paraphrased(rows: Dataset, tokenizer) -> Dataset:
    """The rows with their `paraphrased_question` asked in place of the question.

    Raises:
        ValueError: A row without one.
    """
    asked = check_paraphrases(rows)
    prompts = [question_prompt(tokenizer, question) for question in asked]
    rows = rows.remove_columns({"prompt", "question"} & set(rows.column_names))
    return rows.add_column("question", asked).add_column("prompt", prompts)


def check_paraphrases(rows: Dataset) -> list[str]:
    """The `paraphrased_question` of each row.

    Raises:
        ValueError: A row without one.
    """
    column = "paraphrased_question"
    asked = rows[column][:] if column in rows.column_names else [None] * len(rows)
    if missing := sum(not (question or "").strip() for question in asked):
        raise ValueError(
            f"The probe 'paraphrase' needs a `{column}` in every row; {missing} of {len(rows)} "
            "have none. Add the column, or leave the probe out."
        )
    return asked


def quantised(model, bits: int):
    """A copy whose linear layers hold weights rounded to nearest, on symmetric grids.

        w -> s round(w / s),    s = max |w| / (2^(bits - 1) - 1)

    One scale s an output channel for 8 bits, one for each 64 weights of a channel for 4. The
    embeddings and the output head stay as they are.

    Args:
        model: A causal language model of transformers; left as it is.
        bits: 8 or 4.

    Raises:
        ValueError: Other bits, or a model most of whose weights are in layers of another kind.
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
            "floating point: it cannot be quantised here. Leave the probe out."
        )
    with torch.no_grad():
        for weight, transposed in weights:
            rows = weight.T if transposed else weight  # an output channel each
            rounded = round_to_nearest(rows, bits, GROUP if bits == 4 else None)
            weight.copy_(rounded.T if transposed else rounded)
    return model


def round_to_nearest(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Weights on a symmetric grid of 2^bits - 1 points; see `quantised`.

    Args:
        weight: (channels, inputs).
        bits: Of a weight.
        group: Inputs that share a scale; all of a channel by default. The last may be fewer.

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
