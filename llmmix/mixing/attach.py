"""`attach_mixture`: have any trainer's rows drawn by a `MixtureSampler`.

    trainer = SFTTrainer(model, args=config, train_dataset=label_domains(domains))
    attach_mixture(trainer, sampler, AioliCallback(sampler, aioli_config))

Weights that are decided at a step apply from the next step on, also with gradient accumulation,
loader workers and several processes. Every checkpoint holds the draws, the plan and the method's
state, so a resumed run draws the same rows as one that was never stopped. What was drawn, measured
and decided is written to OUTPUT_DIR/mixture.jsonl. The work is done by `MixtureCallback`
(llmmix/mixing/callback.py).
"""

from typing import Any

from transformers import Trainer

from llmmix.checkpoints.cards import sign
from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.sampler import MixtureSampler
from llmmix.training.finite import end_unless_finite
from llmmix.training.resuming import keep_token_count
from llmmix.training.unmoved import tell_if_unmoved


def attach_mixture(
    trainer: Trainer, sampler: MixtureSampler, callback: MixtureCallback | None = None
) -> MixtureCallback:
    """Have a trainer's rows drawn by a sampler, whose weights a callback may move.

    The trainer's `train_dataset` holds the rows of all domains, and its column `domain` names the
    domain of each row (`label_domains` makes such a dataset). Without that column, the rows must be
    those of the sampler's domains, one domain after the other. The number of rows that the trainer
    dropped is logged. An epoch is as many draws as there are rows. A run whose loss, gradient or
    weights are not finite ends (llmmix/training/finite.py).

    Args:
        trainer: A trainer of transformers, TRL or llmmix, before `train()`.
        sampler: Sampler of the domains of the trainer's rows.
        callback: A callback made for this sampler, such as an `AioliCallback`. Default: a
            `MixtureCallback`, which leaves the weights as they are.

    Returns:
        The callback, now attached to the trainer.

    Raises:
        ValueError: The trainer has a sampler, loader, mixture or filter already, or a setting that
            would change the draws; `callback` was made for another sampler; or
            `MixtureCallback.bind` refuses the rows or targets.
    """
    callback = MixtureCallback(sampler) if callback is None else callback
    if callback.sampler is not sampler:
        raise ValueError("`callback` was made for another sampler: make it for this one.")
    _check_trainer(trainer)
    callback.bind(trainer)
    trainer.add_callback(callback)
    end_unless_finite(trainer)
    tell_if_unmoved(trainer)
    sign(
        trainer, f"{getattr(trainer, '_name', '')} on a mixture: {callback.method}", callback.paper
    )
    keep_token_count(trainer)
    return callback


def _check_trainer(trainer: Trainer) -> None:
    args, kind = trainer.args, type(trainer).__name__
    accelerator_config: Any = args.accelerator_config  # transformers has parsed a dictionary
    if any(isinstance(other, MixtureCallback) for other in trainer.callback_handler.callbacks):
        raise ValueError("The trainer has a mixture already: attach only one.")
    own_loader = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
    own_sampler = type(trainer)._get_train_sampler is not Trainer._get_train_sampler
    if own_loader or (own_sampler and not hasattr(trainer, "mixture_strata")):
        raise ValueError(
            f"{kind} decides by itself which rows follow one another, and a mixture would undo "
            "that. Mix the rows beforehand, with `datasets.interleave_datasets`."
        )
    if "_get_train_sampler" in vars(trainer):
        raise ValueError(
            "The trainer's rows are filtered already (`attach_filter`): use a filter or a mixture, "
            "not both."
        )
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
            "`auto_find_batch_size` and `split_batches` change the number of rows of a step, which "
            "a mixture must know. Set `per_device_train_batch_size` instead."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ValueError(
            "A mixture supports no tensor, context or sequence parallelism, where processes share "
            "rows. Use data parallelism: DDP, FSDP or DeepSpeed."
        )
