"""The arithmetic of SFTMix: confidence, pairs of hidden states, and the loss on mixed ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmmix.logprobs import linear_logprobs


def confidence(mean_nlls: Tensor) -> Tensor:
    """Conf = -(1/C) sum_c exp(mean NLL_c), minus the mean perplexity over checkpoints.

    Args:
        mean_nlls: (C, B) mean response-token NLL in nats of B examples under C checkpoints.

    Returns:
        (B,) in fp64, where no mean NLL below 700 overflows.

    Raises:
        ValueError: `mean_nlls` is not of shape (C, B), or C is 0.
    """
    if mean_nlls.dim() != 2 or mean_nlls.size(0) == 0:
        raise ValueError(
            f"`mean_nlls` must be (C, B) with C of 1 or more, got {tuple(mean_nlls.shape)}."
        )
    return -mean_nlls.double().exp().mean(0)


def mixup_loss(
    hidden_a: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    targets_a: Tensor,
    targets_b: Tensor,
    lam: float | Tensor,
    *,
    weights_a: Tensor | None = None,
    weights_b: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of mixed hidden states against mixed one-hot targets, position by position.

        CE = -lam w_a log p[y_a] - (1 - lam) w_b log p[y_b]
        p  = softmax(W (lam h_a + (1 - lam) h_b))

    Args:
        hidden_a: (n, H), after the final norm.
        hidden_b: (n, H), after the final norm.
        weight: (V, H), the weight of the head.
        targets_a: (n,) token ids.
        targets_b: (n,) token ids.
        lam: Share of a, one for all or (n,).
        weights_a: (n,) w_a, the weights of the targets of a in the loss. None: all 1.
        weights_b: (n,) w_b, likewise.

    Returns:
        (n,) in fp32 or better, differentiable in both hidden states and the head.
    """
    if not isinstance(lam, Tensor):
        lam = torch.tensor(lam, dtype=torch.float64, device=hidden_a.device)

    def logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, targets)

    given = [weights_a, weights_b]
    weights = [hidden_a.new_ones(len(hidden_a)) if w is None else w for w in given]
    return _mixup_loss(
        logprobs, hidden_a, hidden_b, targets_a, targets_b, lam, torch.stack(weights, dim=1)
    )


def _mixup_loss(
    logprobs: Callable[[Tensor, Tensor], Tensor],
    hidden_a: Tensor,
    hidden_b: Tensor,
    targets_a: Tensor,
    targets_b: Tensor,
    lam: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    # In bf16 a share of 0.999 would round to 1: mix in fp32 or better
    dtype = torch.promote_types(hidden_a.dtype, torch.float32)
    share = lam.to(dtype).expand(len(hidden_a)).unsqueeze(1)
    mixed = share * hidden_a.to(dtype) + (1 - share) * hidden_b.to(dtype)
    log_p = logprobs(mixed, torch.stack([targets_a, targets_b], dim=1))
    shares = torch.cat([share, 1 - share], dim=1)
    return -((shares if weights is None else shares * weights.to(dtype)) * log_p).sum(1)


def mix_pairs(
    hidden: Tensor,
    labels: Tensor,
    logprobs: Callable[[Tensor, Tensor], Tensor],
    *,
    lam: Tensor,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The mixup term of a batch whose rows 2j and 2j+1 are a pair. A `head_objective`.

    Args:
        hidden: (B, T, H), B even.
        labels: (B, T), the token that each position predicts, -100 where ignored.
        logprobs: The model's head: (hidden, targets) -> log p.
        lam: (B/2,), the confident row's share in each pair.
        weigh: Multiplies values of tokens (B, T) by their weights. None: all weigh 1.

    Returns:
        `mixup_losses` (B/2,): mean over the n = min(N_c, N_u) mixed positions of each pair, and
        `mixed_tokens`, the number of response tokens that took part.
    """
    mask = labels != -100
    shared = torch.minimum(mask[0::2].sum(1), mask[1::2].sum(1))  # n of each pair
    # The first n response positions of each row, whatever its prompt's length or padding side
    taking_part = mask & (mask.cumsum(1) <= shared.repeat_interleave(2).unsqueeze(1))
    a, b = taking_part[0::2], taking_part[1::2]
    pair = torch.arange(len(shared), device=labels.device).repeat_interleave(shared)
    weights = None
    if weigh is not None:
        each = weigh(torch.ones(labels.shape, device=labels.device))
        weights = torch.stack([each[0::2][a], each[1::2][b]], dim=1)
    losses = _mixup_loss(
        logprobs,
        hidden[0::2][a],
        hidden[1::2][b],
        labels[0::2][a],
        labels[1::2][b],
        lam.to(hidden.device)[pair],
        weights,
    )
    means = losses.new_zeros(len(shared)).index_add(0, pair, losses) / shared.clamp(min=1)
    return {"mixup_losses": means, "mixed_tokens": 2 * shared.sum()}
