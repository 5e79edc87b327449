"""What a controller is told about the model: losses by domain, excess over a reference, gradients.

Losses are sums of negative log-likelihoods over scored tokens divided by their number, in nats, in
eval mode, on the same rows every time, so that two measurements differ by the model alone. Rows of
all domains share few forward passes through the fused head. Every process measures its part, and
all go on with the same numbers.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast
from torch import Tensor
from transformers import Trainer

from llmmix.data import batches_of_tokens
from llmmix.head import attach_head
from llmmix.mixing.draws import uniforms
from llmmix.models import eval_mode

BATCH_TOKENS = 8192  # padded, of a forward pass that measures
MEASURES = ("auto", "nll", "loss")


class Signals:
    """Measures a trainer's model; `SIGNALS` of llmmix/mixing/controllers.py says what.

    Args:
        trainer: Whose model, collator and precision it takes.
        targets: Validation rows by name, as the trainer prepared them.
        rows: At most so many of each, evenly spaced; None for all.
        measure: "nll" a token, or the trainer's own "loss" a batch of one target, for rows that
            are no sequences with labels (preferences, rows to forget); "auto" decides by that.

    Raises:
        ValueError: A target without rows, or without a scored token.
    """

    def __init__(
        self,
        trainer: Trainer,
        targets: Mapping[str, Sequence],
        *,
        rows: int | None = 32,
        measure: str = "auto",
    ):
        if getattr(trainer, "padding_free", False):
            raise ValueError(
                "`padding_free` makes one row of a batch, and the losses of domains are then not "
                "told apart. Set it (and `packing`) to False."
            )
        if measure not in MEASURES:
            raise ValueError(f"`measure` must be one of {MEASURES}, got {measure!r}.")
        self.trainer, self.targets = trainer, list(targets)
        self.reference: torch.nn.Module | None = None  # of `excess`
        self._rows: list[tuple[int, dict]] = []  # target, row
        for number, (name, given) in enumerate(targets.items()):
            if not len(given):
                raise ValueError(
                    f"`eval_dataset`: the target {name!r} has no rows to measure its loss on. Give "
                    "it some, or leave it out of the targets."
                )
            loader = trainer.get_eval_dataloader(given)
            self._collate, dataset = loader.collate_fn, loader.dataset
            count = len(dataset) if rows is None else min(rows, len(dataset))
            chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
            self._rows += [(number, dataset[row]) for row in chosen]
        if measure == "auto" and self._rows:
            measure = "nll" if {"labels", "input_ids"} <= set(self._rows[0][1]) else "loss"
        self.measure = measure
        if measure == "nll":
            self._check_scored()

    def _check_scored(self) -> None:
        scored = np.zeros(len(self.targets))
        for number, row in self._rows:
            scored[number] += sum(label != -100 for label in row["labels"][1:])
        if not scored.all():
            empty = [name for name, n in zip(self.targets, scored, strict=True) if not n]
            raise ValueError(
                f"`eval_dataset`: no row of {empty} has a scored token (labels other than -100)."
            )

    def take(self, name: str, kept: list[tuple[np.ndarray, dict]], domains: int, loader=None):
        """A signal by its name, the same on every process.

        Args:
            name: A key of `SIGNALS`.
            kept: Domains (rows,) and batch of each micro-batch of the step.
            domains: m.
            loader: For `gradients`, rows of each domain: domain -> rows.
        """
        model = self.trainer.model
        own_loss = name == "losses" and self.measure == "loss"
        head = nullcontext() if own_loss else fused_head(model)
        with eval_mode(model), head, self.trainer.accelerator.autocast():
            if name == "gradients":
                found = self._gradients(loader, domains)
            else:
                with torch.no_grad():
                    found = {name: getattr(self, f"_{name}")(kept, domains)}
        return {key: broadcast(value).cpu().numpy() for key, value in found.items()}

    # On validation rows

    def _losses(self, kept, domains) -> Tensor:
        if self.measure == "loss":
            return self._trainer_losses()
        lengths = [len(row["input_ids"]) for _, row in self._rows]
        groups = self._share(batches_of_tokens(lengths, BATCH_TOKENS))
        sums = self._zeros(2, len(self.targets))
        for group, counts in groups:
            batch = self._to_device(self._collate([self._rows[i][1] for i in group]))
            numbers = torch.tensor([self._rows[i][0] for i in group], device=sums.device)
            logps, mask = _token_logps(self.trainer.model, batch)
            sums[0].index_add_(0, numbers, -logps.double().sum(1) * counts)
            sums[1].index_add_(0, numbers, mask.double().sum(1) * counts)
        sums = self._sum(sums)
        return sums[0] / sums[1]

    def _trainer_losses(self) -> Tensor:
        size = self.trainer.args.per_device_eval_batch_size
        groups = []
        for number in range(len(self.targets)):
            own = [i for i, (target, _) in enumerate(self._rows) if target == number]
            groups += [own[start : start + size] for start in range(0, len(own), size)]
        sums = self._zeros(2, len(self.targets))
        with _metrics_kept(self.trainer):
            for group, counts in self._share(groups):
                batch = self._to_device(self._collate([self._rows[i][1] for i in group]))
                loss = self.trainer.compute_loss(self.trainer.model, batch)
                sums[:, self._rows[group[0]][0]] += (
                    counts
                    * len(group)
                    * torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
                )
        sums = self._sum(sums)
        return sums[0] / sums[1]

    # On the batch of a step

    def _train(self, kept, domains) -> Tensor:
        return self._by_domain(kept, domains, lambda batch, logps: -logps)

    def _excess(self, kept, domains) -> Tensor:
        def excess(batch, logps):
            with fused_head(self.reference):
                return (_token_logps(self.reference, batch)[0] - logps).clamp(min=0)

        return self._by_domain(kept, domains, excess)

    def _by_domain(self, kept, domains: int, measure) -> Tensor:
        sums = self._zeros(2, domains)
        for drawn, batch in kept:
            batch = self._to_device(batch)
            logps, mask = _token_logps(self.trainer.model, batch)
            numbers = torch.as_tensor(drawn, device=sums.device)
            values = measure(batch, logps) * mask
            sums[0].index_add_(0, numbers, values.double().sum(1))
            sums[1].index_add_(0, numbers, mask.double().sum(1))
        sums = self._sum(sums)
        return torch.where(sums[1] > 0, sums[0] / sums[1], torch.nan)

    # Gradients

    def _gradients(self, loader, domains: int) -> dict[str, Tensor]:
        """Every process takes the same rows: nothing is to be exchanged."""
        kind = self.trainer.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"Gradients by domain need the whole model on each process, and {kind} spreads it."
            )
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        gradients = [self._gradient(parameters, loader(domain)) for domain in range(domains)]
        products = self._zeros(domains, domains)
        for i, j in np.ndindex(domains, domains):
            pairs = zip(gradients[i], gradients[j], strict=True)
            products[i, j] = sum((a * b).sum() for a, b in pairs)
        return {"products": products, "norms": products.diagonal().sqrt()}

    def _gradient(self, parameters: list[Tensor], rows: list[dict]) -> list[Tensor]:
        """Of the mean loss of rows, a micro-batch at a time."""
        size, tokens = self.trainer.args.per_device_train_batch_size, 0
        total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for start in range(0, len(rows), size):
            batch = self._to_device(self.trainer.data_collator(rows[start : start + size]))
            logps, mask = _token_logps(self.trainer.model, batch)
            tokens = tokens + mask.sum()
            found = torch.autograd.grad(-logps.sum(), parameters, allow_unused=True)
            for whole, part in zip(total, found, strict=True):
                if part is not None:
                    whole += part
        return [whole / tokens for whole in total]

    # Processes

    def _share(self, groups: list[list[int]]) -> list[tuple[list[int], float]]:
        """This process's groups, each with 1; as many on every process, made up with 0."""
        rank, ranks = self.trainer.args.process_index, self.trainer.args.world_size
        mine = [(group, 1.0) for group in groups[rank::ranks]]
        return mine + [(groups[0], 0.0)] * (-(-len(groups) // ranks) - len(mine))

    def _sum(self, values: Tensor) -> Tensor:
        return self.trainer.accelerator.reduce(values, reduction="sum")

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.trainer.args.device)

    def _to_device(self, batch: dict) -> dict:
        device = self.trainer.args.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def rows_of(seed: int, step: int, domain: str, size: int, count: int) -> list[int]:
    """Rows of a domain to take a gradient on at a step, with replacement."""
    return (uniforms(seed, f"gradients {domain} {step}", 0, count) * size).astype(int).tolist()


@contextmanager
def fused_head(model: torch.nn.Module):
    """Our head for the time being; what answered before answers afterwards."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.__dict__.get("forward")
    attach_head(base)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


@contextmanager
def _metrics_kept(trainer: Trainer):
    """TRL's trainers note metrics in each call of the loss: a measurement's are forgotten."""
    before = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if before is not None:
            trainer._metrics = before


def _token_logps(model, batch: dict) -> tuple[Tensor, Tensor]:
    """(B, T-1) log-probabilities and where they count."""
    output = model(**batch, fused_lm_head=True)
    return output.log_probs, output.label_mask
