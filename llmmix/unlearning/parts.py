"""A batch of several parts: templates, rows to forget, rows to retain, one below the other.

Every part has as many rows as the others, and all of them go through one forward.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer

from llmmix.head import FusedHeadOutput, HeadAtHand, HeadObjective
from llmmix.rows.weights import ROW

PARTS = ("template", "forget", "retain")  # in this order in a batch


def with_retained(parts: Sequence[str], retain: bool) -> tuple[str, ...]:
    """The parts that a loss reads, and the rows to retain where there are any."""
    return (*parts, "retain") if retain else tuple(parts)


def in_order(parts: Sequence[str]) -> list[str]:
    """Parts as they lie in a batch."""
    return [part for part in PARTS if part in parts]


def select(batch: dict[str, Tensor], parts: Sequence[str], wanted: Sequence[str]) -> dict:
    """The rows of some parts of a batch."""
    places = [in_order(parts).index(part) for part in in_order(wanted)]
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.cat([batch[name].chunk(len(parts))[p] for p in places]) for name in names}


def row_weights(batch: dict[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    """The weights (B,) of the rows of each part: 1 where the data has none."""
    given = batch.get(ROW)
    if given is None:
        given = torch.ones(len(batch["labels"]), device=batch["labels"].device)
    return dict(zip(in_order(parts), given.chunk(len(parts)), strict=True))


def weight_means(
    batch: dict[str, Tensor], parts: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of the weights of the rows to forget and to retain that have a token to score.

    Args:
        batch: A batch; nothing is counted where it has no weights.
        parts: Token log-probabilities and masks (B, T) of each part, of which the last that is not
            "retain" has the rows to forget.
    """
    if ROW not in batch:
        return {}
    found = {}
    for part, weights in row_weights(batch, tuple(parts)).items():
        scored = parts[part][1].any(1)
        name = "weight/retain_mean" if part == "retain" else "weight/mean"
        found[name] = ((weights * scored).sum(), scored.sum())
    return found


def forward_parts(
    model: nn.Module,
    batch: dict[str, Tensor],
    parts: Sequence[str],
    head_objective: HeadObjective | None = None,
) -> tuple[dict[str, tuple[Tensor, Tensor]], FusedHeadOutput]:
    """Token log-probabilities and masks (B, T-1) of each part, from one forward, and its output."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    extra = {} if head_objective is None else {"head_objective": head_objective}
    output = model(**inputs, fused_lm_head=True, **extra)
    # A model spread over several GPUs answers on the device of its head
    answered = (x.to(batch["labels"].device) for x in (output.log_probs, output.label_mask))
    chunks = zip(*(x.chunk(len(parts)) for x in answered), strict=True)
    return dict(zip(in_order(parts), chunks, strict=True)), output


def logits_of(parts: Sequence[str], wanted: Sequence[str]) -> HeadObjective:
    """A `head_objective`: the (N, V) logits at the scored positions of each part that is wanted."""

    def objective(hidden: Tensor, labels: Tensor, head: HeadAtHand) -> dict[str, Tensor]:
        chunks = zip(hidden.chunk(len(parts)), labels.chunk(len(parts)), strict=True)
        found = dict(zip(in_order(parts), chunks, strict=True))
        return {part: head.logits(found[part][0][found[part][1] != -100]) for part in wanted}

    return objective


def count_window(
    accelerator: Accelerator | None,
    batches: Sequence[dict[str, Tensor]],
    parts: Sequence[str],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Rows with a scored token, and scored tokens, of each part of some batches: a tensor of two.

    With an accelerator, they are summed over the processes. Both are at least 1.
    """
    counts = torch.zeros(len(parts), 2, device=device)
    for batch in batches:
        scored = (batch["labels"][:, 1:] != -100).sum(1).view(len(parts), -1)
        counts += torch.stack([(scored > 0).sum(1), scored.sum(1)], 1).to(device)
    if accelerator is not None:
        counts = accelerator.gather(counts.unsqueeze(0)).sum(0)
    return dict(zip(in_order(parts), counts.clamp(min=1), strict=True))


def predicted(
    trainer: Trainer, model: nn.Module, batch: dict[str, Tensor], parts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Logits and labels of the rows to forget, or of the templates of a loss that reads no others.

    There is one for each row of a batch, so that processes gather each row once.
    """
    part = "forget" if "forget" in parts else parts[0]
    rows = select(trainer._prepare_inputs(batch), parts, [part])
    labels = rows.pop("labels")
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return model(**rows).logits, labels


def over_processes(accelerator: Accelerator, share: Tensor, *, training: bool) -> Tensor:
    """The loss of a process, given its share of the loss of all.

    DDP averages gradients over processes, and so does a log its losses. An evaluation weights them
    by the rows of each process, so that all get the same.
    """
    return share * accelerator.num_processes if training else accelerator.gather(share).sum()
