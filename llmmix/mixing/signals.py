"""Measures what a controller is told: losses by domain, excess over a reference, gradients.

A loss is the mean negative log-likelihood of scored tokens, in nats and in eval mode. Validation
losses (llmmix/mixing/targets.py) are taken on the same rows every time, so that two measurements
differ by the model alone. Every process measures its part, and all get the same numbers.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from transformers import Trainer

from llmmix.mixing.measuring import MeasuredModel, fused_head, token_logps
from llmmix.mixing.targets import TargetLosses
from llmmix.precision import evaluating

StepBatches = list[tuple[np.ndarray, dict]]  # (rows,) domains, and the micro-batch


class Signals:
    """Measures a trainer's model; llmmix/mixing/controllers.py lists the `SIGNALS`.

    Args:
        trainer: Trainer whose model, collator and precision are used.
        targets: Validation rows by name, as the trainer prepared them.
        rows: Maximum number of rows of each target, evenly spaced. None: all.
        measure: "nll" is the loss per token; "loss" is the trainer's own, for rows without labels
            (preferences, rows to forget); "auto" is "nll" where rows have labels.

    Attributes:
        targets: Names of the targets.
        measure: "nll" or "loss".
        reference: Model with which the signal "excess" compares; None until it is set.

    Raises:
        ValueError: TRL joins the rows of a batch, a target has no rows or no scored token, or
            `measure` is unknown.
    """

    def __init__(
        self,
        trainer: Trainer,
        targets: Mapping[str, Any],
        *,
        rows: int | None = 32,
        measure: str = "auto",
    ):
        if getattr(trainer, "padding_free", False):
            raise ValueError(
                "TRL's `padding_free` and `packing` join a batch into one row, which mixes the "
                "losses of its domains. Leave them off; `attach_heads(trainer, padding_free=True)` "
                "computes no padding, and keeps rows apart."
            )
        self.trainer, self._measured = trainer, MeasuredModel(trainer)
        self._losses = TargetLosses(trainer, targets, rows, measure)
        self.targets, self.measure = self._losses.names, self._losses.measure
        self.reference: nn.Module | None = None

    def take(
        self,
        name: str,
        kept: StepBatches,
        domains: int,
        loader: Callable[[int], list[dict]] | None = None,
    ) -> dict[str, np.ndarray]:
        """A signal by its name, the same on every process.

        Args:
            name: A key of `SIGNALS`.
            kept: For each micro-batch of the step, the domains (rows,) and the batch.
            domains: Number m of domains.
            loader: For "gradients": returns rows of a domain by its index.

        Raises:
            ValueError: `name` is unknown; or it is "excess" and there is no reference; or it is
                "gradients" and there is no `loader`, or the model is spread over processes.
        """
        model = self._measured.module
        own_loss = name == "losses" and self.measure == "loss"
        head = nullcontext() if own_loss else self._head(model)
        with evaluating(model, self.trainer, gradients=name == "gradients"), head:
            if name == "gradients":
                found = self._gradients(loader, domains)
            else:
                found = {name: self._without_gradients(name, kept, domains)}
        return {key: broadcast(value).cpu().numpy() for key, value in found.items()}

    def _head(self, model: nn.Module) -> AbstractContextManager[None]:
        return fused_head(model, padding_free=getattr(self.trainer.args, "padding_free", False))

    def _without_gradients(self, name: str, kept: StepBatches, domains: int) -> Tensor:
        if name == "losses":
            return self._losses.take()
        if name == "train":
            return self._by_domain(kept, domains, lambda batch, logps: -logps)
        if name == "excess":
            return self._by_domain(kept, domains, self._excess)
        raise ValueError(f"`name` must be a key of `SIGNALS`, got {name!r}.")

    # Signals of the batch of a step

    def _excess(self, batch: dict, logps: Tensor) -> Tensor:
        if self.reference is None:
            raise ValueError("`reference` is None: the signal 'excess' needs a model to compare.")
        with self._head(self.reference):
            return (token_logps(self.reference, batch)[0] - logps).clamp(min=0)

    def _by_domain(
        self, kept: StepBatches, domains: int, measure: Callable[[dict, Tensor], Tensor]
    ) -> Tensor:
        """(m,) mean over each domain's tokens of a value a token; NaN where the step has none."""
        sums = self._measured.zeros(2, domains)
        for drawn, batch in kept:
            batch = self._measured.to_device(batch)
            logps, mask = token_logps(self._measured.module, batch)
            numbers = torch.as_tensor(drawn, device=sums.device)
            values = measure(batch, logps) * mask
            sums[0].index_add_(0, numbers, values.double().sum(1))
            sums[1].index_add_(0, numbers, mask.double().sum(1))
        sums = self._measured.sum(sums)
        return torch.where(sums[1] > 0, sums[0] / sums[1], torch.nan)

    # Gradients

    def _gradients(
        self, loader: Callable[[int], list[dict]] | None, domains: int
    ) -> dict[str, Tensor]:
        """Products and norms; every process takes the same rows, so nothing is exchanged."""
        if loader is None:
            raise ValueError("`loader` is None: the signal 'gradients' needs rows of each domain.")
        kind = self.trainer.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"Gradients by domain need the whole model on each process, and {kind} spreads it."
            )
        parameters = [p for p in self._measured.module.parameters() if p.requires_grad]
        gradients = [self._gradient(parameters, loader(domain)) for domain in range(domains)]
        products = self._measured.zeros(domains, domains)
        for i, j in np.ndindex(domains, domains):
            pairs = zip(gradients[i], gradients[j], strict=True)
            products[i, j] = sum((a * b).sum() for a, b in pairs)
        return {"products": products, "norms": products.diagonal().sqrt()}

    def _gradient(self, parameters: list[nn.Parameter], rows: list[dict]) -> list[Tensor]:
        """Gradient of the mean loss of rows, computed a micro-batch at a time."""
        size = self.trainer.args.per_device_train_batch_size
        tokens: int | Tensor = 0
        total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for start in range(0, len(rows), size):
            collated = self.trainer.data_collator(rows[start : start + size])
            logps, mask = token_logps(self._measured.module, self._measured.to_device(collated))
            tokens = tokens + mask.sum()
            found = torch.autograd.grad(-logps.sum(), parameters, allow_unused=True)
            for whole, part in zip(total, found, strict=True):
                if part is not None:
                    whole += part
        return [whole / tokens for whole in total]
