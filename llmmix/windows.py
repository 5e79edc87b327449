"""The micro-batches of an optimizer step, before a loss counts what is in them."""

from collections.abc import Iterator

from transformers import Trainer


def window(trainer: Trainer, epoch_iterator: Iterator) -> Iterator:
    """The micro-batches that a trainer may draw for its next step: none once its run is finished.

    Transformers trains a finished run that is resumed for one step more, be it finished by
    `max_steps` or by a callback, which then says so when training begins. A trainer's
    `get_batch_samples` passes its iterator through here.

    Args:
        trainer: The trainer.
        epoch_iterator: The batches of its loader.
    """
    if 0 < trainer.state.max_steps <= trainer.state.global_step:
        trainer.control.should_training_stop = True
    if trainer.control.should_training_stop:
        return iter(())
    return epoch_iterator
