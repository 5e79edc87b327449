"""What the settings of all configs and scripts may be: their types, and a table of their ranges.

A setting whose range depends on others is checked by its own config. What a library would take and
make nothing of, such as a negative `max_length`, is refused here.
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from os import PathLike
from types import UnionType
from typing import Any, Union, get_args, get_origin

WHOLE = 2**31 - 1  # the largest whole number that any setting but a seed takes
FLOAT = 3.4e38  # and the largest other number: what float32 holds
UNLIMITED = {"ascent_cap", "max_epochs", "max_grad_norm"}  # settings whose infinity means no limit


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`.

    Attributes:
        low: The smallest number, which belongs to the range unless it is `open`.
        high: The largest, which belongs to the range unless it is `below`.
        open: Leave out `low`.
        below: Leave out `high`.
        also: A number outside of the range that stands for "not set".
    """

    low: float
    high: float = math.inf
    open: bool = False
    below: bool = False
    also: float | None = None

    def __contains__(self, number: float) -> bool:
        if number == self.also:
            return True
        from_low = number > self.low if self.open else number >= self.low
        return from_low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        if self.also is not None:
            return f"be {self.low:g} or more, or {self.also:g}"
        if self.high == math.inf:
            return f"be above {self.low:g}" if self.open else f"be {self.low:g} or more"
        start, end = "(" if self.open else "[", ")" if self.below else "]"
        return f"lie in {start}{self.low:.10g}, {self.high:.10g}{end}"


COUNT = Range(1)  # at least one
AMOUNT = Range(0)  # none is possible
POSITIVE = Range(0, open=True)
SHARE = Range(0, 1)
PART = Range(0, 1, open=True)  # some of it
BELOW_ONE = Range(0, 1, below=True)
SEED = Range(0, 2**32 - 1)  # what numpy takes

OURS = __name__.partition(".")[0]
TYPES: dict[Any, tuple[Any, str]] = {  # what a value of a setting is, and how that is said
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "text"),
}

# By the name of a setting; `Class.name` is that of one class, where others have another range
RANGES: dict[str, Range] = {
    **dict.fromkeys(("seed", "data_seed", "seeds"), SEED),
    **dict.fromkeys(
        (
            # of transformers and TRL
            *("per_device_train_batch_size", "per_device_eval_batch_size", "max_length"),
            *("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"),
            *("dataset_num_proc", "dataloader_prefetch_factor", "torch_empty_cache_steps"),
            *("ddp_bucket_cap_mb", "ddp_timeout", "precompute_ref_batch_size"),
            *("ref_model_sync_steps", "pad_to_multiple_of", "lora_r", "lora_alpha"),
            # of ours
            *("measured_rows", "num_checkpoints", "refresh_every", "solve_samples"),
            *("max_problems", "max_rows", "num_samples", "n", "leak_n", "max_new_tokens"),
            *("token_budget", "relearn_steps", "relearn_batch_size", "batch_size"),
            *("hidden_size", "vocab_size", "rows", "draws", "prompts", "train_rows", "test_rows"),
            *("steps", "teach_epochs", "teach_steps", "few_rows", "epochs", "processes"),
            "grid_steps",
            "psft_snapshot_steps",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"),
            *("logging_steps", "eval_steps", "save_steps", "eval_delay"),
            *("dataloader_num_workers", "neftune_noise_alpha", "router_aux_loss_coef"),
            *("validation_rows", "unfiltered_steps", "temperature", "closeness"),
            *("dual_warmup_epochs", "layer", "epsilon", "steering"),
            *("eaft_alpha", "asft_alpha", "focal_gamma", "psft_clip"),
        ),
        AMOUNT,
    ),
    **dict.fromkeys(
        ("num_train_epochs", "max_epochs", "discopop_tau", "tokens", "learning_rates"), POSITIVE
    ),
    "gem_beta": POSITIVE,
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), BELOW_ONE),
    **dict.fromkeys(("lora_dropout",), BELOW_ONE),
    **dict.fromkeys(("ref_model_mixup_alpha", "ld_alpha", "threshold_p", "wrong_share"), SHARE),
    **dict.fromkeys(("top_p", "relearn_share", "select_share"), PART),
    "gce_q": Range(-1),
    "eaft_top_k": Range(2, also=0),  # the entropy of one token is 0
    "holdout": Range(0, 1, open=True, below=True),
    "label_smoothing": Range(0, 0.5, below=True),
    "weights": Range(0, 1e15),  # counts of tokens serve as shares
    "max_steps": Range(1, also=-1),  # -1: as many as `num_train_epochs` takes, and 0 would be too
    "relearn_learning_rate": POSITIVE,
    "RPOConfig.beta": POSITIVE,
    "QuickstartArguments.n_samples": COUNT,
    "QuickstartArguments.max_steps": COUNT,
    "StudyArguments.n_samples": COUNT,
    "StudyArguments.max_steps": COUNT,
    "StudyArguments.aioli_seeds": Range(2),  # an interval needs two
}


def check_settings(args: Any) -> None:
    """Refuse settings that are of another type, infinite, not a number, or out of their range.

    The numbers of a list are each checked, those inside of dictionaries for being finite. The type
    is checked of settings of ours.

    Args:
        args: A dataclass of settings, before its parents' `__post_init__`.

    Raises:
        ValueError: A setting is of another type than its field, is not a number, is infinite and no
            limit, or is out of its range.
    """
    _check_types(args)
    names = [kind.__name__ for kind in type(args).__mro__]
    for field in fields(args):
        name, value = field.name, getattr(args, field.name, None)
        of_class = (RANGES.get(f"{kind}.{name}") for kind in names)
        limits = next(filter(None, of_class), RANGES.get(name))
        for number in _numbers(value):
            _check_finite(name, number, value)
            if limits is not None and not isinstance(value, dict) and number not in limits:
                raise ValueError(f"`{name}` must {limits}, got {value}.")
            most = WHOLE if isinstance(number, int) else FLOAT
            if abs(number) > most and limits is not SEED and number != math.inf:
                raise ValueError(f"`{name}` must be at most {most}, got {value}.")


def _check_types(args: Any) -> None:
    types: dict[str, Any] = {}  # not `field.type`, which a parser of flags changes
    for owner in reversed(type(args).__mro__):
        if is_dataclass(owner) and owner.__module__.partition(".")[0] == OURS:
            types |= owner.__annotations__
    for name, declared in types.items():
        either = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
        value = getattr(args, name, None)
        if value is None and type(None) in either:
            continue
        kind, what = TYPES.get(either[0], (object, ""))
        if not isinstance(value, kind) or (isinstance(value, bool) and either[0] in (int, float)):
            said = repr(value) if isinstance(value, str | Real | None) else type(value).__name__
            raise ValueError(f"`{name}` must be {what}, got {said}.")


def _check_finite(name: str, number: float, value: Any) -> None:
    endless = name in UNLIMITED and number == math.inf
    if isinstance(number, float) and not (math.isfinite(number) or endless):
        raise ValueError(f"`{name}` must be a finite number, got {value}.")


def _numbers(value: Any) -> list[float]:
    """The numbers in a value of plain types."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
