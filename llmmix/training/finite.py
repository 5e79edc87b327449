"""A run whose loss, gradient or weights are not finite ends, and says at which step and rows.

Transformers would log a loss of 0, train on, and save what is left (`logging_nan_inf_filter`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

ROWS_SHOWN = 4


def end_unless_finite(trainer: Trainer) -> None:
    """End a trainer's run once its loss, its gradient or its weights are infinite or not a number.

    Loss and gradient are checked before the weights move, once an optimizer step; weights before
    they are saved, and when training ends. In fp16 the gradient is left to the loss scaling, whose
    search begins with infinite ones. DeepSpeed moves the weights before its gradient is known.

    Args:
        trainer: Any trainer, before `train()`. One that is watched already stays as it is.
    """
    if any(isinstance(other, FiniteCallback) for other in trainer.callback_handler.callbacks):
        return
    callback = FiniteCallback(trainer)
    own_step, own_norm = trainer.training_step, trainer._get_grad_norm

    def training_step(model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
        loss = own_step(model, inputs, *args, **kwargs)
        callback.window.append((loss, inputs))
        return loss

    def grad_norm(*args: Any, **kwargs: Any) -> Any:
        norm = own_norm(*args, **kwargs)
        callback.check_step(norm)
        return norm

    trainer.add_callback(callback)
    trainer.args.logging_nan_inf_filter = False
    # On the instance alone: other trainers of the class keep theirs
    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer._get_grad_norm = grad_norm  # type: ignore[method-assign]


class FiniteCallback(TrainerCallback):
    """Looks at the losses, the gradient and the weights of a trainer; see `end_unless_finite`.

    Attributes:
        window: Loss and inputs of each micro-batch since the last optimizer step.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.window: list[tuple[Tensor, dict]] = []

    def check_step(self, norm: Any) -> None:
        """Look at the micro-batches of a step, and at the norm of their gradient.

        Raises:
            FloatingPointError: A loss or the norm is not finite.
        """
        losses, batches = [loss for loss, _ in self.window], [batch for _, batch in self.window]
        self.window = []
        values = [loss.float() for loss in losses]
        scaled = self._trainer.accelerator.mixed_precision == "fp16"
        if norm is not None and not scaled:
            norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            values.append(norm.to(losses[0].device, torch.float32))
        finite = torch.isfinite(torch.stack(values)).tolist()  # waits for the device once a step
        if all(finite):
            return
        bad = [number for number, fine in enumerate(finite[: len(losses)]) if not fine]
        if bad:
            what = f"The loss is {losses[bad[0]].item()}"
            of = f" in micro-batch {bad[0] + 1} of {len(losses)}" if len(losses) > 1 else ""
            batches = [batches[number] for number in bad]
        else:
            what, of = f"The norm of the gradient is {values[-1].item()}", ""
        step = self._trainer.state.global_step + 1
        if name := _not_finite(self._trainer.model, trained=False):
            raise FloatingPointError(
                f"{what} at step {step}{of}, since the model's weights are not finite before it "
                f"({name}): start from another checkpoint."
            )
        raise FloatingPointError(
            f"{what} at step {step}{of}. Its rows: {self._rows(batches)}. The weights are as they "
            "were before the step. Lower `learning_rate`, or look at these rows."
        )

    def _rows(self, batches: Sequence[dict]) -> str:
        """How the first rows of some micro-batches begin and end."""
        tokenizer: Any = self._trainer.processing_class
        ids = [row for batch in batches for row in batch.get("input_ids", [])]
        if tokenizer is None or not ids:
            return "unknown"
        texts = tokenizer.batch_decode(ids[:ROWS_SHOWN], skip_special_tokens=True)
        short = [t if len(t) <= 80 else f"{t[:38]} ... {t[-37:]}" for t in texts]
        more = f" and {len(ids) - ROWS_SHOWN} more" if len(ids) > ROWS_SHOWN else ""
        return ", ".join(map(repr, short)) + more

    def _check_weights(self, step: int) -> None:
        if name := _not_finite(self._trainer.model, trained=True):
            raise FloatingPointError(
                f"The weights are not finite after step {step} ({name}), and are not saved. Lower "
                "`learning_rate`, and go on from the last checkpoint or begin again."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with a step of which nothing is known."""
        self.window = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at weights that are about to be saved.

        Raises:
            FloatingPointError: A weight is not finite.
        """
        if control.should_save:
            self._check_weights(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at weights that are about to be saved; errors as in `on_step_end`."""
        self.on_step_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the last weights.

        Raises:
            FloatingPointError: A weight is not finite.
        """
        self._check_weights(state.global_step)


def _not_finite(model: Any, *, trained: bool) -> str | None:
    """The first parameter, or trained parameter, that holds something else than finite numbers."""
    named = [
        (name, p)
        for name, p in model.named_parameters()
        if p.is_floating_point() and p.numel() and (p.requires_grad or not trained)
    ]
    if not named:
        return None
    local = [(p.to_local() if isinstance(p, DTensor) else p).detach() for _, p in named]
    home = local[0].device
    finite = torch.stack([torch.isfinite(part).all().to(home) for part in local]).tolist()
    return next((name for (name, _), fine in zip(named, finite, strict=True) if not fine), None)
