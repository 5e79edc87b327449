"""The model before unlearning: its adapter switched off, its log-probabilities kept, or a copy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import SFTTrainer

from llmmix.data import pad
from llmmix.frozen import FrozenModel, frozen_copy, is_spread_out
from llmmix.head import FusedHeadOutput
from llmmix.precision import evaluating
from llmmix.rows.prompts import Encoded
from llmmix.unlearning.parts import forward_parts, select
from llmmix.unlearning.rows import ForgetRows

KINDS = ("auto", "adapter", "precomputed", "copy")


class Reference:
    """The reference model of a trainer, made before the first step.

    Args:
        trainer: The trainer whose model, as it is now, is the reference.
        kind: One of `KINDS`; `auto` takes the first of them that serves.
        fresh_adapter: Whether the trainer's own new adapter is all that is trained.
        logps_of_training_rows_suffice: Whether nothing else will be asked for.

    Raises:
        ValueError: The kind does not serve this run, or parameters are spread over processes.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        kind: str,
        *,
        fresh_adapter: bool,
        logps_of_training_rows_suffice: bool,
    ):
        if kind == "auto":
            rest = "precomputed" if logps_of_training_rows_suffice else "copy"
            kind = "adapter" if fresh_adapter else rest
        if kind == "adapter" and not fresh_adapter:
            raise ValueError(
                "`reference='adapter'` switches a new adapter off, and none is made here that "
                "leaves the weights as they are: set `use_peft` (`peft_config`), or another "
                "`reference`."
            )
        if kind == "precomputed" and not logps_of_training_rows_suffice:
            raise ValueError(
                "`reference='precomputed'` keeps log-probabilities of the training rows, and this "
                "run needs more: another loss's, or evaluation rows'. Use 'copy', or LoRA with "
                "'adapter'."
            )
        if kind != "adapter" and is_spread_out(trainer):
            raise ValueError(
                f"`reference={kind!r}` needs the model whole on every process, which FSDP and "
                "DeepSpeed do not leave it. Train an adapter (`use_peft`): it is switched off."
            )
        self.kind, self._trainer = kind, trainer
        self._logps: dict[tuple[str, int, int], float] = {}
        own: Any = trainer.model
        self._frozen = FrozenModel(trainer, frozen_copy(own) if kind == "copy" else None)
        trainer.accelerator.wait_for_everyone()

    def model(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The reference, to be called like the model, without gradients and without dropout."""
        return self._frozen.running(model)

    def forward(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        parts: Sequence[str],
        wanted: Sequence[str],
        **options: Any,
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], FusedHeadOutput]:
        """`forward_parts` of the reference on those parts of a batch that are wanted."""
        with self.model(model) as reference:
            return forward_parts(reference, select(batch, parts, wanted), wanted, **options)

    def logps(
        self, model: nn.Module, batch: dict[str, Tensor], parts: Sequence[str], part: str
    ) -> Tensor:
        """(B,) summed log-probabilities of a part's answers under the reference.

        Raises:
            ValueError: Log-probabilities were kept from before the first step, and one is missing.
        """
        if self.kind != "precomputed":
            found, _ = self.forward(model, batch, parts, [part])
            return found[part][0].sum(1)
        numbers = batch["template_number"].tolist()
        keys = zip(batch["row"].tolist(), numbers, strict=True)
        asked = [(part, row, number * (part == "template")) for row, number in keys]
        if missing := [key for key in asked if key not in self._logps]:
            raise ValueError(
                f"`reference='precomputed'` kept nothing for {missing[0]} (part, row, template), "
                "which `train` did not foresee. Use `reference='copy'`."
            )
        return torch.tensor([self._logps[key] for key in asked], device=batch["row"].device)

    def precompute(self, rows: ForgetRows, epochs: int, parts: Sequence[str]) -> None:
        """Keep the log-probabilities that so many epochs will ask for, computed by all processes.

        Only the first call computes anything: later the model has changed.
        """
        if self.kind != "precomputed" or self._logps:
            return
        trainer = self._trainer
        sequences: dict[tuple[str, int, int], Encoded] = {}
        for row in range(len(rows)):
            sequences["forget", row, 0] = rows.forget[row]
            if "template" in parts:
                for number in {rows.template_of(row, epoch) for epoch in range(epochs)}:
                    sequences["template", row, number] = rows.template(row, number)
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        mine = sorted(sequences, key=lambda key: len(sequences[key].ids))[rank::world]
        size = trainer.args.per_device_eval_batch_size
        found: list[tuple[tuple[str, int, int], float]] = []
        model = trainer.accelerator.unwrap_model(trainer.model)
        with evaluating(model, trainer):
            for start in range(0, len(mine), size):
                keys = mine[start : start + size]
                batch = pad([sequences[key] for key in keys])
                batch = {name: x.to(model.device) for name, x in batch.items()}
                answered, _ = forward_parts(model, batch, ["forget"])
                found += zip(keys, answered["forget"][0].sum(1).tolist(), strict=True)
        self._logps = dict(gather_object(found))
