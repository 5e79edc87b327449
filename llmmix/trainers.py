"""What every trainer of ours does to TRL's: settings refused, rows checked, one forward recorded.

Names that are private to TRL and that two trainers share are touched here alone; what TRL reads
from or calls on a trainer's class stays in the class.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator, DistributedType
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoProcessor, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from llmmix.head import FusedHeadOutput, HeadObjective, attach_head
from llmmix.processes import warn_once
from llmmix.rows.answer_weights import read_pairs
from llmmix.rows.formats import check_sft_dataset
from llmmix.rows.message_weights import has_message_weights, weigh
from llmmix.rows.turns import WHOLE_CHATS, tokenize_turns

Rows: TypeAlias = Dataset | IterableDataset
TokenLoss: TypeAlias = Callable[[FusedHeadOutput], Tensor]


def default_to_cpu(args: TrainingArguments) -> None:
    """Without an accelerator, train on the CPU: settings left open take values that suit it.

    Without `use_cpu`, accelerate lets every process of a torchrun train alone; with it they run DDP
    over gloo. bf16 is several times slower than fp32 on most processors. Called by a config
    before its parent's `__post_init__`.
    """
    if torch.accelerator.is_available():
        return
    args.use_cpu, args.dataloader_pin_memory = True, False
    if args.bf16 is None:
        args.bf16 = False


def check_own_loss(method: str, args: SFTConfig, trainer_arguments: dict) -> None:
    """Refuse settings that merge examples into one row, or that ask TRL for another loss.

    Raises:
        ValueError: One of `packing`, `eval_packing`, `label_smoothing_factor`, `loss_type` and
            `compute_loss_func` is set.
    """
    for name in ("packing", "eval_packing"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}=True` merges examples into one row, and {method} needs them apart. Set "
                f"`{name}=False`, and `padding_free=True` to compute no padding."
            )
    others = {
        "label_smoothing_factor": args.label_smoothing_factor > 0,
        "loss_type": args.loss_type != "nll",
        "compute_loss_func": trainer_arguments.get("compute_loss_func") is not None,
    }
    for name, given in others.items():
        if given:
            raise ValueError(f"{method} is a loss of its own: leave `{name}` at its default.")


def check_unsharded(method: str, accelerator: Accelerator) -> None:
    """Refuse parallelism that splits one example over ranks.

    Raises:
        ValueError: Context or sequence parallelism is on.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"Context and sequence parallelism split an example over ranks, and {method} needs it "
            "whole. Set `cp_size` and `sp_size` to 1."
        )


def check_sft_datasets(
    args: SFTConfig,
    model: Any,
    train_dataset: Rows | None,
    trainer_arguments: dict[str, Any],
    masks_only: str = "",
) -> Rows | None:
    """`check_sft_dataset` on the training and the evaluation rows of an SFT trainer.

    With `assistant_only_loss`, chats whose template TRL cannot mark come back as tokens and labels.
    Rows with weights come back as `llmmix.rows.message_weights.weigh` makes them.

    Args:
        args: The trainer's settings.
        model: Its model, or the name of it, whose tokenizer is loaded where none is given.
        train_dataset: The training rows.
        trainer_arguments: The trainer's other arguments, by name; `eval_dataset` is replaced, and
            a missing `processing_class` is added.
        masks_only: Why weights of messages and tokens must be 0 or 1; "" where they need not.

    Returns:
        The training rows.

    Raises:
        ValueError: `check_sft_dataset`, `weigh` or `tokenize_turns` refuses the training or the
            evaluation rows.
    """
    if trainer_arguments.get("formatting_func") is not None:
        return train_dataset  # the function makes the text, from columns of any name
    if leaves_rows_alone(args) and trainer_arguments.get("data_collator") is not None:
        return train_dataset  # the collator makes the batch, from columns of any name
    tokenizer = _processing_class(args, model, trainer_arguments)
    given = (train_dataset, trainer_arguments.get("eval_dataset"))
    turns = args.assistant_only_loss and has_message_weights(*given)

    def check(rows: Rows | None, argument: str) -> Rows:
        templated = None if args.chat_template_path else tokenizer
        read = partial(check_sft_dataset, argument=argument, processing_class=templated)
        read = partial(read, text_field=args.dataset_text_field)
        rows = weigh(rows, argument, args, tokenizer, read, masks_only, turns)
        return tokenize_turns(rows, argument, args, tokenizer)

    _check_evaluated(trainer_arguments, check)
    train_dataset = check(train_dataset, "train_dataset")
    stream = isinstance(train_dataset, IterableDataset) and not args.assistant_only_loss
    if stream and "messages" in next(iter(train_dataset)):
        warn_once(f"Scored: {WHOLE_CHATS}.")
    return train_dataset


def check_preference_datasets(
    args: DPOConfig, model: Any, train_dataset: Rows | None, trainer_arguments: dict[str, Any]
) -> Rows:
    """`read_pairs` on the training and the evaluation rows of a trainer.

    Arguments, result and errors are those of `check_sft_datasets`.
    """
    tokenizer = _processing_class(args, model, trainer_arguments)
    check = partial(read_pairs, args=args, tokenizer=tokenizer)
    _check_evaluated(trainer_arguments, check)
    return check(train_dataset, "train_dataset")


def _processing_class(
    args: SFTConfig | DPOConfig, model: Any, trainer_arguments: dict[str, Any]
) -> Any:
    """The tokenizer, loaded as TRL would where it is not given: rows are put into its template."""
    if trainer_arguments.get("processing_class") is None:
        by_name, settings = isinstance(model, str), args.model_init_kwargs
        revision = settings.get("revision") if by_name and isinstance(settings, dict) else None
        trainer_arguments["processing_class"] = AutoProcessor.from_pretrained(
            model if by_name else get_config_model_id(model.config),
            revision=revision,
            trust_remote_code=args.trust_remote_code,
        )
    return trainer_arguments["processing_class"]


def _check_evaluated(
    trainer_arguments: dict[str, Any], check: Callable[[Rows | None, str], Rows]
) -> None:
    """Replace `eval_dataset`, or each of several by their names, by what a check leaves of it."""
    rows = trainer_arguments.get("eval_dataset")
    if isinstance(rows, dict):
        checked: Any = {name: check(part, f"eval_dataset[{name!r}]") for name, part in rows.items()}
    else:
        checked = None if rows is None else check(rows, "eval_dataset")
    trainer_arguments["eval_dataset"] = checked


def leaves_rows_alone(args: SFTConfig) -> bool:
    """Whether TRL is asked to take the rows as they are."""
    given = args.dataset_kwargs
    return isinstance(given, dict) and bool(given.get("skip_prepare_dataset"))


def length_limit(args: SFTConfig) -> int | None:
    """Tokens after which TRL cuts a row; None for no limit."""
    return None if leaves_rows_alone(args) else args.max_length


def attach_heads(
    trainer: SFTTrainer | DPOTrainer,
    *,
    memory_budget: int | None = None,
    padding_free: bool = False,
    extra: tuple[str, ...] = (),
    top_k: int = 20,
) -> None:
    """Attach the fused head to a TRL trainer's model, and to its reference model if it has one.

    They answer with what the trainer reads. Attached to the model alone, the head would be compared
    with TRL's on the reference model, and under bf16 the two round differently.

    Args:
        trainer: An `SFTTrainer` or `DPOTrainer`, or a subclass, before `train()`.
        memory_budget: See `llmmix.head.attach_head`.
        padding_free: See `llmmix.head.attach_head`.
        extra: More outputs for the trainer's own loss, beside those that TRL reads.
        top_k: See `llmmix.head.attach_head`.

    Raises:
        TypeError: The trainer is another.
        ValueError: TRL's head has computed the log-probabilities of the reference already
            (`precompute_ref_log_probs`).
    """
    outputs: tuple[str, ...] = ("log_probs", "entropy", "is_top1")
    model: Any = trainer.model
    reference: Any = None
    if isinstance(trainer, DPOTrainer):
        outputs += ("mean_logits",) + ("log_sum_sq_probs",) * trainer.use_weighting
        reference = trainer.ref_model
        _check_not_precomputed(trainer)
    elif not isinstance(trainer, SFTTrainer):
        raise TypeError(
            f"`trainer` must be an SFTTrainer or a DPOTrainer, got {type(trainer).__name__}."
        )
    outputs += tuple(name for name in extra if name not in outputs)
    settings: Any = {"memory_budget": memory_budget, "padding_free": padding_free, "top_k": top_k}
    attach_head(model, outputs=outputs, **settings)
    if reference is not None:
        reference = trainer.accelerator.unwrap_model(reference)
        # TRL has prepared it already, and its own forward runs under autocast: so must the head
        # that is compared with it, and the forward that attaching put in its place
        with trainer.accelerator.autocast():
            attach_head(reference, **settings)
        reference.forward = trainer.accelerator.autocast()(reference.forward)


def _check_not_precomputed(trainer: DPOTrainer) -> None:
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    if "ref_chosen_logps" in columns and trainer.precompute_ref_logps:
        raise ValueError(
            "`precompute_ref_log_probs=True` had TRL's head compute the log-probabilities of the "
            "reference: set it to False, or train with `RPOTrainer` and `rpo_eta=0`, which is DPO."
        )


def training_rows(trainer: Trainer, what: str) -> Dataset:
    """The training rows of a trainer, for code that reads rows by their number.

    Args:
        trainer: Any trainer.
        what: Who reads them, the subject of the error.

    Raises:
        ValueError: The rows are streamed, or there are none.
    """
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"{what} asks for rows by their number, so `train_dataset` must be a map-style "
            f"`Dataset`, got {type(rows).__name__}."
        )
    return rows


class ForwardRecorder:
    """Called like the model, it records the output of the fused head.

    TRL's `compute_loss` drops the outputs of its forward, while a loss of ours needs the same ones:
    a second forward would double the cost, and weights from an earlier one would be another method.

    Args:
        model: What to call.
        head_objective: Added to each call of the fused head.
        token_loss: Maps an output to the loss of each token, (B, T) and zero where nothing is
            scored. The caller gets minus that loss for log-probabilities, so that its cross-entropy
            is the loss; `output` keeps the plain ones.

    Attributes:
        output: The last output of the head; unset before the first call.
    """

    output: FusedHeadOutput

    def __init__(
        self,
        model: nn.Module,
        head_objective: HeadObjective | None = None,
        token_loss: TokenLoss | None = None,
    ):
        self._model, self._token_loss = model, token_loss
        self._extra = {} if head_objective is None else {"head_objective": head_objective}

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """Call the model, with the objective added to a call of its fused head."""
        if not fused_lm_head:
            return self._model(*args, **kwargs)
        self.output = self._model(*args, fused_lm_head=True, **self._extra, **kwargs)
        if self._token_loss is None:
            return self.output
        return replace(self.output, log_probs=-self._token_loss(self.output))


def keep_outputs_in_fp32(accelerator: Accelerator) -> None:
    """Keep FSDP2 from rounding log-probabilities to bf16 on their way out of the model.

    Under mixed precision accelerate has FSDP2 cast every output to the compute dtype; the sum of a
    completion's log-probabilities would then be off by half a nat at 100 nats. Call it before the
    model is prepared, which `Trainer` does when training starts. The policy is one for all units:
    hidden states between layers are in fp32 then too.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=torch.float32)
