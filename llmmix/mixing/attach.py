"""`attach_mixture`: the rows that any trainer sees come from a `MixtureSampler`.

    trainer = SFTTrainer(model, args=config, train_dataset=label_domains(domains))
    attach_mixture(trainer, sampler, AioliCallback(sampler, aioli_config))

Weights decided at a step govern the draws of the next one, under gradient accumulation, loader
workers and several processes. The draws, the plan and the method's own state are part of every
checkpoint, so a resumed run draws the rows that it would have drawn. What was drawn, measured and
decided is written to OUTPUT_DIR/mixture.jsonl.
"""

from typing import Any

from transformers import Trainer

from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.sampler import MixtureSampler


def attach_mixture(
    trainer: Trainer, sampler: MixtureSampler, callback: MixtureCallback | None = None
) -> MixtureCallback:
    """Have a trainer's rows drawn by a sampler, whose weights a callback may move.

    The trainer's `train_dataset` holds the rows of all domains, with their domain in the column
    `domain` (`label_domains` makes both); without that column, the rows of the sampler's domains
    one after the other. The number of rows that the trainer dropped is logged. An epoch is as many
    draws as there are rows.

    Args:
        trainer: TRL's, transformers' or ours, before `train()`.
        sampler: Sampler of the domains of the trainer's rows.
        callback: Made for this sampler, such as an `AioliCallback`; without one the weights stay
            as the sampler has them.

    Returns:
        The callback, which is now one of the trainer's.

    Raises:
        ValueError: The trainer has a sampler or loader of its own, a mixture or a filter already,
            or a setting under which the draws do not hold; `callback` was made for another
            sampler; rows or targets as `MixtureCallback.bind` refuses them.
    """
    callback = MixtureCallback(sampler) if callback is None else callback
    if callback.sampler is not sampler:
        raise ValueError("`callback` was made for another sampler: make it for this one.")
    _check_trainer(trainer)
    callback.bind(trainer)
    trainer.add_callback(callback)
    return callback


def _check_trainer(trainer: Trainer) -> None:
    args, kind = trainer.args, type(trainer).__name__
    accelerator_config: Any = args.accelerator_config  # a dictionary has been parsed by now
    if any(isinstance(other, MixtureCallback) for other in trainer.callback_handler.callbacks):
        raise ValueError("The trainer has a mixture already: attach one, with one callback.")
    own_loader = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
    own_sampler = type(trainer)._get_train_sampler is not Trainer._get_train_sampler
    if own_loader or (own_sampler and not hasattr(trainer, "mixture_strata")):
        raise ValueError(
            f"{kind} decides by itself which rows follow one another, and a mixture would undo "
            "that. Mix the rows before, with `datasets.interleave_datasets`."
        )
    if "_get_train_sampler" in vars(trainer):
        raise ValueError("The trainer's rows are filtered already (`attach_filter`): choose one.")
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "A mixture restores its state by itself: leave `restore_callback_states_from_checkpoint"
            "` at False."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` orders the rows, and so "
            "does a mixture: leave it at 'random'."
        )
    if args.auto_find_batch_size or accelerator_config.split_batches:
        raise ValueError(
            "`auto_find_batch_size` and `split_batches` change how many rows a step has, by which "
            "a mixture counts. Set `per_device_train_batch_size` instead."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ValueError(
            "Processes that share rows (tensor, context or sequence parallelism) are not told "
            "apart from those that do not. Use data parallelism: DDP, FSDP or DeepSpeed."
        )
