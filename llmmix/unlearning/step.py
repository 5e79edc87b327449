"""A micro-batch of unlearning after its forward: what a forget or a retain term may ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmmix.head import FusedHeadOutput
from llmmix.unlearning.parts import logits_of, row_weights
from llmmix.unlearning.references import Reference

Terms = tuple[Tensor, Tensor]  # losses, and what each counts in their mean


@dataclass
class Step:
    """A micro-batch after its forward.

    Attributes:
        model: The model of the forward.
        batch: Padded rows of all parts.
        parts: Token log-probabilities and masks (B, T-1) of each part, in the order of the batch.
        output: The model's answer.
        reference: The model before unlearning, where the loss has one.
        hidden: (B, T, d) hidden states of each part, where the loss keeps them.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    parts: dict[str, Terms]
    output: FusedHeadOutput
    reference: Reference | None = None
    hidden: dict[str, Tensor] = field(default_factory=dict)

    @property
    def before(self) -> Reference:
        """The model before unlearning.

        Raises:
            ValueError: The loss asks for a reference that its row in the table does not name.
        """
        if self.reference is None:
            raise ValueError("This loss has no reference: name one in its row of `LOSSES`.")
        return self.reference

    def logps(self, part: str) -> Tensor:
        """(B,) summed log-probabilities of the answers of a part."""
        return self.parts[part][0].sum(1)

    def lengths(self, part: str) -> Tensor:
        """(B,) number of scored tokens of the answers of a part."""
        return self.parts[part][1].sum(1)

    def ref_logps(self, part: str) -> Tensor:
        """(B,) summed log-probabilities under the reference."""
        return self.before.logps(self.model, self.batch, tuple(self.parts), part)

    def ref_logits(self, part: str) -> Tensor:
        """(N, V) logits of the reference at the scored positions of a part."""
        objective = logits_of([part], [part])
        _, output = self.before.forward(
            self.model, self.batch, tuple(self.parts), [part], head_objective=objective
        )
        return (output.objective or {})[part]

    def labels(self, part: str) -> Tensor:
        """(B, T) labels of a part."""
        return self.batch["labels"].chunk(len(self.parts))[list(self.parts).index(part)]

    def answers(self, part: str) -> Tensor:
        """(B, T), true at the tokens of the answers."""
        return self.labels(part) != -100

    def row_weights(self, part: str) -> Tensor:
        """(B,) what the loss of each row of a part is multiplied by, as the data says; else 1.

        The three below do so. What they count stays as it is.
        """
        return row_weights(self.batch, tuple(self.parts))[part]

    def by_row(self, losses: Tensor, part: str = "forget") -> Terms:
        """Losses of rows, each counted once if it has something to score."""
        return losses * self.row_weights(part), self.parts[part][1].any(1).float()

    def by_token(self, losses: Tensor, part: str = "forget") -> Terms:
        """Losses, each a mean over its row's tokens, counted by their number."""
        return losses * self.row_weights(part), self.lengths(part)

    def over_vocabulary(self, loss: Callable[..., Tensor], part: str, **others: Any) -> Terms:
        """A loss at each of the N scored positions of a part, each counted once.

        Args:
            loss: A function of `logits` (N, 1, V), `labels` (N, 1) and the others (N, 1, ...).
            part: A part whose logits the forward kept.
            **others: Tensors of (N, ...), and values.
        """
        labels = self.labels(part)[:, 1:]
        labels = labels[labels != -100]
        logits = (self.output.objective or {})[part]
        others = {n: x.unsqueeze(1) if isinstance(x, Tensor) else x for n, x in others.items()}
        found = loss(logits.unsqueeze(1), labels=labels.unsqueeze(1), **others)
        weights = self.row_weights(part).repeat_interleave(self.lengths(part))
        return found * weights.to(found), torch.ones_like(found)
