"""A token loss with its settings, on what a forward of the fused head found."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmmix.head import FusedHeadOutput, HeadObjective
from llmmix.head_weights import HeadAtHand
from llmmix.processes import say_once, warn_once
from llmmix.token_losses.loss_table import LOSSES
from llmmix.token_losses.settings import TokenLossSettings
from llmmix.token_losses.weights import token_weight
from llmmix.training.means import Sums

WEIGHT, PROB = "token_losses/weight", "token_losses/prob"  # in the log


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

    def measured(self, output: FusedHeadOutput, arguments: Mapping[str, Any]) -> dict[str, Sums]:
        """(sum, count) of the weights w of a forward's tokens, and of their probabilities."""
        mask = output.label_mask
        weights = token_weight(self.loss_type, **arguments) * mask
        probs = output.log_probs.detach().exp() * mask
        return {WEIGHT: (weights.sum(), mask.sum()), PROB: (probs.sum(), mask.sum())}

    def tell_scale(self, args: TokenLossSettings) -> None:
        """Say once what a loss with weights does to the scale of the gradient, and of a bad q."""
        if self.loss.weighs and args.max_grad_norm:
            say_once(
                f"`loss_type={self.loss_type!r}` scales the gradient of each token by its weight "
                f"(`{WEIGHT}` in the log), while `max_grad_norm={args.max_grad_norm:g}` stays: "
                "clipping acts on other steps than under nll."
            )
        if (args.gce_q or 0.0) < 0:
            warn_once(
                f"`gce_q={args.gce_q:g}` is below 0: the weight p^q of an unlikely token has no "
                "bound. Use 0 (nll) or more, or clip by `max_grad_norm`."
            )

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
