"""The statistics of a head's next-token distributions, and what their inputs must be."""

from typing import NamedTuple

from torch import Tensor

from llmmix.fused.largest import entropy_of_largest
from llmmix.fused.tiles import RunningSoftmax

STATISTICS = (
    "log_probs",
    "entropy",
    "log_sum_sq_probs",
    "mean_logits",
    "is_top1",
    "top_k_entropy",
)


class HeadStatistics(NamedTuple):
    """Statistics of the next-token distribution of each row; those not asked for are None.

    Attributes:
        log_probs: log p of each target, shape of `targets`; differentiable.
        entropy: (N,) in nats; differentiable.
        log_sum_sq_probs: (N,) log of the sum of squared probabilities; no gradient.
        mean_logits: (N,) mean over the vocabulary of the scaled logits; no gradient.
        is_top1: (N,) whether the (first) target is the most likely token (the first of equals).
        top_k_entropy: (N,) in nats, entropy of the distribution over the k most likely tokens
            alone, renormalised; no gradient.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    top_k_entropy: Tensor | None = None


def statistics_of(
    state: RunningSoftmax, vocabulary: int, outputs: tuple[str, ...]
) -> HeadStatistics:
    """The statistics of whole rows, from their running softmax; log_probs is (N, K) here."""
    log_sum = state.sum.log()
    columns = {
        "entropy": state.max + log_sum - state.sum_ez / state.sum,
        "log_sum_sq_probs": state.sum_ee.log() - 2 * log_sum,
        "mean_logits": state.sum_z / vocabulary,
        "is_top1": state.is_top1,
    }
    named = {name: x.squeeze(1) for name, x in columns.items() if name in outputs}
    if "top_k_entropy" in outputs:
        named["top_k_entropy"] = entropy_of_largest(state.largest) + 0 * state.sum.squeeze(1)
    return HeadStatistics(state.target_z - state.max - log_sum, **named)


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    outputs: tuple[str, ...] = (),
    top_k: int = 1,
) -> None:
    """Refuse what a head cannot compute.

    Raises:
        ValueError: The shapes do not fit, a target is outside [0, V), an output is unknown, or
            `top_k` is below 1.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(
            f"`hidden` must be (N, H) and `weight` (V, H) with the same H, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if targets.dim() not in (1, 2) or targets.size(0) != hidden.size(0):
        raise ValueError(
            f"`targets` must be (N,) or (N, K) with N = {hidden.size(0)}, "
            f"got {tuple(targets.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be ({weight.size(0)},), got {tuple(bias.shape)}.")
    if unknown := sorted(set(outputs) - set(STATISTICS)):
        raise ValueError(f"`outputs` has {unknown}; the names are {list(STATISTICS)}.")
    if top_k < 1:
        raise ValueError(
            f"`top_k` must be at least 1, got {top_k}. The full entropy is the output `entropy`."
        )
    if targets.numel():
        low, high = targets.aminmax()
        if low < 0 or high >= weight.size(0):
            raise ValueError(
                f"`targets` must lie in [0, {weight.size(0)}), got values from {low.item()} to "
                f"{high.item()}. Remove ignored positions (label -100) before calling."
            )
