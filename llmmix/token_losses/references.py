"""The other model of asft, psft and select: what it says of a batch, before the model's forward."""

from typing import Protocol

from torch import Tensor, nn
from trl import SFTTrainer

from llmmix.head import HeadObjective
from llmmix.token_losses.config import TokenLossConfig
from llmmix.token_losses.loss_table import LOSSES


class TokenReference(Protocol):
    """What a loss takes from another model."""

    def before(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], HeadObjective | None]:
        """What it says of a batch's tokens, (B, T-1) each, and what is to run with the head."""

    def count(self, batches: list[dict], tokens: Tensor | int | None) -> Tensor | int | None:
        """What the losses of a window are divided by, given its scored tokens on all processes."""


def token_reference(trainer: SFTTrainer, args: TokenLossConfig) -> TokenReference | None:
    """The reference of a trainer whose loss needs one, made before the first step.

    Raises:
        NotImplementedError: The loss needs one.
    """
    if LOSSES[args.loss_type].reference:
        raise NotImplementedError(f"`loss_type={args.loss_type!r}` needs a reference.")
    return None
