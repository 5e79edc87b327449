"""`MixtureCallback`: what keeps a sampler and what moves its weights in step with a trainer.

It has the trainer read a sampler's rows, its steps steered (llmmix/mixing/steering.py), all of it
saved and restored with the trainer's checkpoints, and writes OUTPUT_DIR/mixture.jsonl.
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
from llmmix.trainers import ResumedCallback

logger = get_logger(__name__)


class MixtureCallback(ResumedCallback):
    """Keeps a sampler and what moves its weights in step with a trainer.

    Args:
        sampler: Sampler of the trainer's rows.
        make_controller: (domains, targets, weights) to what decides the weights; without one they
            stay as they are.
        targets: Validation rows by name, as the trainer prepared them; by default the trainer's
            `eval_dataset`, by name or by its column `domain`.
        measured_rows: Maximum number of rows of each target that are measured, the same every
            time; None for all.
        measure: "nll" a token, the trainer's own "loss", or "auto".

    Attributes:
        controller: What decides the weights, once the callback is attached.
        signals: What measures the model, None where a fixed mixture has no targets.
    """

    measures_losses = True  # whether the controller cannot do without targets
    trainer: Trainer
    loader: MixtureLoader
    _steering: Steering  # of the run

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
        """Take over a trainer's rows, which `attach_mixture` has found in order.

        Raises:
            ValueError: Targets are given to a method that measures none, or are missing or cannot
                be measured; `locate_rows` or `mean_scored_tokens` refuses the rows.
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

        # Of this trainer alone, whose class stays as it is
        trainer.get_train_dataloader = get_train_dataloader  # type: ignore[method-assign,assignment]
        trainer.args.ignore_data_skip = True  # the sampler knows where it was; nothing is replayed

    def _bind_targets(self) -> Signals | None:
        """Find the rows that losses are measured on, which a fixed mixture can do without."""
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
        """Begin anew, or where the run that is resumed had come.

        Raises:
            ValueError: The checkpoint holds no state of this callback.
        """
        name, saved = type(self).__name__, cast(dict, state.stateful_callbacks)
        if state.global_step and not saved.get(name, {}).get("attributes"):
            raise ValueError(
                f"`resume_from_checkpoint`: the checkpoint holds no state of {name}: it was "
                "written without this mixture. Begin anew, or resume with what wrote it."
            )
        super().on_train_begin(args, state, control, **kwargs)
        if not state.global_step:
            self._record.start(self._header())
            self._steering.extend(0)

    def begin(self) -> None:
        """Forget what another run left."""
        self.sampler.reset()
        if self.controller:
            self.controller.load_state_dict(self._fresh)
        self._draws.begin()
        parts = self.controller, self.sampler, self.signals, self.loader, self._draws, self._record
        self._steering = Steering(*parts, self.trainer.state.max_steps)
        self._begun = True

    def saved(self) -> dict:
        """What a checkpoint keeps, nothing before a run has begun."""
        if not self._begun:
            return {}
        return {**self._steering.state_dict(), "record": self._record.lines}

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: The checkpoint is of another mixture, as `Steering.load_state_dict` says.
        """
        header = self._header()
        self._steering.load_state_dict(saved, state.global_step)
        self._draws.begin()
        self._record.go_on(saved["record"], state.global_step, header)
        self._steering.extend(state.global_step)  # a run that had ended goes on

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
        """Note the step's learning rate; measure what is to be measured before its update."""
        learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        self._steering.before_update(state.global_step, learning_rate)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record what was drawn, and go on to what is due."""
        self._draws.note(state.global_step)
        # A resumed run counts its first epoch from the checkpoint on; what it logs must not
        whole, part = divmod(state.global_step - 1, self.loader.steps_an_epoch)
        state.epoch = whole + (part + 1) / self.loader.steps_an_epoch
        self._steering.after_step(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop where the domains hold no further step."""
        if self.loader.ended and state.global_step < state.max_steps:
            logger.warning(
                "The domains hold no further step: training ends after %d of %d steps. Draws by "
                "domain: %s.",
                state.global_step,
                state.max_steps,
                self.sampler.counts,
            )
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was drawn, what the losses are now, and what the estimation cost."""
        lines = [self._draws.summary(), *self._steering.finish(state.global_step)]
        self.loader.close()
        if state.is_world_process_zero:
            print("\n".join(lines), flush=True)
