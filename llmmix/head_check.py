"""Is the fused head's answer the model's own? Compared once, at a few random positions.

A model may do more to its hidden states or logits than its config says, and no config is asked for
all that models do. The fused head would then train another model in silence. So would a model that
is run without padding and lets sequences see each other.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmmix.fused.sharding import is_spread

logger = logging.getLogger(__name__)

POSITIONS = 8
# Log-probabilities may differ by this share of the spread of the logits, in fp32
CLOSE = 1e-3
# Errors of rounding that hidden states have gathered, beside that of one
GATHERED = 10


def has_weights(model: PreTrainedModel) -> bool:
    """Whether no weight of a model is still to be loaded."""
    return all(p.device.type != "meta" for p in model.parameters())


def check_answers(
    model: PreTrainedModel, own_forward: Callable[..., Any], fused_forward: Callable[..., Any]
) -> None:
    """Compare the head's log-probabilities, and its router loss, with the model's own.

    The model runs in evaluation mode and without gradients. Where its own forward cannot run on
    tokens alone, nothing is compared, and a warning says so.

    Args:
        model: A causal language model, whose weights are there.
        own_forward: The model's own forward, a function of the model.
        fused_forward: A function (outputs, memory_budget, objective, **inputs) that answers with a
            `FusedHeadOutput`.

    Raises:
        ValueError: They differ by more than rounding, or the head cannot run on the model.
    """
    name = type(model).__name__
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, POSITIONS + 1), generator=generator)
    ids = ids.to(_device(model))
    with _probing(model):
        try:
            own = own_forward(model, input_ids=ids, use_cache=False)
            logits = own.logits[:, :-1].float()
        except Exception as error:  # whatever the model needs beside tokens
            logger.warning(
                "The fused head was not compared with the own logits of %s, which cannot run on "
                "tokens alone: %s: %s",
                *(name, type(error).__name__, error),
            )
            return
        if not logits.isfinite().all():
            return  # no weights yet, or none that train: `end_unless_finite` tells
        try:
            fused = fused_forward(("log_probs",), None, None, input_ids=ids, labels=ids)
        except Exception as error:
            raise ValueError(f"The fused head cannot run on {name}: {error}") from error
    _check_logps(model, fused.log_probs, logits, ids[:, 1:], own.logits.dtype)
    aux_loss = getattr(own, "aux_loss", None)
    if isinstance(aux_loss, Tensor) and fused.aux_loss is not None:
        off = (aux_loss - fused.aux_loss).abs().item()
        if not off <= 10 * CLOSE * max(1.0, aux_loss.abs().item()):
            raise ValueError(
                f"The fused head's router loss differs by {off:.2g} from that of {name}, which has "
                "one of its own. Set `output_router_logits=False` in the model's config."
            )


def probe(
    model: PreTrainedModel, inputs: dict[str, Tensor], fused_forward: Callable[..., Any]
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (n, H) at the labels of a batch, and the router loss of an MoE model.

    The model runs in evaluation mode and without gradients.

    Args:
        model: A causal language model, whose weights are there.
        inputs: Tokens, mask and labels of the batch.
        fused_forward: As for `check_answers`.
    """

    def take(hidden: Tensor, labels: Tensor, _: Any) -> dict[str, Tensor]:
        return {"hidden": hidden[labels != -100].float()}

    inputs = {name: x.to(_device(model)) for name, x in inputs.items()}
    with _probing(model):
        output = fused_forward((), None, take, **inputs)
    return output.objective["hidden"], output.aux_loss


def difference(
    model: PreTrainedModel,
    expected: tuple[Tensor, Tensor | None],
    found: tuple[Tensor, Tensor | None],
) -> str | None:
    """How two answers of `probe` differ, in words; None within rounding, or where one is NaN."""
    hidden, aux_loss = expected
    if not hidden.isfinite().all():
        return None
    off = ((found[0] - hidden).norm(dim=-1) / hidden.norm(dim=-1)).max().item()
    coarse = torch.bfloat16 if is_spread(model) else model.dtype  # FSDP may round to bf16
    if not off <= CLOSE + GATHERED * _rounding(model, coarse):
        return f"its hidden states differ by {off:.2g} of their size"
    if aux_loss is not None and found[1] is not None:
        off = (aux_loss - found[1]).abs().item()
        if not off <= 10 * CLOSE * max(1.0, aux_loss.abs().item()):
            return f"its router loss differs by {off:.2g}"
    return None


def _check_logps(
    model: PreTrainedModel, found: Tensor, logits: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    labels = labels.to(logits.device).clamp(max=logits.size(-1) - 1)  # of a padded vocabulary
    expected = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))
    off = (found.to(logits.device) - expected.squeeze(-1)).abs().max().item()
    spread, rounding = logits.std().item(), _rounding(model, dtype) * logits.abs().max().item()
    if not off <= CLOSE * spread + rounding + 1e-6:
        raise ValueError(
            f"The fused head's log-probabilities differ by up to {off:.2g} nats from those of "
            f"{type(model).__name__}, whose own forward does more than multiply the hidden states "
            "by the output embeddings: another layer, a scale or a padded vocabulary. Neither "
            "`attach_head` nor TRL's fused head can serve it. Train it with the `Trainer` of "
            "transformers, which takes the model's own logits."
        )


def _rounding(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """What logits of a model are rounded to, as a share of their size."""
    head: Any = model.get_output_embeddings()
    kinds = {dtype, head.weight.dtype if head.weight.is_floating_point() else torch.bfloat16}
    device = head.weight.device.type
    if torch.is_autocast_enabled(device):
        kinds.add(torch.get_autocast_dtype(device))
    if hasattr(model, "_original_forward"):  # accelerate has put its own forward under autocast
        kinds.add(torch.bfloat16)
    coarsest = max(torch.finfo(kind).eps for kind in kinds)
    # Accelerators may multiply fp32 in TF32, which has ten bits
    return 2 * (coarsest if device == "cpu" else max(coarsest, 2**-10))


def _device(model: PreTrainedModel) -> torch.device:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.device


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, and random numbers as if nothing had been drawn."""
    modes = [(module, module.training) for module in model.modules()]
    device = _device(model)
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
