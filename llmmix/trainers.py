"""What every trainer of ours does to TRL's: settings refused, rows checked, one forward recorded.

Names that are private to TRL and that two trainers share are touched here alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from trl import SFTConfig

from llmmix.data import warn_once
from llmmix.head import FusedHeadOutput, HeadObjective


def check_own_loss(method: str, args: SFTConfig, trainer_arguments: dict) -> None:
    """Refuse what merges examples into one row, and what asks TRL for another loss.

    Raises:
        ValueError: `packing`, `padding_free`, `label_smoothing_factor`, `loss_type` or
            `compute_loss_func` is set.
    """
    for name in ("packing", "eval_packing", "padding_free"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}=True` merges examples into one row, and {method} needs them apart. Set "
                f"`{name}=False`."
            )
    others = {
        "label_smoothing_factor": args.label_smoothing_factor > 0,
        "loss_type": args.loss_type != "nll",
        "compute_loss_func": trainer_arguments.get("compute_loss_func") is not None,
    }
    for name, given in others.items():
        if given:
            raise ValueError(f"{method} is a loss of its own: leave `{name}` at its default.")


def check_unsharded(method: str, accelerator) -> None:
    """Refuse what splits one example over ranks.

    Raises:
        ValueError: Context or sequence parallelism is on.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"Context and sequence parallelism split an example over ranks, and {method} needs it "
            "whole. Set `cp_size` and `sp_size` to 1."
        )


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


class ForwardRecorder:
    """Call it like the model: it keeps what the fused head answered.

    TRL's `compute_loss` drops the outputs of its forward, while a loss of ours needs the same ones:
    a second forward would double the cost, and a stale weight would not be the method.

    Args:
        model: What to call.
        head_objective: Added to each call of the fused head.
        row_weight: Maps (B,) summed log-probabilities to (B,) weights. The caller is answered with
            log-probabilities times the weight of their row, so that a cross-entropy over them is
            weighted; `output` keeps the plain ones.

    Attributes:
        output: The last `FusedHeadOutput`.
    """

    def __init__(
        self,
        model: nn.Module,
        head_objective: HeadObjective | None = None,
        row_weight: Callable[[Tensor], Tensor] | None = None,
    ):
        self._model, self._row_weight = model, row_weight
        self._extra = {} if head_objective is None else {"head_objective": head_objective}
        self.output: FusedHeadOutput | None = None

    def __call__(self, *args, fused_lm_head: bool = False, **kwargs):
        """Call the model, with the objective added to a call of its fused head."""
        if not fused_lm_head:
            return self._model(*args, **kwargs)
        self.output = self._model(*args, fused_lm_head=True, **self._extra, **kwargs)
        if self._row_weight is None:
            return self.output
        log_probs = self.output.log_probs
        weight = self._row_weight(log_probs.sum(1)).unsqueeze(1)
        return replace(self.output, log_probs=weight * log_probs)


SFT_FORMATS = (
    "prompt-completion rows (`prompt`, `completion`: text or lists of messages), chat rows "
    "(`messages`), text rows (`{text_field}`), or tokenized rows (`input_ids`)"
)


PREFERENCE_FORMATS = (
    "`chosen` and `rejected` (text or lists of messages), with or without a `prompt` of their kind"
)


def default_to_cpu(args: TrainingArguments) -> None:
    """Where there is no accelerator, say so: settings left open take what suits a CPU.

    Without `use_cpu`, accelerate lets every process of a torchrun train alone; with it they run DDP
    over gloo. bf16 is several times slower than fp32 on most processors. Called by a config
    before its parent's `__post_init__`.
    """
    if torch.accelerator.is_available():
        return
    args.use_cpu, args.dataloader_pin_memory = True, False
    if args.bf16 is None:
        args.bf16 = False


def checkpoint_to_resume(training_args: TrainingArguments) -> str | bool | None:
    """What `--resume_from_checkpoint` asks for: a folder, or `true` for the last one of the run."""
    given = training_args.resume_from_checkpoint
    return given.lower() == "true" if str(given).lower() in ("true", "false") else given


def check_sft_datasets(args: SFTConfig, train_dataset, trainer_arguments: dict):
    """`check_sft_dataset` on what an SFT trainer was given; the evaluation rows are replaced.

    Returns:
        The training rows.
    """
    if trainer_arguments.get("formatting_func") is not None:
        return train_dataset  # it makes the text itself, from columns of any name
    tokenizer = None if args.chat_template_path else trainer_arguments.get("processing_class")
    if isinstance(rows := trainer_arguments.get("eval_dataset"), Dataset):
        trainer_arguments["eval_dataset"] = check_sft_dataset(
            rows, "eval_dataset", args.dataset_text_field, tokenizer
        )
    train_dataset = check_sft_dataset(
        train_dataset, "train_dataset", args.dataset_text_field, tokenizer
    )
    if not args.assistant_only_loss and "messages" in next(iter(train_dataset)):
        warn_once(
            "Rows of `messages` are scored whole, the user's turns included. To score responses "
            "alone, set `assistant_only_loss=True` or give `prompt` and `completion`."
        )
    return train_dataset


def check_preference_datasets(train_dataset, trainer_arguments: dict):
    """`check_preference_dataset` on what a trainer was given; the evaluation rows are replaced.

    Returns:
        The training rows.
    """
    tokenizer = trainer_arguments.get("processing_class")
    if isinstance(rows := trainer_arguments.get("eval_dataset"), Dataset):
        trainer_arguments["eval_dataset"] = check_preference_dataset(
            rows, "eval_dataset", tokenizer
        )
    return check_preference_dataset(train_dataset, "train_dataset", tokenizer)


def check_sft_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    text_field: str = "text",
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Dataset | IterableDataset:
    """Refuse what `SFTTrainer` cannot train on, and drop rows with an empty completion.

    The number of rows dropped is logged. A streaming dataset is checked by its first row alone.

    Raises:
        ValueError: No dataset, no rows, columns of no accepted format, chat rows without a chat
            template, or no row left.
    """
    formats = SFT_FORMATS.format(text_field=text_field)
    first = _first_row(dataset, argument, formats)
    columns = set(first)
    if "input_ids" in columns or {"image", "images"} & columns:
        return dataset
    if {"prompt", "completion"} <= columns:
        response = "completion"
    elif columns & {"messages", "conversations"}:
        response = "messages" if "messages" in columns else "conversations"
    elif text_field in columns:
        response = text_field
    else:
        steps = "`steps` are split by llmmix.steps.split_steps (`--stepwise true` of dco). "
        raise ValueError(
            f"`{argument}` has the columns {sorted(columns)}; accepted are {formats}. "
            f"{steps if 'steps' in columns else ''}Rename the columns to one of these."
        )
    _check_template(first[response], argument, processing_class)
    return _drop_blank(dataset, [response], argument)


def check_preference_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Dataset | IterableDataset:
    """Refuse what `DPOTrainer` cannot train on, and drop rows with an empty response.

    Raises:
        ValueError: As `check_sft_dataset`.
    """
    first = _first_row(dataset, argument, PREFERENCE_FORMATS)
    if not {"chosen", "rejected"} <= set(first):
        raise ValueError(
            f"`{argument}` has the columns {sorted(first)}; accepted are {PREFERENCE_FORMATS}. "
            "Rename the columns to these."
        )
    _check_template(first["chosen"], argument, processing_class)
    return _drop_blank(dataset, ["chosen", "rejected"], argument)


def log_dropped(
    before: Dataset | IterableDataset, after: Dataset | IterableDataset, max_length: int | None
) -> None:
    """Say how many rows the trainer dropped because `max_length` left no token to score, or cut.

    Raises:
        ValueError: No row is left.
    """
    if not isinstance(before, Dataset) or not isinstance(after, Dataset):
        return
    if len(after) == 0:
        raise ValueError(
            f"`max_length={max_length}` leaves no row of {len(before)} with a token to train on: "
            "the prompts alone are as long. Raise `max_length`."
        )
    if dropped := len(before) - len(after):
        warn_once(
            f"Dropped {dropped} of {len(before)} rows: with max_length={max_length} no token of "
            "the response is left."
        )
    if max_length is not None and "input_ids" in after.column_names:
        ids = after.select_columns("input_ids").with_format("arrow")
        lengths = (len(row) for row in ids[:]["input_ids"])
        if full := sum(length >= max_length for length in lengths):
            warn_once(
                f"{full} of {len(after)} rows fill max_length={max_length} and may be cut short."
            )


def _first_row(dataset, argument: str, formats: str) -> dict:
    if dataset is None:
        raise ValueError(f"`{argument}` is required: a dataset of {formats}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{argument}` is empty; give at least one row of {formats}.")
    return first


def _check_template(response, argument: str, processing_class) -> None:
    if processing_class is None or isinstance(response, str):
        return
    if processing_class.chat_template is None:
        raise ValueError(
            f"`{argument}` holds chat messages, but the tokenizer has no chat template. Set "
            "`chat_template_path` to one, or use text rows."
        )


def _drop_blank(dataset, columns: list[str], argument: str):
    if not isinstance(dataset, Dataset):
        return dataset
    filled = dataset.filter(
        lambda *responses: not any(map(_is_blank, responses)),
        input_columns=columns,
        desc=f"Checking {argument}",
    )
    if dropped := len(dataset) - len(filled):
        what = " or ".join(f"`{column}`" for column in columns)
        if not len(filled):
            raise ValueError(f"`{argument}`: {what} is empty in every one of {len(dataset)} rows.")
        warn_once(f"Dropped {dropped} of {len(dataset)} rows with an empty {what}.")
        return filled
    return dataset  # not the filtered copy, whose indices would slow every later read


def _is_blank(response) -> bool:
    """No text, or no message of the assistant with something in it."""
    if response is None or isinstance(response, str):
        return not (response or "").strip()
    asked = ("system", "developer", "user", "human", "tool")
    said = [m for m in response if m.get("role", m.get("from")) not in asked]
    return not any(
        m.get("tool_calls") or not _is_empty(m.get("content", m.get("value"))) for m in said
    )


def _is_empty(content) -> bool:
    return not content.strip() if isinstance(content, str) else not content


def log_metric(trainer: Trainer, name: str, value: float) -> None:
    """Let TRL average a metric's values since its last log; other trainers do not show it."""
    if hasattr(trainer, "_metrics"):
        trainer._metrics["train"][name].append(value)


class ResumedCallback(TrainerCallback, ExportableState):
    """A callback whose state stands in each checkpoint, and is taken up by the run that resumes.

    Transformers restores callbacks by making them anew from plain values, which one that holds a
    trainer or a sampler does not allow. This one is made by the user as for a fresh run.
    """

    def begin(self) -> None:
        """Forget what another run left."""

    def saved(self) -> dict:
        """What a checkpoint keeps: JSON values."""
        raise NotImplementedError

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Go on from what `saved` gave when the checkpoint was written."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, or where the run that is resumed had come."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.begin()
        if state.global_step:
            self.resume(kept["attributes"], state)

    def state(self) -> dict:
        """What transformers writes into `trainer_state.json`."""
        return {"args": {}, "attributes": self.saved()}
