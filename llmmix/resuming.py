"""How a run goes on from its checkpoints: which one, and what callbacks of ours keep in it."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


def checkpoint_to_resume(training_args: TrainingArguments) -> str | bool | None:
    """What `--resume_from_checkpoint` asks for: a folder, or `true` for the last one of the run."""
    given = training_args.resume_from_checkpoint
    asked = str(given).lower()
    return asked == "true" if asked in ("true", "false") else given


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
