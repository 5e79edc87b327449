"""How a run goes on from its checkpoints: which one, and what callbacks of ours keep in it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from llmmix.processes import main_process_says, warn_once
from llmmix.training.completeness import STATE, checkpoints_of, why_incomplete


def checkpoint_to_resume(
    training_args: TrainingArguments, stages: Sequence[str] = ()
) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for, the same on every rank.

    `auto` takes the newest complete checkpoint in `output_dir`, and starts where there is none.
    `true` takes it too, and refuses to start. A folder is taken if it is complete. Without a value,
    or with `false`, the run starts. Newer folders that are passed over are named in a warning.

    `trainer.train(resume_from_checkpoint=True)` takes the newest folder, complete or not: give it
    what this returns.

    Args:
        training_args: Settings of the run.
        stages: Subfolders of `output_dir` with the checkpoints of earlier stages: where there is
            one, `true` may start the last stage. `stage_to_resume` says where those go on.

    Returns:
        The folder, or None to start from nothing.

    Raises:
        ValueError: The folder given is not complete, or `true` finds no complete checkpoint.
    """
    asked, folder = _asked(training_args), Path(training_args.output_dir or ".")
    if asked == "false":
        _warn_of_earlier_run(folder)
        return None
    if asked not in ("auto", "true"):
        if fault := main_process_says(why_incomplete(Path(asked))):
            newest, _ = main_process_says(_look_through(Path(asked).parent))
            way_out = f"{newest} is the newest complete one" if newest else "None there is complete"
            raise ValueError(
                f"`resume_from_checkpoint`: {asked} cannot be resumed: {fault}. {way_out}."
            )
        return asked
    found = newest_checkpoint(folder, training_args.save_total_limit)
    if found or asked == "auto":
        return found
    begun = [_look_through(folder / stage)[0] for stage in stages]
    if not any(main_process_says(begun)):
        raise ValueError(
            f"`resume_from_checkpoint` is true, and {folder} holds no complete checkpoint. Give "
            "`auto`, which starts where there is none."
        )
    return None


def stage_to_resume(training_args: TrainingArguments) -> str | None:
    """The checkpoint that a stage of a longer run goes on from, in an `output_dir` of its own.

    A stage may be finished, half done or not begun: whatever the run was told, unless nothing or
    `false`, is read as `auto`.
    """
    if _asked(training_args) == "false":
        return None
    return newest_checkpoint(Path(training_args.output_dir or "."), training_args.save_total_limit)


def newest_checkpoint(folder: Path, save_total_limit: int | None = None) -> str | None:
    """The newest complete checkpoint in a folder, the same on every rank; None if there is none.

    The log names it, and the newer ones that are passed over, and why. With a `save_total_limit`,
    those that a kill left half-saved are deleted: transformers would keep the folder with the
    highest step, and delete what the run saves next.
    """
    found, passed_over = main_process_says(_look_through(folder))
    reasons = "; ".join(f"{name} ({fault})" for name, fault in passed_over.items())
    said = [f"Passed over in {folder}: {reasons}."] if passed_over else []
    if found:
        state = json.loads(Path(found, STATE).read_bytes())
        at = f"step {state['global_step']} of {state['max_steps']}"
        said.append(f"The run goes on from {found}, saved at {at}.")
    elif passed_over:
        said.append("The run starts from nothing.")
    if said:
        warn_once(" ".join(said))
    if save_total_limit and PartialState().is_main_process:
        for name in passed_over:
            if not (folder / name / STATE).exists():
                shutil.rmtree(folder / name)
    return found


def _look_through(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The newest complete checkpoint, and the names of newer ones with what they lack."""
    passed_over: dict[str, str] = {}
    for checkpoint in reversed(checkpoints_of(folder)):
        fault = why_incomplete(checkpoint)
        if fault is None:
            return str(checkpoint), passed_over
        passed_over[checkpoint.name] = fault
    return None, passed_over


def _asked(training_args: TrainingArguments) -> str:
    """What `resume_from_checkpoint` says: auto, true, false or a folder."""
    given = str(training_args.resume_from_checkpoint or "false")
    return given.lower() if given.lower() in ("auto", "true", "false") else given


def _warn_of_earlier_run(folder: Path) -> None:
    if earlier := checkpoints_of(folder):
        warn_once(
            f"{folder} holds checkpoints up to {earlier[-1].name}, and this run starts from "
            "nothing and saves among them. `--resume_from_checkpoint auto` goes on from the "
            "newest; for another run name another `--output_dir`."
        )


class ResumedCallback(TrainerCallback, ExportableState):
    """A callback whose state is saved in each checkpoint and restored by the run that resumes.

    Transformers restores a callback by making it again from plain values, which cannot be done for
    one that holds a trainer or a sampler. The user makes this one as for a fresh run.
    """

    def begin(self) -> None:
        """Discard the state of an earlier run."""

    def saved(self) -> dict:
        """The state that a checkpoint keeps, in JSON values."""
        raise NotImplementedError

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Go on from what `saved` gave when the checkpoint was written."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, or where the resumed run stopped."""
        # Declared as a list, which `TrainerState` turns into a dict when it is made
        callbacks: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        kept = callbacks.setdefault(type(self).__name__, self.state())
        self.begin()
        if state.global_step:
            self.resume(kept["attributes"], state)

    def state(self) -> dict:
        """The entry that transformers writes into `trainer_state.json`."""
        return {"args": {}, "attributes": self.saved()}


class TokenCount(ResumedCallback):
    """Keeps the count that TRL logs as `num_tokens`, which would begin anew in a resumed run."""

    def __init__(self, trainer: Trainer):
        self._trainer: Any = trainer

    def saved(self) -> dict:
        """The tokens trained on so far."""
        return {"tokens": self._trainer._total_train_tokens}

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Count on from the checkpoint's."""
        self._trainer._total_train_tokens = saved["tokens"]


def keep_token_count(trainer: Trainer) -> None:
    """Have a trainer of TRL count on its tokens when it is resumed; another has no such count."""
    kept = any(isinstance(other, TokenCount) for other in trainer.callback_handler.callbacks)
    if hasattr(trainer, "_total_train_tokens") and not kept:
        trainer.add_callback(TokenCount(trainer))
