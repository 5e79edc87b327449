"""Attach the fused head of `llmmix.logprobs` to any Hugging Face causal language model.

After `attach_head(model)`, `model(..., labels=labels, fused_lm_head=True)` answers with per-token
log-probabilities instead of logits, as TRL's own fused head does and with the same fields, so that
TRL's trainers run on it too. Every other call, generation included, is the model's own.

The head runs inside the model's forward: DDP, FSDP and gradient checkpointing see one module and
one forward. A trainer that needs more than log-probabilities (SFTMix mixes hidden states) passes
`head_objective`, a function that the forward calls with the hidden states and the head at hand.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput, is_peft_available

from llmmix.fused.sharding import is_spread
from llmmix.head_check import check_answers, has_weights
from llmmix.head_weights import HeadAtHand, head_scaling
from llmmix.logprobs import STATISTICS, HeadStatistics
from llmmix.padding_free import PaddingFree, backbone_of

# Maps hidden states (B, T, H), the labels of the token after each (B, T; -100 where ignored), and
# the head at hand to a dict of tensors. Under "statistics" it may return a `HeadStatistics` of the
# scored tokens, in order, which it has made on its way: the forward then makes none.
HeadObjective = Callable[[Tensor, Tensor, HeadAtHand], dict[str, Any]]

# Names of the number of experts, in models and configs
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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
        top_k_entropy: Same shape; entropy over the `top_k` most likely tokens alone, renormalised.
        label_mask: Same shape; whether the label counts.
        aux_loss: Router load-balancing loss, when the model returns router logits.
        objective: What `head_objective` returned, without its "statistics".
    """

    # Three are always given, but `ModelOutput` allows no second field without a default
    loss: Tensor = None  # type: ignore[assignment]
    log_probs: Tensor = None  # type: ignore[assignment]
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    top_k_entropy: Tensor | None = None
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
    padding_free: bool = False,
    top_k: int = 20,
) -> None:
    """Make `model(..., labels=y, fused_lm_head=True)` return a `FusedHeadOutput`.

    Works before or after PEFT wraps the model, and over a head that TRL attached. Attaching again
    replaces `outputs`. Saving, loading and generation are untouched. Attach before the model is
    prepared, which a trainer does when training begins: `bf16=True` wraps autocast around the
    forward that the model has then.

    The head's answer is compared with the model's own logits once, at eight positions: here, or at
    the first forward where the weights are not whole before it.

    Args:
        model: A causal language model, or a `PeftModel` around one.
        outputs: Per-token fields to compute, names of `llmmix.logprobs.STATISTICS`.
        memory_budget: Bytes of probabilities that each call of a trained head may keep between
            forward and backward, which saves the backward a matrix product; 0 for none,
            `llmmix.logprobs.MEMORY_BUDGET` by default. The choice is logged at level INFO.
        padding_free: Run the backbone on the tokens of a padded batch alone, as one row in which
            each sequence sees itself. All that comes out has the shape of the padded batch. How the
            model can do so is found as the answer is compared: see `llmmix.padding_free`.
        top_k: The most likely tokens that `top_k_entropy` is over.

    Raises:
        TypeError: The model has no output embeddings to take log-probabilities from, or has an
            encoder.
        ValueError: `outputs` has an unknown name; the model's own log-probabilities or router
            loss are others than the head's; or it cannot run without padding.
    """
    _check_outputs(outputs)
    base = causal_lm(model)
    own_forward = _own_forward(base)
    compared = getattr(base.forward, "compared", set[str]())
    unpadding = PaddingFree(model) if padding_free else None

    def compare(model: PreTrainedModel) -> None:
        fused = functools.partial(_fused_forward, model)
        try:
            check_answers(model, own_forward, fused)
        except ValueError:
            if "forward" not in vars(model) or getattr(model, "hf_device_map", None):
                raise
            # In a deep copy, the forward that TRL has put on the original still runs the original
            check_answers(model, type(model).forward, fused)
        compared.add("once")

    # `generate` checks its arguments against the signature of the model's own forward
    @functools.wraps(type(base).forward)
    def forward(self, *args, fused_lm_head=False, head_objective=None, **kwargs):
        """The model's own forward, or with `fused_lm_head=True` a `FusedHeadOutput`."""
        if fused_lm_head:
            if "forward" not in compared:
                if is_spread(self) or "once" not in compared:  # on all processes, or on none
                    compare(self)
                compared.add("forward")
            _settle(unpadding, self, attaching=False)
            kwargs.update(padding_free=unpadding, top_k=top_k)
            return _fused_forward(self, outputs, memory_budget, head_objective, *args, **kwargs)
        return own_forward(self, *args, **kwargs)

    forward.own_forward = own_forward  # type: ignore[attr-defined]  # found by `_own_forward`
    forward.compared = compared  # type: ignore[attr-defined]
    if has_weights(base) and not is_spread(base):
        if "once" not in compared:
            compare(base)
        _settle(unpadding, base, attaching=True)
    base.forward = types.MethodType(forward, base)


def _check_outputs(outputs: tuple[str, ...]) -> None:
    if unknown := set(outputs) - set(STATISTICS):
        raise ValueError(
            f"`outputs` must be names among {', '.join(STATISTICS)}, got "
            f"{', '.join(map(repr, sorted(unknown)))}."
        )


def _settle(unpadding: PaddingFree | None, model: PreTrainedModel, attaching: bool) -> None:
    if unpadding is not None:
        unpadding.settle(model, functools.partial(_fused_forward, model), attaching)


def causal_lm(model: Any, argument: str = "model") -> PreTrainedModel:
    """The model that `attach_head` attaches to: `model` itself, or what PEFT has wrapped.

    Raises:
        TypeError: It has no output embeddings to take log-probabilities from, or has an encoder.
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
    if base.config.is_encoder_decoder:
        raise TypeError(
            f"`{argument}` must be a causal language model, got {type(base).__name__}, which has "
            "an encoder: its labels are not the next tokens of its input."
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
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    padding_free: PaddingFree | None = None,
    top_k: int = 20,
    **kwargs: Any,
) -> FusedHeadOutput:
    """Run the backbone, then the head at the scored positions alone."""
    if labels is None and shift_labels is None:
        raise ValueError("`fused_lm_head=True` needs `labels`: pass the token ids, -100 ignored.")
    config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    row = None if padding_free is None else padding_free.row(model, args, kwargs)
    backbone = backbone_of(model)(*args, **(kwargs if row is None else row.inputs))
    states = backbone.last_hidden_state if row is None else row.padded(backbone.last_hidden_state)
    embedding, scaling = model.get_output_embeddings(), head_scaling(config)
    head = HeadAtHand(embedding, scaling, memory_budget, outputs, top_k)
    hidden, labels = _shift(states, labels, shift_labels, head.device)
    labels = labels if row is None else row.predicted(labels)
    mask = labels != -100
    extra = None if objective is None else objective(hidden, labels, head)
    rows = None if extra is None else extra.pop("statistics", None)
    if rows is None:  # only scored positions reach the head
        rows = head.statistics(hidden[mask], labels[mask], outputs)
    fields = _scatter(rows, mask)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -fields["log_probs"].sum() / count
    aux_loss: Any = None  # typed upstream as if it could be an int
    if kwargs.get("output_router_logits"):
        kept = None if row is not None else kwargs.get("attention_mask")
        aux_loss = _router_loss(model, backbone, kept)
        coefficient = _first(model, ("router_aux_loss_coef", "aux_loss_coef"))
        loss = loss + (coefficient or 0.0) * aux_loss
    return FusedHeadOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, objective=extra, **fields)


def _router_loss(model: PreTrainedModel, backbone: Any, attention_mask: Tensor | None) -> Any:
    """The load-balancing loss of an MoE model.

    Raises:
        ValueError: The model has no routers, or does not say how many experts they have.
    """
    logits = getattr(backbone, "router_logits", None)
    experts, each = _first(model, EXPERTS), _first(model, ("num_experts_per_tok",))
    if not logits or experts is None or each is None:
        raise ValueError(
            f"`output_router_logits=True` asks for a router loss that {type(model).__name__} does "
            "not have. Set it to False, in the model's config too; TRL's trainers set it there "
            "unless you give them `router_aux_loss_coef=0`."
        )
    return load_balancing_loss_func(logits, experts, each, attention_mask)


def _first(model: PreTrainedModel, names: tuple[str, ...]) -> Any:
    """The first of some attributes that the model, or else its config, has."""
    places = (model, model.config.get_text_config())
    found = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in found if value is not None), None)


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
