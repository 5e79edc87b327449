"""A run whose loss or gradient is not finite ends, before its weights are touched."""

import torch
from torch import Tensor, nn
from transformers import Trainer


def end_unless_finite(trainer: Trainer) -> None:
    """End a trainer's run on a loss or a gradient norm that is infinite or not a number.

    Transformers would log a loss of 0 and go on (`logging_nan_inf_filter`).

    Args:
        trainer: Any trainer, before `train()`.
    """
    own_step, own_norm = trainer.training_step, trainer._get_grad_norm
    losses: list[Tensor] = []  # of the micro-batches of this step

    def training_step(*args, **kwargs) -> Tensor:
        loss = own_step(*args, **kwargs)
        losses.append(loss)
        return loss

    def grad_norm(model: nn.Module, grad_norm=None):
        norm = own_norm(model, grad_norm)
        values = torch.stack([*losses, torch.as_tensor(norm, device=losses[0].device)])
        losses.clear()
        if not torch.isfinite(values).all():
            step = trainer.state.global_step + 1
            raise FloatingPointError(f"The loss or its gradient is not finite at step {step}.")
        return norm

    trainer.args.logging_nan_inf_filter = False
    # On the instance alone, as for a mixture's loader: any trainer can be watched
    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer._get_grad_norm = grad_norm  # type: ignore[method-assign]
