"""The micro-batches of an optimizer step, before a loss counts what is in them.

Over several processes accelerate fills the last batch of an epoch with rows from its beginning, so
that every process has a full one. A row that is there again stays in its batch, for processes
gather tensors of one shape, but none of its tokens is scored: losses, counts and means are those of
one process.
"""

import functools
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch import Tensor
from transformers import Trainer

from llmmix.processes import say_once


def window(trainer: Trainer, epoch_iterator: Iterator, parts: int = 1) -> Iterator:
    """The micro-batches that a trainer may draw for its next step: none once its run is finished.

    Transformers trains a finished run that is resumed for one step more, be it finished by
    `max_steps` or by a callback, which then says so when training begins. A trainer's
    `get_batch_samples` passes its iterator through here.

    Args:
        trainer: The trainer.
        epoch_iterator: The batches of its loader.
        parts: Sequences of a row. A batch holds the first one of every row, then the second one of
            every row, and so on.

    Returns:
        The batches, in which no row is scored that the epoch has given before.

    Raises:
        ValueError: One of several processes reads the rows of all.
    """
    if 0 < trainer.state.max_steps <= trainer.state.global_step:
        trainer.control.should_training_stop = True
    if trainer.control.should_training_stop:
        return iter(())
    if trainer.accelerator.num_processes == 1:
        return epoch_iterator
    return map(functools.partial(_drawn, trainer, parts), epoch_iterator)


def evaluated(trainer: Trainer, batch: dict[str, Any], parts: int = 1) -> dict[str, Any]:
    """A batch of an evaluation, in which no row is scored that was evaluated before.

    A trainer's `compute_loss` passes its batch through here; one of training stays as it is.

    Args:
        trainer: The trainer.
        batch: The batch.
        parts: See `window`.
    """
    loader = trainer.callback_handler.eval_dataloader
    if loader is None or trainer.accelerator.gradient_state.active_dataloader is not loader:
        return batch
    if _is_packed(batch):
        return batch
    rows = len(batch["input_ids"]) // parts
    new = new_rows(loader, rows)
    return batch if new == rows else _unscored(batch, new, parts)


def _drawn(trainer: Any, parts: int, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of the training loader, as `window` gives it."""
    loader = trainer.accelerator.gradient_state.active_dataloader
    if isinstance(loader, DataLoaderDispatcher):
        raise ValueError(
            "`accelerator_config`: with `dispatch_batches` one process reads the rows of all and "
            "may cut pairs and parts of a row apart. Leave it unset."
        )
    if loader is None or not loader.end_of_dataloader:  # a mixture's loader repeats nothing
        return batch
    if _is_packed(batch):
        return batch
    # TRL's metrics would leave out whole processes by it, in every micro-batch of the step
    loader.remainder = 0
    rows = len(batch["input_ids"]) // parts
    new = new_rows(loader, rows)
    repeated = batch["attention_mask"].unflatten(0, (parts, rows))[:, new:].sum()
    # TRL counts the tokens of whole batches
    trainer._total_train_tokens -= int(trainer.accelerator.gather(repeated).sum())
    return _unscored(batch, new, parts)


def _is_packed(batch: dict[str, Any]) -> bool:
    """Whether the rows of a batch are one: which of them were given before cannot be told."""
    if "attention_mask" in batch or "position_ids" not in batch:
        return False
    say_once(
        "Rows are packed: where they do not fill the last batch on every process, it repeats some, "
        "which count twice."
    )
    return True


def new_rows(loader: Any, rows: int) -> int:
    """How many of this process's rows at the loader's end were not given before; they come first.

    Args:
        loader: A loader of accelerate.
        rows: Rows of its last batch on this process.
    """
    if not loader.end_of_dataloader:
        return rows
    if isinstance(loader.dataset, IterableDatasetShard):
        say_once(
            "Rows are streamed: where they do not fill the last batch on every process, it repeats "
            "some, which count twice."
        )
        return rows
    shard = loader.batch_sampler
    while not isinstance(shard, BatchSamplerShard):  # a resumed run's skips batches of it
        if not hasattr(shard, "batch_sampler"):
            return rows
        shard = shard.batch_sampler
    if shard.num_processes == 1 or shard.drop_last or not shard.even_batches:
        return rows
    sampler, size = shard.batch_sampler.sampler, rows * shard.num_processes
    # A sampler that may stop short of its length says what it gave
    given = getattr(sampler, "rows_given", None)
    last = ((len(sampler) if given is None else given) - 1) % size + 1
    return min(max(last - shard.process_index * rows, 0), rows)


def _unscored(batch: dict[str, Any], start: int, parts: int) -> dict[str, Any]:
    """A batch of which rows from `start` on have no token to score, under any of TRL's names."""
    marks = {"labels": (parts, -100), "completion_mask": (parts, 0)}
    marks |= {"ref_chosen_logps": (1, 0), "ref_rejected_logps": (1, 0)}
    changed: dict[str, Tensor] = {}
    for name, (stacked, nothing) in marks.items():
        if name in batch:
            changed[name] = batch[name].clone()
            changed[name].unflatten(0, (stacked, -1))[:, start:] = nothing
    return {**batch, **changed}
