"""The snapshot of psft: the model as it was up to so many optimizer steps ago.

The trained weights alone are copied. All micro-batches of an optimizer step see one snapshot, and
so does a run that is resumed: a checkpoint that lies between two renewals holds it.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmmix.files import replacing
from llmmix.frozen import FrozenModel, frozen_copy
from llmmix.head import attach_head
from llmmix.processes import warn_once
from llmmix.training.completeness import STATE

FILE = "psft_snapshot.safetensors"


class Snapshot(TrainerCallback):
    """A copy of the trained weights, renewed every few optimizer steps.

    Args:
        trainer: The trainer, whose model loses its dropout: under a fresh snapshot every ratio of
            probabilities is 1.
        every: Optimizer steps after which it is renewed.

    Raises:
        ValueError: `neftune_noise_alpha` is set.
    """

    def __init__(self, trainer: Any, every: int):
        if trainer.args.neftune_noise_alpha is not None:
            raise ValueError(
                "`loss_type='psft'` compares two forwards of a batch, which the noise of "
                "`neftune_noise_alpha` would set apart. Leave it out."
            )
        model: Any = trainer.model
        if switch_off_dropout(model):
            warn_once(
                "`loss_type='psft'` compares two forwards of a batch: dropout is switched off in "
                "both."
            )
        self._trainer, self._model, self._every = trainer, model, every
        copied: Any = frozen_copy(model)
        attach_head(copied, padding_free=trainer.args.padding_free)
        self.frozen = FrozenModel(trainer, copied)
        self._copied: nn.Module = copied
        trainer.add_callback(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Renew it, before the first micro-batch of a step."""
        if state.global_step % self._every == 0:
            self.frozen.renew(self._model)

    def save(self, checkpoint: str) -> None:
        """Write it into a checkpoint, unless the step after it begins with a new one."""
        if not self._trainer.args.should_save or not self._trainer.state.global_step % self._every:
            return
        kept = {name: weight.detach().contiguous() for name, weight in self._weights().items()}
        with replacing(Path(checkpoint, FILE)) as path:
            save_file(kept, path)

    def resume(self, checkpoint: str) -> None:
        """Take it from a checkpoint, unless the step after it begins with a new one.

        Raises:
            ValueError: The checkpoint holds none, and lies between two renewals.
        """
        state = Path(checkpoint, STATE)
        if not state.is_file():
            return  # transformers refuses it, or has nothing to go on from but weights
        step = json.loads(state.read_bytes())["global_step"]
        if step % self._every == 0:
            return
        path = Path(checkpoint, FILE)
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint} holds no {FILE}, as a run with "
                f"`loss_type='psft'` leaves it between two snapshots, and its step {step} is no "
                f"multiple of `psft_snapshot_steps={self._every}`. Set that to a divisor of {step}."
            )
        saved, weights = load_file(path, device="cpu"), self._weights()
        if saved.keys() != weights.keys():
            raise ValueError(
                f"`resume_from_checkpoint`: {path} holds other weights than this run trains."
            )
        for name, weight in weights.items():
            weight.data.copy_(saved[name])

    def _weights(self) -> dict[str, nn.Parameter]:
        """The weights that are not those of the model itself, by name."""
        shared = {id(weight) for weight in self._model.parameters()}
        named = self._copied.named_parameters()
        return {name: weight for name, weight in named if id(weight) not in shared}


def switch_off_dropout(model: nn.Module) -> bool:
    """Set every rate of dropout in a model to zero; whether there was one."""
    found = False
    for module in model.modules():
        names = [name for name in vars(module) if "dropout" in name]
        names += ["p"] * ("Dropout" in type(module).__name__)
        for name in names:
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                found = True
    return found
