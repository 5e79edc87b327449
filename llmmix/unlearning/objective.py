"""A loss in its trainer: a row that says what it needs, and its two terms on a micro-batch.

total = forget_weight * forget term + retain_weight * retain term
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from llmmix.unlearning.guards import UnlearningGuard
from llmmix.unlearning.losses import kl_loss, nll_loss
from llmmix.unlearning.parts import forward_parts, logits_of
from llmmix.unlearning.references import Reference
from llmmix.unlearning.step import Step, Terms

if TYPE_CHECKING:
    from peft import PeftModel


class Objective:
    """The forget and the retain term of a loss, as most losses have them.

    A loss that does more than a function can, such as rmu and pdu, has a class of its own.

    Args:
        loss: The loss's row.
        model: The model to unlearn.
        accelerator: The trainer's accelerator.
        parts: Parts of a batch.
        retain_loss: `"nll"` or `"kl"`.
        retain_weight: alpha.
        cap: NLL of a token from which a capped loss pushes no further; None for none.
        **settings: The settings that the row names.

    Attributes:
        whole: Parts whose logits over the whole vocabulary it needs.
        settings: Keywords of the row's `forget`.
    """

    retains_by_row = False  # else the retain term is a mean over tokens
    # Rows that may have no `weight`, "forget" or "retain", and why
    unweighted: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        loss: "Loss",
        model: "PreTrainedModel | PeftModel",
        accelerator: Accelerator,
        parts: Sequence[str],
        *,
        retain_loss: str,
        retain_weight: float,
        cap: float | None,
        **settings: Any,
    ):
        self.loss, self.accelerator, self.parts = loss, accelerator, tuple(parts)
        self.retain_loss, self.retain_weight, self.cap = retain_loss, retain_weight, cap
        self.settings: dict[str, Any] = settings | ({"cap": cap} if loss.capped else {})
        to_reference = "retain" in parts and retain_loss == "kl"
        self.whole = ["forget"] * loss.logits + ["retain"] * to_reference

    @staticmethod
    def check(retain_loss: str | None, settings: Mapping[str, Any]) -> None:
        """Refuse settings that do not go with the loss, before any model is loaded."""

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], reference: Reference | None
    ) -> Step:
        """One forward over all parts."""
        whole = logits_of(self.parts, self.whole) if self.whole else None
        parts, output = forward_parts(model, batch, self.parts, whole)
        return Step(model, batch, parts, output, reference)

    def forget(self, step: Step) -> Terms:
        """The forget term: values, and what each counts in the mean."""
        return self.loss.forget(step, **self.settings)

    def retain(self, step: Step) -> Terms:
        """The retain term: values, and what each counts in the mean."""
        if self.retain_loss == "kl":
            return step.over_vocabulary(kl_loss, "retain", ref_logits=step.ref_logits("retain"))
        return step.by_token(nll_loss(*step.parts["retain"]), "retain")

    def weigh(self, retained: Tensor, share: Tensor) -> Tensor:
        """The retain term as it enters the loss.

        Args:
            retained: This micro-batch's part of the mean over the step.
            share: The weight of this micro-batch in that mean.
        """
        return self.retain_weight * retained

    def metrics(self, step: Step) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) of what is logged beside the terms."""
        if not self.loss.capped or self.cap is None:
            return {}
        logps, mask = step.parts["forget"]
        return {"capped": ((logps < -self.cap).sum(), mask.sum())}

    def callbacks(self, guard: UnlearningGuard) -> list[TrainerCallback]:
        """Callbacks to run after each step, when the guard has its means."""
        return []


@dataclass(frozen=True)
class Loss:
    """A row of the table of losses: what a loss reads, needs and takes, and its default settings.

    Attributes:
        forget: (step, **settings) -> its values on a micro-batch, and what each counts; from
            `Step.by_row`, `by_token` or `over_vocabulary`, which multiply by the rows' weights.
        paper: Title and arXiv id of its paper.
        reads: Parts of a batch that the forget term reads. The last is the one that it is a mean
            over.
        settings: Fields of `UnlearnConfig` that `objective` takes as keywords.
        reference: What it needs of the reference model: "logps", "logits", "hidden", or "".
        logits: Whether it needs the whole vocabulary of the rows to forget.
        token_mean: Whether it is a mean over the tokens of a step, or over its rows.
        capped: Whether `ascent_cap` bounds it: `forget` takes the NLL as `cap`.
        skips_tokens: Whether it leaves the first `skip_tokens` of an answer alone.
        retain_required: Whether it needs rows to retain whatever `retain_weight` is.
        forget_weight: gamma.
        retain_weight: alpha; 0 where it needs no rows to retain.
        retain_loss: "nll" or "kl".
        beta: beta; None where the loss has none.
        positive_beta: Whether beta must be above 0.
        objective: Class of its objective.
    """

    forget: Callable[..., Terms]
    paper: tuple[str, str] | None = None
    reads: tuple[str, ...] = ("forget",)
    settings: tuple[str, ...] = ()
    reference: str = ""
    logits: bool = False
    token_mean: bool = True
    capped: bool = False
    skips_tokens: bool = False
    retain_required: bool = False
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: str = "nll"
    beta: float | None = None
    positive_beta: bool = False
    objective: type[Objective] = Objective

    @property
    def subject(self) -> str:
        """The part that the forget term is a mean over."""
        return self.reads[-1]
