r"""Unlearning losses: what to minimize on the answers a model is to forget.

With p the probability of a reference token, l = log pi(y|x) summed over an answer's |y| tokens,
z the logits, sg a stopped gradient, and means over the answer's tokens (never over padding):

    grad_ascent  mean log p                                                              2401.06121
    npo          -(2/beta) log sigmoid(-beta r),    r = l - l_ref                        2404.05868
    simnpo       -(2/beta) log sigmoid(-beta l / |y| - beta delta)                       2410.07163
    dpo          -(2/beta) log sigmoid(beta [r(template) - r(forget)])                   2404.05868
    undial       mean CE(p, softmax(z_ref - beta onehot(y)))                             2402.10052
    ceu          mean CE(p, softmax(sg z with y left out))                               2503.01224
    wga          mean sg(p)^beta log p                                                   2502.19301
    satimp       mean sg(p)^beta1 sg(1 - p)^beta2 log p                                  2505.11953
    rmu          mean ||h - c u/|u|||^2 / d  at one layer, u uniform and fixed           2403.03218
    pdu          mean (max z - mean z)^2, and lambda (retain NLL - epsilon)              2506.05314

and, towards what is to stay, `nll_loss` or `kl_loss`, the divergence from the reference model. To
forget with forget data alone, see `llmmix.unlearning.flat`. Every function returns one value a row,
in fp32 or better. Those that see tokens give a row without one an exact zero that is connected to
the graph; npo and dpo see sums alone, and their caller leaves such rows out.

    symbol   name
    l        logps, of ..._loss(logps, ...)
    |y|      lengths
    log p    token_logps, with mask
    z        logits, with labels: the token each position predicts, -100 where not scored

Which loss needs what: llmmix/unlearning/loss_table.py. Trainer: llmmix/unlearning/trainer.py.
Recipe: recipes/unlearn.py. Evaluation: eval/unlearning.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmmix.precision import at_least_fp32


def nll_loss(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's scored tokens.

    Args:
        token_logps: (B, T) in nats.
        mask: (B, T), true where scored.

    Returns:
        (B,).
    """
    return -_mean(token_logps, mask)


def grad_ascent_loss(token_logps: Tensor, mask: Tensor, cap: float | None = None) -> Tensor:
    """Minus the NLL: gradient ascent. Unbounded below, so that a token may be capped.

    Args:
        token_logps: (B, T) in nats.
        mask: (B, T), true where scored.
        cap: NLL from which a token no longer pushes, such as ln V, what a uniform guess has; None
            for none.

    Returns:
        (B,).
    """
    return _mean(token_logps if cap is None else token_logps.clamp(min=-cap), mask)


def npo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(-beta (l - l_ref)): negative preference optimization.

    Args:
        logps: (B,) summed log-probabilities of the answers, in nats.
        ref_logps: (B,) the same under the reference model.
        beta: Positive; gradient ascent as it goes to 0.

    Returns:
        (B,).

    Raises:
        ValueError: `beta` is not positive.
    """
    margin = at_least_fp32(logps) - at_least_fp32(ref_logps)
    return 2 / _positive("beta", beta) * F.softplus(beta * margin)


def simnpo_loss(logps: Tensor, lengths: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """-(2/beta) log sigmoid(-beta l/|y| - beta delta): NPO without a reference.

    Args:
        logps: (B,) summed log-probabilities of the answers, in nats.
        lengths: (B,) tokens of each answer.
        beta: Positive.
        delta: Margin, in nats a token.

    Returns:
        (B,).

    Raises:
        ValueError: `beta` is not positive.
    """
    margin = at_least_fp32(logps) / lengths.clamp(min=1) + delta
    return 2 / _positive("beta", beta) * F.softplus(beta * margin) * (lengths > 0)


def dpo_loss(
    alt_logps: Tensor,
    forget_logps: Tensor,
    ref_alt_logps: Tensor,
    ref_forget_logps: Tensor,
    beta: float,
) -> Tensor:
    """DPO that prefers a template, or any alternative, to the answer to forget; times 2/beta.

    Args:
        alt_logps: (B,) summed log-probabilities of the alternatives, in nats.
        forget_logps: (B,) those of the answers to forget.
        ref_alt_logps: (B,) those of the alternatives under the reference model.
        ref_forget_logps: (B,) those of the answers to forget under the reference model.
        beta: Positive.

    Returns:
        (B,).

    Raises:
        ValueError: `beta` is not positive.
    """
    alt, forget, ref_alt, ref_forget = map(
        at_least_fp32, (alt_logps, forget_logps, ref_alt_logps, ref_forget_logps)
    )
    margin = (alt - ref_alt) - (forget - ref_forget)
    return 2 / _positive("beta", beta) * F.softplus(-beta * margin)


def wga_loss(token_logps: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """Mean of sg(p)^beta log p: ascent that lets go of tokens already unlikely.

    Args:
        token_logps: (B, T) in nats.
        mask: (B, T), true where scored.
        beta: Not negative; 0 is gradient ascent.

    Returns:
        (B,), for beta 1 bounded below by -1/e.

    Raises:
        ValueError: `beta` is negative.
    """
    logps = at_least_fp32(token_logps)
    weights = (_not_negative("beta", beta) * logps.detach()).exp()
    return _mean(weights * logps, mask)


def satimp_loss(
    token_logps: Tensor, mask: Tensor, beta1: float = 5.0, beta2: float = 1.0
) -> Tensor:
    """Mean of sg(p)^beta1 sg(1-p)^beta2 log p: saturation and importance weights together.

    Args:
        token_logps: (B, T) in nats.
        mask: (B, T), true where scored.
        beta1: Exponent of p, not negative: tokens already unlikely weigh less.
        beta2: Exponent of 1 - p, not negative: tokens that are nearly certain weigh less.

    Returns:
        (B,).

    Raises:
        ValueError: `beta1` or `beta2` is negative.
    """
    logps = at_least_fp32(token_logps)
    fixed = logps.detach()
    weights = (_not_negative("beta1", beta1) * fixed).exp()
    weights = weights * (-torch.expm1(fixed)).clamp(min=0) ** _not_negative("beta2", beta2)
    return _mean(weights * logps, mask)


def undial_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Cross-entropy to the teacher with the answer's tokens lowered by beta: self-distillation.

    Args:
        logits: (B, T, V) logits of the student.
        teacher_logits: (B, T, V) logits of the model before unlearning.
        labels: (B, T) token that each position predicts, -100 where not scored.
        beta: How far to lower, in logits; not negative.

    Returns:
        (B,).

    Raises:
        ValueError: `beta` is negative.
    """
    mask, target = labels != -100, labels.clamp(min=0).unsqueeze(-1)
    lowered = teacher_logits.detach().float()
    lowered = lowered.scatter_add(
        -1, target, lowered.new_full(target.shape, -_not_negative("beta", beta))
    )
    return _mean(_cross_entropy(lowered.softmax(-1), logits), mask)


def ceu_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy to the model's own distribution with the answer's token left out.

    Args:
        logits: (B, T, V).
        labels: (B, T) token that each position predicts, -100 where not scored.

    Returns:
        (B,).

    Raises:
        ValueError: The vocabulary has one token.
    """
    if logits.size(-1) < 2:
        raise ValueError("`logits` has a vocabulary of one token: nothing is left without it.")
    mask, target = labels != -100, labels.clamp(min=0).unsqueeze(-1)
    others = logits.detach().float().scatter(-1, target, -torch.inf)
    return _mean(_cross_entropy(others.softmax(-1), logits), mask)


def kl_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(reference || model), mean over the scored positions.

    Args:
        logits: (B, T, V).
        ref_logits: (B, T, V) logits of the reference model.
        labels: (B, T), -100 where not scored.

    Returns:
        (B,).
    """
    target = ref_logits.detach().float().softmax(-1)
    entropy = -torch.xlogy(target, target).sum(-1)
    return _mean(_cross_entropy(target, logits) - entropy, labels != -100)


def pdu_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of (max z - mean z)^2 over the scored positions: flat logits are the target.

    Args:
        logits: (B, T, V); -inf, where a vocabulary is padded with it, is left out of the mean.
        labels: (B, T) token that each position predicts, -100 where not scored.

    Returns:
        (B,).
    """
    z = logits.float()
    known = z.isfinite()
    mean = z.masked_fill(~known, 0).sum(-1) / known.sum(-1)
    return _mean((z.amax(-1) - mean) ** 2, labels != -100)


def pdu_multiplier(multiplier: float, retain_loss: float, budget: float, step: float) -> float:
    """max(0, lambda + eta (retain loss - epsilon)): the dual variable after a step.

    Args:
        multiplier: lambda.
        retain_loss: NLL a token on retain rows, over the whole step and every process.
        budget: epsilon, the NLL that is allowed.
        step: eta.
    """
    moved = multiplier + step * (retain_loss - budget)
    return 0.0 if moved < 0 else moved  # `max` would make 0 of a NaN


def rmu_loss(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of hidden states from a target: mean over d, then over a row's tokens.

    Args:
        hidden: (B, T, d).
        target: (d,) `rmu_target` for rows to forget; (B, T, d) hidden states of the reference for
            the others.
        mask: (B, T), true at the tokens that count.

    Returns:
        (B,).
    """
    return _mean(((hidden.float() - target.detach().float()) ** 2).mean(-1), mask)


def rmu_target(size: int, scale: float, seed: int) -> Tensor:
    """The target c u/|u|, with u uniform in [0, 1)^d and drawn from the seed: (d,) in fp32."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return scale * u / u.norm()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) to (B,); zero, with a gradient of zero, where a row has nothing to count."""
    return at_least_fp32(values).masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum_v q log p, where a token that neither can say (-inf) adds nothing."""
    logps = logits.float().log_softmax(-1)
    return -(target * logps.masked_fill(target == 0, 0)).sum(-1)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    return value


def _not_negative(name: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"`{name}` must not be negative, got {value}.")
    return value


def sequence_probs(
    token_logps: Tensor, mask: Tensor, *, mean: str = "arithmetic", positions: int | None = None
) -> Tensor:
    """P(x, y): the mean probability of the tokens of each answer.

    Args:
        token_logps: (B, T) in nats.
        mask: (B, T), true where scored.
        mean: `"arithmetic"`, or `"geometric"`: exp of the mean log-probability.
        positions: What to divide by instead of the answer's tokens: the length of the padded
            sequences, as the released code does.

    Returns:
        (B,) in [0, 1]; 0 for a row without a token.

    Raises:
        ValueError: `mean` is neither of the two, or `positions` is given with the geometric mean.
    """
    lengths, token_logps = mask.sum(1), at_least_fp32(token_logps)
    if mean == "arithmetic":
        total = token_logps.exp().masked_fill(~mask, 0).sum(1)
        return total / (lengths.clamp(min=1) if positions is None else positions)
    if mean != "geometric":
        raise ValueError(f"`mean` must be 'arithmetic' or 'geometric', got {mean!r}.")
    if positions is not None:
        raise ValueError("`positions` goes with `mean='arithmetic'` alone.")
    logps = token_logps.masked_fill(~mask, 0).sum(1) / lengths.clamp(min=1)
    return logps.exp() * (lengths > 0)
