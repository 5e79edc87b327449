"""The other model of asft, psft and select: what it says of a batch, before the model's forward.

    asft     KL(reference || model) at each token, over the whole vocabulary
    psft     log p of each token under a snapshot of the model, renewed every few optimizer steps
    select   log p of each token under a reference

The reference is the model as training first began (llmmix/frozen.py), or `reference_model`. It
reads the batch as the model does: the same positions, the same packed or unpadded row. That is one
more forward of a micro-batch, without gradients, dropout or checkpoints of activations.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from llmmix.frozen import FrozenModel, frozen_copy, is_spread_out, switches_off
from llmmix.head import FusedHeadOutput, HeadObjective, attach_head
from llmmix.head_weights import HeadAtHand
from llmmix.logprobs import HeadStatistics
from llmmix.precision import evaluating
from llmmix.processes import warn_once
from llmmix.rows.weights import take_weights
from llmmix.token_losses.losses import selected_counts
from llmmix.token_losses.objective import scattered
from llmmix.token_losses.reference_model import check_reference_model, load_reference_model
from llmmix.token_losses.snapshot import Snapshot
from llmmix.training.means import Sums


class TokenReference:
    """What a loss takes from another model."""

    def before(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], HeadObjective | None]:
        """What it says of the tokens of a batch, and what is to run with the model's head.

        Args:
            model: The trained model, as the trainer calls it.
            inputs: Its batch (B, T).

        Returns:
            (B, T-1) tensors by name, zero where nothing is scored; and the head objective or None.
        """
        raise NotImplementedError

    def count(self, batches: list[dict], tokens: Tensor | int | None) -> Tensor | int | None:
        """What the losses of a window are divided by: its scored tokens on all processes."""
        return tokens

    def metrics(self, output: FusedHeadOutput, needs: Mapping[str, Any]) -> dict[str, Sums]:
        """(sum, count) of what is logged of it, from a forward and what `before` said."""
        return {}

    def save(self, checkpoint: str) -> None:
        """Write into a checkpoint what a resumed run cannot make again."""

    def resume(self, checkpoint: str) -> None:
        """Take it from there."""


def token_reference(trainer: Any, peft_config: Any = None) -> TokenReference | None:
    """The reference of a trainer whose loss needs one, made before the first step.

    Args:
        trainer: The trainer, whose head is attached.
        peft_config: What it made its adapter of; None where it made none.

    Raises:
        ValueError: FSDP or DeepSpeed spread the model, and a copy of it is needed; the adapter has
            virtual tokens; `reference_model` has another vocabulary; or psft's forwards are noisy.
        FileNotFoundError: There is no such `reference_model`.
    """
    args = trainer.args
    if args.loss_type == "psft":
        _check_whole(trainer, "psft's snapshot")
        return PSFTReference(trainer, Snapshot(trainer, args.psft_snapshot_steps))
    if args.loss_type == "select":
        return SelectReference(trainer, _reference(trainer, peft_config), args.select_share)
    if args.loss_type == "asft" and args.asft_alpha:
        return ASFTReference(_reference(trainer, peft_config))
    return None


def _reference(trainer: Any, peft_config: Any) -> FrozenModel:
    """The model that a trainer's loss compares with."""
    args, own = trainer.args, None
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"`loss_type={args.loss_type!r}` compares with a model without the virtual tokens of "
            f"{type(peft_config).__name__}, and so position by position with others. Use LoRA."
        )
    if args.reference_model is not None:
        _check_whole(trainer, f"`reference_model={args.reference_model!r}`")
        check_reference_model(args, trainer.processing_class)
        own = load_reference_model(args, trainer.model)
        own = own.to(trainer.accelerator.device).requires_grad_(False).eval()
    elif not switches_off(peft_config):
        _check_whole(trainer, "the copy of the model that it compares with")
        own = frozen_copy(trainer.model)
    if own is not None:
        attach_head(own, padding_free=args.padding_free)
    return FrozenModel(trainer, own)


def _check_whole(trainer: Trainer, what: str) -> None:
    """Refuse a model beside the trained one where no process has it whole."""
    if is_spread_out(trainer):
        loss_type = getattr(trainer.args, "loss_type", None)
        raise ValueError(
            f"`loss_type={loss_type!r}`: {what} is not spread over processes as FSDP and DeepSpeed "
            "spread the model. Use DDP; or, for asft and select without `reference_model`, train a "
            "new adapter (`use_peft`), which is switched off instead."
        )


class ASFTReference(TokenReference):
    """The divergence from a reference, exact and with no (N, V) logits held.

    Args:
        frozen: The reference.
    """

    def __init__(self, frozen: FrozenModel):
        self._frozen = frozen

    def before(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], HeadObjective]:
        """Run the reference for the hidden states of its scored tokens, and compare in the head."""
        answered: list[tuple[Tensor, HeadAtHand]] = []

        def hand_out(hidden: Tensor, labels: Tensor, head: HeadAtHand) -> dict[str, Any]:
            states = hidden[labels != -100]
            answered.append((states, head))
            # In place of its head's pass: what compares reads its weight
            return {"statistics": HeadStatistics(states.new_zeros(len(states)))}

        with self._frozen.running(model) as reference:
            reference(**inputs, fused_lm_head=True, head_objective=hand_out)
        ((states, reference_head),) = answered

        def diverge(hidden: Tensor, labels: Tensor, head: HeadAtHand) -> dict[str, Any]:
            mask = labels != -100
            there = states.to(hidden.device)
            statistics, kl = head.statistics_and_kl(
                hidden[mask], labels[mask], there, reference_head
            )
            return {"statistics": statistics, "kl": scattered(kl, mask)}

        return {}, diverge

    def metrics(self, output: FusedHeadOutput, needs: Mapping[str, Any]) -> dict[str, Sums]:
        """The divergence of a token, in nats."""
        divergence = (output.objective or {})["kl"].detach()
        return {"token_losses/kl": (divergence.sum(), output.label_mask.sum())}


def _token_logps(frozen: FrozenModel, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(B, T-1) log p of each token under a model that stands still; 0 where nothing is scored."""
    with frozen.running(model) as reference:
        return reference(**inputs, fused_lm_head=True).log_probs


class PSFTReference(TokenReference):
    """Log-probabilities under a snapshot of the model.

    Args:
        trainer: The trainer.
        snapshot: The snapshot.
    """

    def __init__(self, trainer: Trainer, snapshot: Snapshot):
        self.snapshot = snapshot
        self._limit = 1 + trainer.args.psft_clip[1]  # type: ignore[attr-defined]

    def before(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], None]:
        """Run the snapshot."""
        return {"old_log_probs": _token_logps(self.snapshot.frozen, model, inputs)}, None

    def metrics(self, output: FusedHeadOutput, needs: Mapping[str, Any]) -> dict[str, Sums]:
        """The share of tokens whose probability has risen by so much that they stop."""
        ratio = (output.log_probs.detach() - needs["old_log_probs"].to(output.log_probs)).exp()
        stopped = (ratio > self._limit) & output.label_mask
        return {"token_losses/clipped": (stopped.sum(), output.label_mask.sum())}

    def save(self, checkpoint: str) -> None:
        """Write the snapshot."""
        self.snapshot.save(checkpoint)

    def resume(self, checkpoint: str) -> None:
        """Take the snapshot from there."""
        self.snapshot.resume(checkpoint)


class SelectReference(TokenReference):
    """Log-probabilities under a reference, and how many tokens of a window are selected.

    The count is known before the window's first forward, for it goes by the lengths of the rows:
    the share of each row, or all tokens while the model still is its reference, where every score
    is 0 and selects nothing. Until the two first differ, they are compared on a micro-batch.

    Args:
        trainer: The trainer.
        frozen: The reference.
        share: Share of a row's tokens that are selected.
    """

    def __init__(self, trainer: Any, frozen: FrozenModel, share: float):
        self._trainer, self._frozen, self._share = trainer, frozen, share
        self._apart = False  # whether the model was seen to differ from the reference
        self._told = False

    def before(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], None]:
        """Run the reference."""
        if not self._trainer.model.training:  # an evaluation has no window
            self._look(model, inputs)
        logps = _token_logps(self._frozen, model, inputs)
        return {"ref_log_probs": logps, "share": self._share if self._apart else 1.0}, None

    def count(self, batches: list[dict], tokens: Tensor | int | None) -> Tensor | int | None:
        """The tokens that are selected, on all processes."""
        trainer = self._trainer
        if not batches:
            return tokens
        self._look(trainer.model_wrapped, trainer._prepare_inputs(batches[0]))
        if not self._apart:
            return tokens
        masks = (batch["labels"][:, 1:] != -100 for batch in batches)
        counts = [selected_counts(mask.sum(1), self._share).sum() for mask in masks]
        total = torch.stack(counts).sum().to(trainer.accelerator.device)
        if trainer.args.average_tokens_across_devices:
            total = trainer.accelerator.gather(total.unsqueeze(0)).sum()
        return total

    def _look(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Note whether model and reference differ on a batch, on any process."""
        if self._apart:
            return
        trainer = self._trainer
        inputs, _ = take_weights(inputs)
        with evaluating(model, trainer):
            own = model(**inputs, fused_lm_head=True).log_probs
        differs = (own != _token_logps(self._frozen, model, inputs)).any()
        self._apart = bool(trainer.accelerator.gather(differs.view(1)).any())
        if not self._apart and not self._told:
            self._told = True
            warn_once(
                "`loss_type='select'`: the model still is its reference, so that no token stands "
                "out. All are trained on until it has moved."
            )
