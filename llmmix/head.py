"""Attach the fused head of `llmmix.logprobs` to any Hugging Face causal language model.

After `attach_head(model)`, `model(..., labels=labels, fused_lm_head=True)` answers with per-token
log-probabilities instead of logits, as TRL's own fused head does and with the same fields, so that
TRL's trainers run on it too. Every other call, generation included, is the model's own.

The head runs inside the model's forward: DDP, FSDP and gradient checkpointing see one module and
one forward. A trainer that needs more than log-probabilities (SFTMix mixes hidden states) passes
`head_objective`, a function that the forward calls with the hidden states and the head at hand.
"""

import functools
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput, is_peft_available

from llmmix.fused.sharding import gathered, whole
from llmmix.fused.tiles import HeadScaling
from llmmix.logprobs import (
    STATISTICS,
    HeadStatistics,
    keeps_probabilities,
    linear_statistics,
)

logger = logging.getLogger(__name__)

# Maps hidden states (B, T, H), the labels of the token after each (B, T; -100 where ignored), and
# the head at hand to a dict of tensors.
HeadObjective = Callable[[Tensor, Tensor, "HeadAtHand"], dict[str, Tensor]]


class NotComputed:
    """Stands for a field that `attach_head` was not asked for: what uses it, gets one clear error.

    Args:
        name: Name of the field.
    """

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *_: Any, **__: Any) -> Any:
        name = vars(self).get("_name")  # a copy is asked for methods before it has its name
        raise AttributeError(
            f"The fused head did not compute `{name}`: name it in `outputs=` of "
            "`attach_head`, or attach with `llmmix.attach_heads(trainer)`, which asks for what the "
            "trainer reads."
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse

    def __repr__(self) -> str:
        return "not computed"


@dataclass
class FusedHeadOutput(ModelOutput):
    """The output of a model with the fused head. Per-token fields are zero where the label is -100.

    A per-token field that `attach_head` was not asked for raises an AttributeError when it is used.

    Args:
        loss: Negative log-likelihood summed over scored tokens, divided by `num_items_in_batch`
            (their count when it is not given), plus the weighted router loss of an MoE model.
        log_probs: (B, T-1), or (B, T) with `shift_labels`: log p of each next token.
        entropy: Same shape; entropy of the next-token distribution in nats.
        log_sum_sq_probs: Same shape; log of the sum of squared probabilities.
        mean_logits: Same shape; mean of the logits over the vocabulary.
        is_top1: Same shape; whether the label is the most likely token.
        label_mask: Same shape; whether the label counts.
        aux_loss: Router load-balancing loss, when the model returns router logits.
        objective: What `head_objective` returned.
    """

    # Three are always given, but `ModelOutput` allows no second field without a default
    loss: Tensor = None  # type: ignore[assignment]
    log_probs: Tensor = None  # type: ignore[assignment]
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor = None  # type: ignore[assignment]
    aux_loss: Tensor | None = None
    objective: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Past `__setattr__`, which would make them items of the output
        fields = vars(self)
        fields.update({name: NotComputed(name) for name in STATISTICS if fields[name] is None})

    def __setattr__(self, name: str, value: Any) -> None:
        # A copy passes them on
        super().__setattr__(name, None if isinstance(value, NotComputed) else value)


def attach_head(
    model: nn.Module,
    *,
    outputs: tuple[str, ...] = ("log_probs",),
    memory_budget: int | None = None,
) -> None:
    """Make `model(..., labels=y, fused_lm_head=True)` return a `FusedHeadOutput`.

    Works before or after PEFT wraps the model, and over a head that TRL attached. Attaching again
    replaces `outputs`. Saving, loading and generation are untouched. Attach before the model is
    prepared, which a trainer does when training begins: `bf16=True` wraps autocast around the
    forward that the model has then.

    Args:
        model: A causal language model, or a `PeftModel` around one.
        outputs: Per-token fields to compute, names of `llmmix.logprobs.STATISTICS`.
        memory_budget: Bytes of probabilities that each call of a trained head may keep between
            forward and backward, which saves the backward a matrix product; 0 for none,
            `llmmix.logprobs.MEMORY_BUDGET` by default. The choice is logged at level INFO.

    Raises:
        TypeError: The model has no output embeddings to take log-probabilities from.
    """
    base = causal_lm(model)
    own_forward = _own_forward(base)

    # `generate` checks its arguments against the signature of the model's own forward
    @functools.wraps(type(base).forward)
    def forward(self, *args, fused_lm_head=False, head_objective=None, **kwargs):
        """The model's own forward, or with `fused_lm_head=True` a `FusedHeadOutput`."""
        if fused_lm_head:
            return _fused_forward(self, outputs, memory_budget, head_objective, *args, **kwargs)
        return own_forward(self, *args, **kwargs)

    forward.own_forward = own_forward  # type: ignore[attr-defined]  # found by `_own_forward`
    base.forward = types.MethodType(forward, base)


def causal_lm(model: Any, argument: str = "model") -> PreTrainedModel:
    """The model that `attach_head` attaches to: `model` itself, or what PEFT has wrapped.

    Raises:
        TypeError: It has no output embeddings to take log-probabilities from.
    """
    base = model
    if is_peft_available():
        from peft import PeftModel

        base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
        raise TypeError(
            f"`{argument}` must be a Hugging Face causal language model with an output embedding, "
            f"got {type(model).__name__}."
        )
    return base


def _own_forward(model: PreTrainedModel) -> Callable:
    """The model's forward without a head of ours, as a function of the model.

    It is not a bound method: in a deep copy, a bound method would still run the original model.
    """
    forward = model.forward
    if hasattr(forward, "own_forward"):
        return forward.own_forward
    if isinstance(forward, types.MethodType):
        return forward.__func__
    return lambda _, *args, **kwargs: forward(*args, **kwargs)


def _fused_forward(
    model: PreTrainedModel,
    outputs: tuple[str, ...],
    memory_budget: int | None,
    objective: HeadObjective | None,
    *args,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs,
) -> FusedHeadOutput:
    """Run the backbone, then the head at the scored positions alone."""
    if labels is None and shift_labels is None:
        raise ValueError("`fused_lm_head=True` needs `labels`: pass the token ids, -100 ignored.")
    config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    backbone = model.base_model(*args, **kwargs)
    head = HeadAtHand(model.get_output_embeddings(), _head_scaling(config), memory_budget)
    hidden, labels = _shift(backbone.last_hidden_state, labels, shift_labels, head.device)
    mask = labels != -100
    # Only scored positions reach the head
    rows = head.statistics(hidden[mask], labels[mask], outputs)
    extra = None if objective is None else objective(hidden, labels, head)
    fields = _scatter(rows, mask)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -fields["log_probs"].sum() / count
    aux_loss: Any = None  # typed upstream as if it could be an int
    if kwargs.get("output_router_logits"):
        aux_loss = load_balancing_loss_func(
            backbone.router_logits,
            config.num_experts,
            config.num_experts_per_tok,
            kwargs.get("attention_mask"),
        )
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedHeadOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, objective=extra, **fields)


def _shift(
    hidden: Tensor, labels: Any, shift_labels: Any, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Hidden states and the label each predicts, on the head's device.

    Either `labels` or `shift_labels` is given.
    """
    if shift_labels is None:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels
    return hidden.to(device), labels.to(device)


def _scatter(rows: HeadStatistics, mask: Tensor) -> dict[str, Any]:
    # `masked_scatter` stays connected when nothing is scored: a zero loss that has a gradient
    return {
        name: None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x)
        for name, x in rows._asdict().items()
    }


def _head_scaling(config: PreTrainedConfig) -> HeadScaling:
    """How the model's own forward scales its logits, from the names configs use for it."""
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if scale is None:
            scale = getattr(config, name, None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        # Granite and MiniCPM3 divide by it; HyperCLOVA X multiplies
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return HeadScaling(
        logit_scale=1.0 if scale is None else scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


class HeadAtHand:
    """The head of the forward that is under way, as a `HeadObjective` gets it."""

    def __init__(self, head: Any, scaling: HeadScaling, memory_budget: int | None):
        self._head, self._scaling, self._memory_budget = head, scaling, memory_budget
        self.device = head.weight.device

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of targets (N,) or (N, K), given hidden states (N, H)."""
        return self.statistics(hidden, targets).log_probs

    def statistics(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...] = ("log_probs",)
    ) -> HeadStatistics:
        """`linear_statistics` of hidden states (N, H) and targets (N,) or (N, K)."""
        hidden, weight, bias = _as_product(self._head, hidden)
        with gathered(weight, bias):
            if weight.requires_grad and torch.is_grad_enabled():
                _log_choice(keeps_probabilities(hidden, weight, self._memory_budget))
            return linear_statistics(
                hidden,
                weight,
                targets,
                bias=bias,
                scaling=self._scaling,
                outputs=outputs,
                memory_budget=self._memory_budget,
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) logits as the softmax takes them, in fp32, for what needs the whole vocabulary.

        They are held for the backward. The weights of the head must be whole on every process.
        """
        hidden, weight, bias = _as_product(self._head, hidden)
        scale, softcap, temperature = self._scaling
        logits = F.linear(hidden, weight, bias).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits / temperature


def _as_product(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias whose linear product is what the module `head` computes.

    Raises:
        ValueError: The head carries a PEFT adapter that is not a plain product.
    """
    if is_peft_available():
        from peft.tuners.lora import Linear as LoraLinear
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(head, LoraLinear):
            return _with_lora(head, hidden)
        if isinstance(head, BaseTunerLayer):
            raise ValueError(
                f"The output head carries a PEFT adapter ({type(head).__name__}) that the fused "
                "head cannot compute. Remove the head from `target_modules`, or use LoRA there."
            )
    # `modules_to_save` and `trainable_token_indices` wrap the head and expose its weight
    return hidden, whole(head.weight), whole(getattr(head, "bias", None))


def _with_lora(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """W h + s B A h is one product: [W, B] times [h, s A h]."""
    base = head.get_base_layer()
    if head.disable_adapters or head.merged:
        return hidden, whole(base.weight), whole(base.bias)
    if head.lora_variant or any(head.lora_bias.values()):
        raise ValueError(
            "The LoRA adapter on the output head uses DoRA, a bias, or another variant, which the "
            "fused head cannot compute. Use plain LoRA there."
        )
    hiddens, weights = [hidden], [base.weight]
    for name in filter(head.lora_A.__contains__, head.active_adapters):
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
