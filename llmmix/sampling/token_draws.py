"""The random stream of each completion, and a token drawn from a distribution with it."""

import numpy as np
import torch
from torch import Tensor

from llmmix.sampling.requests import SamplingOptions

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed together


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """The random stream of one completion: the first `count` uniforms in [0, 1)."""
    return np.random.Generator(
        np.random.Philox(key=[seed, prompt], counter=[0, 0, sample, 0])
    ).random(count)


def probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Weights to draw tokens by: exp((logits - max) / temperature), the tail cut by `top_p`.

    At temperature 0 the most probable token has them all, the first of equals.

    Args:
        logits: (R, V), of any type.
        options: Sampling options, of which temperature and nucleus mass count.

    Returns:
        (R, V') fp32, not normalized; V padded by zeros to a whole number of blocks.
    """
    logits = logits.float()
    p = _argmax(logits) if options.temperature == 0 else _softmax(logits, options)
    return torch.nn.functional.pad(p, (0, -p.size(1) % BLOCK)) if p.size(1) % BLOCK else p


def _argmax(logits: Tensor) -> Tensor:
    peak, token = logits.max(-1, keepdim=True)
    # 1, and NaN where the highest logit is NaN or infinite, which `draw` refuses
    return torch.zeros_like(logits).scatter_(1, token, (peak - peak).exp_())


def _softmax(logits: Tensor, options: SamplingOptions) -> Tensor:
    p = logits - logits.amax(-1, keepdim=True)
    if options.temperature != 1:
        p /= options.temperature
    p.clamp_(min=-80).exp_()  # below it a result is subnormal, and torch's exp slows down a lot
    if options.top_p < 1:
        # Keep the fewest tokens whose mass reaches top_p: those with less than it above them
        ordered, order = p.sort(descending=True)
        above = ordered.cumsum(-1, dtype=torch.float64) - ordered
        limit = options.top_p * p.sum(-1, keepdim=True, dtype=torch.float64)
        p = torch.zeros_like(p).scatter(1, order, ordered.masked_fill(above >= limit, 0))
    return p


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Invert the cumulative distribution: first over blocks of the vocabulary, then inside one.

    Args:
        p: (R, V) probabilities, not normalized; V a whole number of blocks.
        u: (R,) uniforms in fp64.

    Returns:
        (R,) tokens.

    Raises:
        ValueError: A row sums to NaN or infinity.
    """
    rows = len(p)
    p = p.view(rows, -1, BLOCK)
    mass = p.sum(-1).double().cumsum(-1)
    if not mass[:, -1].isfinite().all():
        raise ValueError("The model's logits hold NaN or infinity: nothing can be sampled.")
    target = u.unsqueeze(1) * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True).clamp(max=p.size(1) - 1)
    before = torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0)
    inside = p[torch.arange(rows, device=p.device), block.squeeze(1)].double().cumsum(-1)
    # The mass of a block was summed in another order: keep the target inside it
    target = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-53)).clamp(min=0)
    token = torch.searchsorted(inside, target, right=True)
    return (block * BLOCK + token.clamp(max=BLOCK - 1)).squeeze(1)
