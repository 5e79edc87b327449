"""`MixtureCallback`: connects a sampler, and the method that moves its weights, to a trainer.

The trainer then reads the sampler's rows (llmmix/mixing/loader.py), the method is followed step by
step (llmmix/mixing/steering.py), the trainer's checkpoints hold the state of both, and
OUTPUT_DIR/mixture.jsonl records the run (llmmix/mixing/record.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from accelerate.logging import get_logger
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from llmmix.mixing.accounts import DrawAccount
from llmmix.mixing.controllers import Controller
from llmmix.mixing.loader import MixtureLoader
from llmmix.mixing.record import MixtureRecord
from llmmix.mixing.rows import by_target, locate_rows, mean_scored_tokens
from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.signals import Signals
from llmmix.mixing.steering import Steering
from llmmix.training.resuming import ResumedCallback

logger = get_logger(__name__)


class MixtureCallback(ResumedCallback):
    """Connects a sampler, and the controller that moves its weights, to a trainer.

    Args:
        sampler: Sampler of the trainer's rows.
        make_controller: Makes the controller from (domains, targets, weights). None: the weights
            stay as they are.
        targets: Validation rows by name, as the trainer prepared them. Default: the trainer's
            `eval_dataset`, by name or by its column `domain`.
        measured_rows: Maximum number of rows of each target that are measured, the same rows every
            time. None: all.
        measure: "nll" for the loss per token, "loss" for the trainer's own, or "auto".

    Attributes:
        controller: The controller, once the callback is attached.
        signals: Measures the model; None where a fixed mixture has no targets.
    """

    method = "fixed shares"  # for the model's card
    paper: tuple[str, str] | None = None  # title and arXiv id of the method
    measures_losses = True  # whether the controller needs targets
    trainer: Trainer
    loader: MixtureLoader
    _steering: Steering

    def __init__(
        self,
        sampler: MixtureSampler,
        make_controller: Callable[[list[str], list[str], np.ndarray], Controller] | None = None,
        *,
        targets: Mapping[str, Any] | None = None,
        measured_rows: int | None = 32,
        measure: str = "auto",
    ):
        self.sampler, self._make_controller = sampler, make_controller
        self.controller: Controller | None = None
        self.signals: Signals | None = None
        self._targets, self._measured_rows, self._measure = targets, measured_rows, measure
        self._begun = False

    def bind(self, trainer: Trainer) -> None:
        """Have a trainer, which `attach_mixture` has checked, read the sampler's rows.

        Raises:
            ValueError: Targets are given to a method that measures none, are missing, or cannot
                be measured; or `locate_rows` or `mean_scored_tokens` refuses the rows.
        """
        self.trainer, sampler = trainer, self.sampler
        locate = locate_rows(trainer, sampler)
        if sampler.unit == "tokens" and sampler.tokens_per_row is None:
            sampler.tokens_per_row = mean_scored_tokens(trainer.train_dataset, sampler.names)
        writes = trainer.is_world_process_zero()
        self._record = MixtureRecord(str(trainer.args.output_dir), writes)
        self._draws = DrawAccount(sampler, trainer, self._record)
        self.signals = self._bind_targets()
        if self._make_controller:
            targets = self.signals.targets if self.signals else []
            self.controller = self._make_controller(sampler.names, targets, sampler.weights)
            self._fresh = self.controller.state_dict()
        # All checks have passed: the trainer is changed from here on
        own_loader = trainer.get_train_dataloader

        def get_train_dataloader() -> MixtureLoader:
            self.loader = MixtureLoader.of_trainer(trainer, sampler, own_loader(), locate)
            return self.loader

        # On the instance alone: other trainers of the class keep their loader
        trainer.get_train_dataloader = get_train_dataloader  # type: ignore[method-assign,assignment]
        trainer.args.ignore_data_skip = True  # the sampler keeps its position

    def _bind_targets(self) -> Signals | None:
        """Signals on the targets' rows; None for a fixed mixture that has none."""
        given = self.trainer.eval_dataset if self._targets is None else self._targets
        if self._targets is not None and not self.measures_losses:
            raise ValueError(f"`targets`: {type(self).__name__} measures no losses of targets.")
        fixed = self._make_controller is None
        if fixed and getattr(self.trainer, "padding_free", False):
            return None
        try:
            targets = by_target(given, self.sampler.names)
        except ValueError:
            if fixed:
                return None
            if self.measures_losses:
                raise
            targets = {}
        return Signals(self.trainer, targets, rows=self._measured_rows, measure=self._measure)

    # A run begins, or goes on

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the run, or continue the one that is resumed.

        Raises:
            ValueError: The checkpoint holds no state of this callback.
        """
        name, saved = type(self).__name__, cast(dict, state.stateful_callbacks)
        if state.global_step and not saved.get(name, {}).get("attributes"):
            raise ValueError(
                f"`resume_from_checkpoint`: the checkpoint holds no state of {name}: it was "
                "written without this mixture. Begin a new run, or resume with the method that "
                "wrote it."
            )
        super().on_train_begin(args, state, control, **kwargs)
        if not state.global_step:
            self._record.start(self._header())
            self._steering.extend(0)

    def begin(self) -> None:
        """Reset the state, as another run may have left some."""
        self.sampler.reset()
        if self.controller:
            self.controller.load_state_dict(self._fresh)
        self._draws.begin()
        parts = self.controller, self.sampler, self.signals, self.loader, self._draws, self._record
        self._steering = Steering(*parts, self.trainer.state.max_steps)
        self._begun = True

    def saved(self) -> dict:
        """The state for a checkpoint; empty before a run has begun."""
        if not self._begun:
            return {}
        return {**self._steering.state_dict(), "record": self._record.lines}

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: The checkpoint is of another mixture (see `Steering.load_state_dict`).
        """
        header = self._header()
        self._steering.load_state_dict(saved, state.global_step)
        self._draws.begin()
        self._record.go_on(saved["record"], state.global_step, header)
        self._steering.extend(state.global_step)  # a finished run may be given more steps

    def _header(self) -> dict:
        return {
            "domains": self.sampler.names,
            "rows": self.sampler.sizes.tolist(),
            "targets": self.signals.targets if self.signals else [],
            "method": self._steering.method,
            "draws_a_step": self.loader.draws_a_step,
            "weights": self.sampler.weights.tolist(),
        }

    # Events of the trainer

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note the step's learning rate, and take a signal that is due before the update."""
        learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        self._steering.before_update(state.global_step, learning_rate)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record what was drawn, and follow the plan to the next step."""
        self._draws.note(state.global_step)
        # A resumed run would count its first epoch from the checkpoint; logs need the run's epoch
        whole, part = divmod(state.global_step - 1, self.loader.steps_an_epoch)
        state.epoch = whole + (part + 1) / self.loader.steps_an_epoch
        self._steering.after_step(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop training where the domains have too few rows left for a step."""
        if self.loader.ended and state.global_step < state.max_steps:
            logger.warning(
                "The domains have too few rows left for a step: training ends after %d of %d "
                "steps. Draws by domain: %s.",
                state.global_step,
                state.max_steps,
                self.sampler.counts,
            )
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the shares drawn, the validation losses, and what measuring cost."""
        lines = [self._draws.summary(), *self._steering.finish(state.global_step)]
        self.loader.close()
        if state.is_world_process_zero:
            print("\n".join(lines), flush=True)
