"""PDU: logits are flattened while the NLL on retained rows stays within a budget (2506.05314).

    loss = gamma mean (max z - mean z)^2 + lambda (retain NLL - epsilon)
    lambda <- max(0, lambda + eta (retain NLL - epsilon))     after each step

Arithmetic: `pdu_loss` and `pdu_multiplier` of llmmix/unlearning/losses.py.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmmix.training.resuming import ResumedCallback
from llmmix.unlearning.guards import UnlearningGuard
from llmmix.unlearning.losses import pdu_multiplier
from llmmix.unlearning.objective import Loss, Objective
from llmmix.unlearning.step import Step

if TYPE_CHECKING:
    from peft import PeftModel


class PDU(Objective):
    """The terms of pdu, whose retain term is weighted by a multiplier that moves.

    Args:
        loss: The row of pdu.
        model: The model to unlearn.
        accelerator: The trainer's accelerator.
        parts: Parts of a batch.
        epsilon: NLL a token that is allowed on retained rows.
        dual_step: eta.
        dual_warmup_epochs: Epochs before the multiplier moves.
        **options: What else `Objective` takes; `retain_weight` is the first value of the
            multiplier.
    """

    unweighted: ClassVar[Mapping[str, str]] = {
        "retain": "the budget `epsilon` of pdu is an NLL a token, which they would change. Take "
        "another loss"
    }

    def __init__(
        self,
        loss: Loss,
        model: "PreTrainedModel | PeftModel",
        accelerator: Accelerator,
        parts: Sequence[str],
        *,
        epsilon: float,
        dual_step: float,
        dual_warmup_epochs: float,
        **options: Any,
    ):
        super().__init__(loss, model, accelerator, parts, **options)
        self.epsilon, self.dual_step = epsilon, dual_step
        self.dual_warmup_epochs = dual_warmup_epochs
        self.multiplier = self.retain_weight

    @staticmethod
    def check(retain_loss: str | None, settings: Mapping[str, Any]) -> None:
        """Refuse pdu without `epsilon`, or with another retain loss than the NLL.

        Raises:
            ValueError: `epsilon` is not set, or `retain_loss` is not "nll".
        """
        if settings["epsilon"] is None or retain_loss != "nll":
            raise ValueError(
                "pdu holds the NLL a token on retained rows below `epsilon`: set it, such as to "
                "0.3 above what the model has now, and leave `retain_loss` at 'nll'."
            )

    def weigh(self, retained: Tensor, share: Tensor) -> Tensor:
        """Lambda (retain NLL - epsilon), of which a micro-batch has its share."""
        return self.multiplier * (retained - self.epsilon * share)

    def metrics(self, step: Step) -> dict[str, tuple[Tensor, Tensor]]:
        """The multiplier, beside what every loss logs."""
        value = torch.tensor(self.multiplier, device=step.batch["labels"].device)
        return super().metrics(step) | {"multiplier": (value, torch.ones_like(value))}

    def callbacks(self, guard: UnlearningGuard) -> list[TrainerCallback]:
        """The callback of dual ascent."""
        return [DualAscent(self, guard)]


class DualAscent(ResumedCallback):
    """Moves the multiplier after each step, by the step's own NLL on retained rows."""

    def __init__(self, objective: PDU, guard: UnlearningGuard):
        self.objective, self.guard = objective, guard

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step of dual ascent, after the warm-up."""
        pdu = self.objective
        if (state.epoch or 0.0) >= pdu.dual_warmup_epochs:
            retained = self.guard.step["retain_loss"]
            pdu.multiplier = pdu_multiplier(pdu.multiplier, retained, pdu.epsilon, pdu.dual_step)

    def begin(self) -> None:
        """Begin with the first value of the multiplier."""
        self.objective.multiplier = self.objective.retain_weight

    def saved(self) -> dict:
        """The multiplier, which a checkpoint keeps."""
        return {"value": self.objective.multiplier}

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Go on with the multiplier of the checkpoint."""
        self.objective.multiplier = saved["value"]
