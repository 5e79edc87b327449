"""`padding_free` of a trainer of ours: batches stay padded, and the forward leaves the padding out.

TRL's field of that name joins the rows of a batch in the collator, does not enforce `max_length`,
and is out of order in `DPOTrainer`. So TRL makes our trainers without it, and the fused head
(`attach_heads(trainer, padding_free=True)`) does the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any

from trl import DPOConfig, SFTConfig, SFTTrainer

from llmmix.trainers import attach_heads


def padding_free_field() -> Any:
    """The field `padding_free` of a config: TRL's, whose help says what it is here."""
    return field(
        default=False,
        metadata={
            "help": "Compute each batch without its padding. Rows stay rows, `max_length` cuts "
            "them as ever, and no FlashAttention is needed."
        },
    )


@contextmanager
def padded_by_trl(args: SFTConfig | DPOConfig) -> Iterator[None]:
    """While TRL makes a trainer: it knows nothing of `padding_free`, and pads.

    Args:
        args: The trainer's settings; `padding_free` is off for the time.

    Raises:
        ValueError: `packing` or `eval_packing` is set beside it.
    """
    given = args.padding_free
    if given:
        _check(args)
    args.padding_free = False
    try:
        yield
    finally:
        args.padding_free = given


def sft_trainer(model: Any, *, args: SFTConfig, **given: Any) -> SFTTrainer:
    """TRL's own `SFTTrainer`, on our fused head where `padding_free` is set.

    Args:
        model: The model, or its name.
        args: The trainer's settings.
        **given: The other arguments of `SFTTrainer`.

    Raises:
        ValueError: `padded_by_trl` refuses the settings, or `attach_head` the model.
    """
    with padded_by_trl(args):
        trainer = SFTTrainer(model, args=args, **given)
    if args.padding_free:
        attach_heads(trainer, padding_free=True)
    return trainer


def _check(args: SFTConfig | DPOConfig) -> None:
    for name in ("packing", "eval_packing"):
        if getattr(args, name, None):
            raise ValueError(
                f"`padding_free=True` computes padded rows without their padding, and `{name}=True`"
                " leaves none: set one of them to False."
            )
