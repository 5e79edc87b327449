"""What a trainer made of its rows, told in the log: dropped, cut, packed and scored."""

from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from llmmix.processes import warn_once
from llmmix.rows.turns import log_scored

Rows: TypeAlias = Dataset | IterableDataset


def log_dropped(before: Rows | None, after: Any, max_length: int | None) -> None:
    """Log which tokens are scored, and the rows that `max_length` left none of, or cut.

    Args:
        before: The rows that the trainer was given.
        after: Its `train_dataset`.
        max_length: Tokens after which it cuts a row.

    Raises:
        ValueError: `max_length` leaves no row.
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
    log_scored(before, after)
    if max_length is not None and "input_ids" in after.column_names:
        ids = after.select_columns("input_ids").with_format("arrow")
        _log_full([len(row) for row in ids[:]["input_ids"]], max_length)


def log_packed(before: Rows | None, after: Any, args: SFTConfig) -> None:
    """`log_dropped` of rows that TRL packed: how many bins they fill, and which may be cut.

    Args:
        before: The rows that the trainer was given.
        after: Its `train_dataset`, of bins.
        args: `max_length` and `packing_strategy` are read.
    """
    if not isinstance(before, Dataset) or not isinstance(after, Dataset):
        return
    warn_once(
        f"Packed {len(before)} rows into {len(after)}, each of at most "
        f"max_length={args.max_length} tokens."
    )
    log_scored(before, after)
    if args.packing_strategy == "bfd" and args.max_length and "seq_lengths" in after.column_names:
        bins = after.select_columns("seq_lengths").with_format(None)[:]["seq_lengths"]
        _log_full([length for lengths in bins for length in lengths], args.max_length)


def _log_full(lengths: list[int], max_length: int) -> None:
    if full := sum(length >= max_length for length in lengths):
        warn_once(
            f"{full} of {len(lengths)} rows fill max_length={max_length} and may be cut short."
        )
