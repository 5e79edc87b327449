"""What both unlearning trainers do to TRL's: shared settings, and `ForgetRows` for its rows.

Rows to forget are read as they are, drawn anew each epoch and never packed, so that TRL's own
preparation is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from trl import ScriptArguments, SFTConfig, SFTTrainer

from llmmix.checkpoints.cards import sign
from llmmix.data import load_role, load_train_and_eval
from llmmix.head import attach_head
from llmmix.padding_free_setting import padding_free_field
from llmmix.rows.answer_weights import weigh_answers
from llmmix.trainers import check_unsharded, default_to_cpu, keep_outputs_in_fp32
from llmmix.training.finite import end_unless_finite
from llmmix.training.ranges import check_settings
from llmmix.training.unmoved import tell_if_unmoved
from llmmix.unlearning.guards import check_limit
from llmmix.unlearning.qa import read_rows
from llmmix.unlearning.rows import EpochSampler, ForgetRows
from llmmix.unlearning.templates import Templates


@dataclass
class RetainArguments:
    """Flags of the unlearning recipes: the rows to retain."""

    retain_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rows to retain, for a loss that needs them; NAME@CONFIG for the hub."},
    )
    retain_dataset_split: str = field(
        default="train", metadata={"help": "Split of the rows to retain."}
    )


def load_forget_and_retain(
    script_args: ScriptArguments, retain_args: RetainArguments, training_args: SFTConfig
) -> tuple[Any, Any, Any]:
    """The rows that a recipe's flags name: to forget, to evaluate on or None, to retain or None.

    Raises:
        ValueError: `load_train_and_eval` or `load_role` finds no such rows.
    """
    forget, held_out = load_train_and_eval(
        script_args, training_args, role="forget", whole_for="unlearning"
    )
    if retain_args.retain_dataset_name is None:
        return forget, held_out, None
    retain = load_role(
        retain_args.retain_dataset_name,
        "retain",
        split=retain_args.retain_dataset_split,
        config=script_args.dataset_config,
        arguments=("retain_dataset_name", "retain_dataset_split"),
    )
    return forget, held_out, retain


@dataclass
class ForgetConfig(SFTConfig):
    """TRL's `SFTConfig` with the fields that every trainer on `ForgetRows` has.

    Args:
        template_file: Template answers, one a line, where rows have no `template`; our own list of
            refusals by default.
        resample_templates: Draw a row's template again in each epoch, instead of once.
        include_eos: Score the end-of-sequence token.
        min_forget_prob: Training ends when the mean probability of the answers to forget falls
            below it.
    """

    template_file: str | None = field(
        default=None,
        metadata={"help": "File of template answers, one a line; our own refusals by default."},
    )
    resample_templates: bool = field(
        default=True, metadata={"help": "Draw each row's template again in each epoch."}
    )
    include_eos: bool = field(default=True, metadata={"help": "Score the end-of-sequence token."})
    min_forget_prob: float | None = field(
        default=None,
        metadata={
            "help": "Training ends when the mean probability of the tokens to forget falls below "
            "this."
        },
    )
    padding_free: bool = padding_free_field()

    def __post_init__(self) -> None:
        check_settings(self)
        check_limit("min_forget_prob", self.min_forget_prob, top=1)
        default_to_cpu(self)
        super().__post_init__()


def check_not_negative(args: ForgetConfig, names: Sequence[str]) -> None:
    """Refuse negative settings.

    Raises:
        ValueError: A setting among `names` is negative or not a number.
    """
    for name in names:
        if (value := getattr(args, name)) is not None and not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


def check_args(args: SFTConfig, train_dataset: Any, others: dict[str, Any]) -> None:
    """Have TRL leave rows to forget as they are, for `prepare_trainer`.

    Args:
        args: The trainer's settings, which are changed.
        train_dataset: Rows to forget.
        others: The trainer's other arguments, by name.

    Raises:
        ValueError: `train_dataset` is no map-style dataset, or has no rows; or
            `restore_callback_states_from_checkpoint` is set; or a collator or `formatting_func` is
            given, which `ForgetRows` would not call.
    """
    if not isinstance(train_dataset, Dataset) or not len(train_dataset):
        raise ValueError(
            "`train_dataset` must be a map-style `Dataset` of rows to forget, at least one, got "
            f"{'no rows' if isinstance(train_dataset, Dataset) else type(train_dataset).__name__}."
        )
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "`restore_callback_states_from_checkpoint` cannot make callbacks again that need the "
            "trainer; they restore themselves. Leave it at False."
        )
    for name in ("data_collator", "formatting_func"):
        if others.get(name) is not None:
            raise ValueError(
                f"`{name}` would not be called: rows to forget are read, tokenized and put in "
                "batches by `ForgetRows`. Leave it out, and give rows of its formats."
            )
    given = args.dataset_kwargs if isinstance(args.dataset_kwargs, dict) else {}
    args.dataset_kwargs = {**given, "skip_prepare_dataset": True}
    args.remove_unused_columns = False


def prepare_trainer(
    trainer: SFTTrainer,
    method: str,
    args: ForgetConfig,
    parts: Sequence[str],
    *,
    retain_dataset: Dataset | None,
    templates: Templates,
    skip_tokens: int = 0,
    unweighted: Mapping[str, str] | None = None,
) -> Callable[[Any, str], Any]:
    """Give a trainer `ForgetRows` in the place of its rows, their collator, and the fused head.

    Args:
        trainer: A trainer that TRL has made.
        method: Name of the method, for errors.
        args: The trainer's settings.
        parts: Which of `PARTS` a batch has.
        retain_dataset: Rows to retain, where `parts` has them.
        templates: See `ForgetRows`.
        skip_tokens: See `ForgetRows`.
        unweighted: Rows that may have no `weight`, "forget" or "retain", and why.

    Returns:
        A function (rows, argument) that prepares other rows alike; it returns None and names as
        they are.

    Raises:
        ValueError: Context or sequence parallelism is on; `ForgetRows` or `weigh_answers` refuses
            the rows; or `include_for_metrics` asks for the inputs, of which there are several a
            row.
    """
    check_unsharded(method, trainer.accelerator)
    if len(parts) > 1 and "inputs" in args.include_for_metrics:
        raise ValueError(
            "`include_for_metrics=['inputs']` would gather the templates and the rows to retain "
            f"too, of which {method} has one for each row to forget. Leave 'inputs' out: labels "
            "hold the tokens of the answers."
        )
    tokenizer: Any = trainer.processing_class
    model: Any = trainer.model

    def read(rows: Any, argument: str, part: str) -> Dataset:
        why = (unweighted or {}).get(part, "")
        reading = partial(read_rows, argument=argument, tokenizer=tokenizer)
        return weigh_answers(rows, argument, reading, why)

    retain = retain_dataset
    if "retain" in parts:
        retain = read(retain_dataset, "retain_dataset", "retain")

    def prepared(rows: Any, argument: str) -> Any:
        if rows is None or isinstance(rows, str | ForgetRows):
            return rows
        if isinstance(rows, dict):
            return {name: prepared(part, name) for name, part in rows.items()}
        return ForgetRows(
            read(rows, argument, "forget"),
            tokenizer,
            parts=parts,
            retain=retain,
            templates=templates,
            resample=args.resample_templates,
            include_eos=args.include_eos,
            skip_tokens=skip_tokens,
            max_length=args.max_length,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    forget: ForgetRows = prepared(trainer.train_dataset, "train_dataset")
    trainer.train_dataset, trainer.data_collator = forget, forget.collate
    trainer.eval_dataset = prepared(trainer.eval_dataset, "eval_dataset")
    keep_outputs_in_fp32(trainer.accelerator)
    attach_head(model, padding_free=args.padding_free)
    end_unless_finite(trainer)
    tell_if_unmoved(trainer)
    sign(trainer)
    return prepared


def epoch_sampler(trainer: SFTTrainer, rows: ForgetRows) -> EpochSampler:
    """The sampler of a trainer's `ForgetRows`."""
    return EpochSampler(len(rows), rows.seed, lambda: int(trainer.state.epoch or 0))
