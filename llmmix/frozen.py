"""A model that stands still beside the one that trains: the model as it was, or another one.

    adapter off   the trainer's own new adapter is switched off: no memory, no second model
    copy          trained weights are copied, frozen ones are shared with the model
    another       a model of its own

It runs in eval mode, without gradients and in the trainer's precision. A trainer makes its model
before it loads a checkpoint to resume from. So a copy that is made with the trainer is of the model
as training first began, in a resumed run too.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from llmmix.precision import evaluating

# LoRA's ways to begin that leave the weights below the adapter alone: PiSSA and its like do not
STARTS = (True, False, "gaussian")


def switches_off(peft_config: Any) -> bool:
    """Whether a model is as it was before once the new adapter of this config is switched off.

    Args:
        peft_config: What a trainer makes an adapter of; None where it makes none.
    """
    if peft_config is None:
        return False
    starts_apart = getattr(peft_config, "init_lora_weights", True) in STARTS
    return starts_apart and getattr(peft_config, "bias", "none") == "none"


def is_spread_out(trainer: Trainer) -> bool:
    """Whether FSDP or DeepSpeed leave no process the whole model, so that it cannot be copied."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that nothing trains; it shares the weights that are frozen already."""
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, frozen).requires_grad_(False).eval()


class FrozenModel:
    """A model that stands still beside the one that a trainer trains.

    Args:
        trainer: The trainer.
        model: The model, whole on every process; None for the trained one with its adapter off.
    """

    def __init__(self, trainer: Trainer, model: nn.Module | None = None):
        self._trainer, self.own = trainer, model

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model that stands still, to be called like the trained one.

        Args:
            model: The trained one, as the trainer calls it.

        Raises:
            ValueError: A weight that the two share is trained by now.
        """
        accelerator = self._trainer.accelerator
        with evaluating(model if self.own is None else self.own, self._trainer):
            if self.own is not None:
                if any(weight.requires_grad for weight in self.own.parameters()):
                    raise ValueError(
                        "A weight that was frozen when the trainer was made is trained now, and "
                        "its copy shares it. Choose what is trained before you make the trainer."
                    )
                yield self.own
                return
            # PEFT makes every weight of the adapter trainable when it is switched on again
            frozen = [weight for weight in model.parameters() if not weight.requires_grad]
            try:
                with accelerator.unwrap_model(model).disable_adapter():
                    yield model
            finally:
                for weight in frozen:
                    weight.requires_grad_(False)

    def renew(self, model: nn.Module) -> None:
        """Copy the trained weights of a model anew into the copy of it that this one runs."""
        if self.own is None:
            return
        with torch.no_grad():
            pairs = zip(self.own.parameters(), model.parameters(), strict=True)
            for kept, weight in pairs:
                if kept is not weight:
                    kept.copy_(weight)
