"""The table of unlearning losses: a row each. To add a loss, add a function and a row.

What a row says is in `llmmix.unlearning.objective.Loss`; the arithmetic and the papers are in
llmmix/unlearning/losses.py.
"""

from torch import Tensor

from llmmix.unlearning.losses import (
    ceu_loss,
    dpo_loss,
    grad_ascent_loss,
    nll_loss,
    npo_loss,
    pdu_loss,
    rmu_loss,
    satimp_loss,
    simnpo_loss,
    undial_loss,
    wga_loss,
)
from llmmix.unlearning.objective import Loss
from llmmix.unlearning.pdu import PDU
from llmmix.unlearning.rmu import RMU
from llmmix.unlearning.step import Step, Terms

# The forget term of each loss on a micro-batch


def _ascent(step: Step, cap: float | None) -> Terms:
    return step.by_token(grad_ascent_loss(*step.parts["forget"], cap=cap))


def _npo(step: Step, beta: float) -> Terms:
    return step.by_row(npo_loss(step.logps("forget"), step.ref_logps("forget"), beta))


def _simnpo(step: Step, beta: float, delta: float) -> Terms:
    return step.by_row(simnpo_loss(step.logps("forget"), step.lengths("forget"), beta, delta))


def _dpo(step: Step, beta: float) -> Terms:
    template, forget = step.logps("template"), step.logps("forget")
    reference = step.ref_logps("template"), step.ref_logps("forget")
    return step.by_row(dpo_loss(template, forget, *reference, beta))


def _undial(step: Step, beta: float) -> Terms:
    teacher = step.ref_logits("forget")
    return step.over_vocabulary(undial_loss, "forget", teacher_logits=teacher, beta=beta)


def _ceu(step: Step) -> Terms:
    return step.over_vocabulary(ceu_loss, "forget")


def _wga(step: Step, beta: float) -> Terms:
    return step.by_token(wga_loss(*step.parts["forget"], beta))


def _satimp(step: Step, beta: float, beta2: float) -> Terms:
    return step.by_token(satimp_loss(*step.parts["forget"], beta, beta2))


def _rmu(step: Step, target: Tensor) -> Terms:
    hidden = step.hidden["forget"]
    return step.by_row(rmu_loss(hidden, target.to(hidden.device), step.answers("forget")))


def _pdu(step: Step) -> Terms:
    return step.over_vocabulary(pdu_loss, "forget")


def _idk(step: Step) -> Terms:
    return step.by_token(nll_loss(*step.parts["template"]), "template")


# Title and arXiv id of the papers, for the model's card
TOFU = "TOFU: A Task of Fictitious Unlearning for LLMs", "2401.06121"
NPO = (
    "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
    "2404.05868",
)
SIMNPO = (
    "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
    "2410.07163",
)
UNDIAL = (
    "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
    "2402.10052",
)
CEU = "CE-U: Cross Entropy Unlearning", "2503.01224"
WGA = (
    "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond",
    "2502.19301",
)
SATIMP = "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", "2505.11953"
WMDP = (
    "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning",
    "2403.03218",
)
PRIMAL_DUAL = (
    "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models",
    "2506.05314",
)

LOSSES = {
    "grad_ascent": Loss(_ascent, TOFU, capped=True, retain_weight=0.0),
    "grad_diff": Loss(_ascent, TOFU, capped=True),
    "kl": Loss(_ascent, TOFU, capped=True, retain_loss="kl"),
    "npo": Loss(
        _npo,
        NPO,
        settings=("beta",),
        reference="logps",
        token_mean=False,
        beta=0.1,
        positive_beta=True,
    ),
    "simnpo": Loss(
        _simnpo,
        SIMNPO,
        settings=("beta", "delta"),
        token_mean=False,
        forget_weight=0.125,
        beta=4.5,
        positive_beta=True,
    ),
    "dpo": Loss(
        _dpo,
        NPO,
        reads=("template", "forget"),
        settings=("beta",),
        reference="logps",
        token_mean=False,
        beta=0.1,
        positive_beta=True,
    ),
    "undial": Loss(
        _undial,
        UNDIAL,
        settings=("beta",),
        reference="logits",
        logits=True,
        retain_weight=0.0,
        beta=10.0,
    ),
    "ceu": Loss(_ceu, CEU, logits=True, skips_tokens=True, retain_weight=0.0),
    "wga": Loss(_wga, WGA, settings=("beta",), beta=1.0),
    "satimp": Loss(_satimp, SATIMP, settings=("beta", "beta2"), retain_weight=0.1, beta=5.0),
    "rmu": Loss(
        _rmu,
        WMDP,
        settings=("layer", "steering", "seed"),
        reference="hidden",
        token_mean=False,
        objective=RMU,
    ),
    "pdu": Loss(
        _pdu,
        PRIMAL_DUAL,
        settings=("epsilon", "dual_step", "dual_warmup_epochs"),
        logits=True,
        retain_required=True,
        objective=PDU,
    ),
    "idk": Loss(_idk, TOFU, reads=("template",)),
}
