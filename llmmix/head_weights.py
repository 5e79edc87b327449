"""The output head of a model as a product: its scaling, its weight, and the adapters on it."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import is_peft_available

from llmmix.fused.above_mean import linear_above_mean
from llmmix.fused.divergence import LinearHead, statistics_and_kl
from llmmix.fused.sharding import gathered, whole
from llmmix.fused.tiles import HeadScaling
from llmmix.logprobs import HeadStatistics, keeps_probabilities, linear_statistics

# Hidden states (N, H), weight (V, H) and bias (V,), if any
Product = tuple[Tensor, Tensor, Tensor | None]

logger = logging.getLogger(__name__)


def head_scaling(config: PreTrainedConfig) -> HeadScaling:
    """How the model's own forward scales its logits, from the names configs use for it."""
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if scale is None:
            scale = getattr(config, name, None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        # Granite and MiniCPM3 divide by it; HyperCLOVA X multiplies
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    width = getattr(config, "logits_mup_width_multiplier", None)
    if scale is None and width is not None:
        scale = 1 / width
    softcap = None
    for name in ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap"):
        if softcap is None:
            softcap = getattr(config, name, None)
    return HeadScaling(logit_scale=1.0 if scale is None else scale, softcap=softcap)


class HeadAtHand:
    """The head of the forward that is under way, as a `HeadObjective` gets it.

    Which adapters are on is noted when it is made. So the head of a reference's forward may be kept
    and stay the reference's, in the forward of the model with its adapters on again.

    Args:
        head: The output embedding of a model, with or without PEFT around it.
        scaling: What the model does to its logits.
        memory_budget: As `linear_statistics` takes it.
        outputs: The statistics that the forward computes.
        top_k: The most likely tokens that `top_k_entropy` is over.

    Raises:
        ValueError: The head carries a PEFT adapter that is not a plain product.
    """

    def __init__(
        self,
        head: Any,
        scaling: HeadScaling,
        memory_budget: int | None = None,
        outputs: tuple[str, ...] = ("log_probs",),
        top_k: int = 20,
    ):
        self._product, self._scaling, self._memory_budget = _product(head), scaling, memory_budget
        self.outputs, self.top_k = outputs, top_k
        self.device = head.weight.device

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of targets (N,) or (N, K), given hidden states (N, H)."""
        return self.statistics(hidden, targets).log_probs

    def statistics(
        self,
        hidden: Tensor,
        targets: Tensor,
        outputs: tuple[str, ...] = ("log_probs",),
        temperature: float = 1.0,
    ) -> HeadStatistics:
        """`linear_statistics` of hidden states (N, H) and targets (N,) or (N, K).

        `temperature` divides the logits after all that the model does to them.
        """
        scaling = self._scaling._replace(temperature=self._scaling.temperature * temperature)
        hidden, weight, bias = self._product(hidden)
        with gathered(weight, bias):
            if weight.requires_grad and torch.is_grad_enabled():
                _log_choice(keeps_probabilities(hidden, weight, self._memory_budget))
            return linear_statistics(
                hidden,
                weight,
                targets,
                bias=bias,
                scaling=scaling,
                outputs=outputs,
                top_k=self.top_k,
                memory_budget=self._memory_budget,
            )

    def above_mean(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N,) logit of each target (N,) minus the mean logit of its row, differentiable.

        Raises:
            ValueError: The model caps its logits.
        """
        hidden, weight, bias = self._product(hidden)
        with gathered(weight, bias):
            return linear_above_mean(hidden, weight, targets, bias=bias, scaling=self._scaling)

    def kl_from(self, hidden: Tensor, reference_hidden: Tensor, reference: "HeadAtHand") -> Tensor:
        """(N,) KL(reference || model) in nats, exact and without the logits of either.

        It is differentiable in `hidden` (N, H) and in this head; nothing flows to the reference,
        whose hidden states (N, any width) are of the same tokens.
        """
        targets = torch.zeros(hidden.size(0), dtype=torch.long, device=hidden.device)
        args = (reference_hidden, reference, ("log_probs",))
        return self.statistics_and_kl(hidden, targets, *args)[1]

    def statistics_and_kl(
        self,
        hidden: Tensor,
        targets: Tensor,
        reference_hidden: Tensor,
        reference: "HeadAtHand",
        outputs: tuple[str, ...] | None = None,
    ) -> tuple[HeadStatistics, Tensor]:
        """`statistics` and `kl_from` at once, from the same logits; the entropy has no gradient.

        `outputs` are those of the forward unless given.
        """
        model = LinearHead(*self._product(hidden), self._scaling)
        with torch.no_grad():
            product = reference._product(reference_hidden.to(self.device))
        other = LinearHead(*product, reference._scaling)
        with gathered(model.weight, model.bias, other.weight, other.bias):
            outputs = self.outputs if outputs is None else outputs
            return statistics_and_kl(model, targets, other, outputs, self.top_k)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) logits as the softmax takes them, in fp32, for what needs the whole vocabulary.

        They are held for the backward. The weights of the head must be whole on every process.
        """
        hidden, weight, bias = self._product(hidden)
        scale, softcap, temperature = self._scaling
        logits = F.linear(hidden, weight, bias).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits / temperature


def _product(head: Any) -> Callable[[Tensor], Product]:
    """A function of hidden states: the linear product that the module `head` computes of them.

    Raises:
        ValueError: The head carries a PEFT adapter that is not a plain product.
    """
    if is_peft_available():
        from peft.tuners.lora import Linear as LoraLinear
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(head, LoraLinear):
            return functools.partial(_with_lora, head, _adapters(head))
        if isinstance(head, BaseTunerLayer):
            raise ValueError(
                f"The output head carries a PEFT adapter ({type(head).__name__}) that the fused "
                "head cannot compute. Remove the head from `target_modules`, or use LoRA there."
            )
    # `modules_to_save` and `trainable_token_indices` wrap the head and expose its weight
    weight, bias = head.weight, getattr(head, "bias", None)
    return lambda hidden: (hidden, whole(weight), whole(bias))


def _adapters(head: Any) -> list[str]:
    """Names of the LoRA adapters that are on, and not merged into the weight."""
    if head.disable_adapters or head.merged:
        return []
    if head.lora_variant or any(head.lora_bias.values()):
        raise ValueError(
            "The LoRA adapter on the output head uses DoRA, a bias, or another variant, which the "
            "fused head cannot compute. Use plain LoRA there."
        )
    return [name for name in head.active_adapters if name in head.lora_A]


def _with_lora(head: Any, adapters: list[str], hidden: Tensor) -> Product:
    """W h + s B A h is one product: [W, B] times [h, s A h]."""
    base = head.get_base_layer()
    if not adapters:
        return hidden, whole(base.weight), whole(base.bias)
    hiddens, weights = [hidden], [base.weight]
    for name in adapters:
        a, b = head.lora_A[name].weight, head.lora_B[name].weight
        with gathered(a):
            dropped = head.lora_dropout[name](hidden.to(a.dtype))
            low_rank = dropped @ whole(a).T * head.scaling[name]
        hiddens.append(low_rank.to(hidden.dtype))
        weights.append(b)
    with gathered(*weights):
        weight = torch.cat([whole(x).to(base.weight.dtype) for x in weights], -1)
    return torch.cat(hiddens, -1), weight, whole(base.bias)


@functools.cache  # once a process
def _log_choice(kept: bool) -> None:
    if kept:
        logger.info("The trained head keeps its probabilities for the backward.")
    else:
        logger.info(
            "The trained head computes its probabilities again in the backward: they exceed "
            "`memory_budget`."
        )
