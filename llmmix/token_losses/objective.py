"""A token loss with its settings, on what a forward of the fused head found."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmmix.head import FusedHeadOutput, HeadObjective
from llmmix.head_weights import HeadAtHand
from llmmix.token_losses.loss_table import LOSSES
from llmmix.token_losses.settings import TokenLossSettings
from llmmix.token_losses.weights import token_weight


class TokenObjective:
    """The loss that a config asks for.

    Args:
        args: The config.
        vocabulary: Number of tokens that the model knows.

    Attributes:
        loss: Its row of the table.
        head: What `attach_heads` is to be asked for.
        head_objective: What is to run with the head for it, if anything.
    """

    def __init__(self, args: TokenLossSettings, vocabulary: int):
        self.loss_type, self.loss = args.loss_type, LOSSES[args.loss_type]
        self._settings = {name: getattr(args, name) for name in self.loss.settings}
        self._vocabulary = vocabulary
        self.head: dict[str, Any] = {"extra": self.loss.outputs}
        if top_k := self._settings.get("eaft_top_k"):
            self.head = {"extra": ("top_k_entropy",), "top_k": min(top_k, vocabulary)}
        finders = {"above_mean": _above_mean, "tempered_log_probs": self._tempered}
        name = self.loss.found_by_head
        self.head_objective: HeadObjective | None = None if name is None else finders[name]

    def arguments(
        self, output: FusedHeadOutput, needs: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """The arguments of the loss's function, from a forward.

        Args:
            output: The output of the head, with what `head_objective` found.
            needs: What a reference found before, (B, T) each.
        """
        found = {**vars(output), **(output.objective or {}), **(needs or {})}
        found |= {"mask": output.label_mask, "vocabulary": self._vocabulary}
        return self.loss.arguments(found, **self._settings)

    def __call__(self, output: FusedHeadOutput) -> Tensor:
        """(B, T) the loss of each token, of a loss that needs no other model."""
        return self.losses(self.arguments(output), output.label_mask)

    def losses(self, arguments: Mapping[str, Any], mask: Tensor) -> Tensor:
        """(B, T) the loss of each token, zero where nothing is scored."""
        return self.loss.loss(**arguments) * mask

    def weights(self, arguments: Mapping[str, Any], mask: Tensor) -> Tensor:
        """(B, T) the weight w of each token, detached, zero where nothing is scored."""
        return token_weight(self.loss_type, **arguments) * mask

    def _tempered(self, hidden: Tensor, labels: Tensor, head: HeadAtHand) -> dict[str, Any]:
        """Log-probabilities at gem's temperature; those that are logged need no gradient."""
        mask, beta = labels != -100, self._settings["gem_beta"]
        states, targets = hidden[mask], labels[mask]
        with torch.no_grad():
            statistics = head.statistics(states, targets, head.outputs)
        found = head.statistics(states, targets, temperature=beta).log_probs
        return {"statistics": statistics, "tempered_log_probs": scattered(found, mask)}


def _above_mean(hidden: Tensor, labels: Tensor, head: HeadAtHand) -> dict[str, Tensor]:
    """How far the logit of each label is above the mean logit."""
    mask = labels != -100
    return {"above_mean": scattered(head.above_mean(hidden[mask], labels[mask]), mask)}


def scattered(found: Tensor, mask: Tensor) -> Tensor:
    """(N,) of the scored positions to (B, T), zero elsewhere; connected where nothing is scored."""
    return found.new_zeros(mask.shape).masked_scatter(mask, found)


def together(*objectives: HeadObjective | None) -> HeadObjective | None:
    """One head objective that gives what several give."""
    given = [objective for objective in objectives if objective is not None]
    if len(given) < 2:
        return given[0] if given else None

    def objective(hidden: Tensor, labels: Tensor, head: HeadAtHand) -> dict[str, Any]:
        return {k: v for each in given for k, v in each(hidden, labels, head).items()}

    return objective
