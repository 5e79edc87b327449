"""Tokenizes rows of any format that `SFTTrainer` takes, so that domains of several formats fit.

The result is the same as `SFTTrainer` makes of a domain by itself, without packing; tests compare
them. llmmix/mixing/domains.py calls it.

    columns                scored tokens
    text                   all, and the end-of-text token
    messages               all tokens of the chat template
    prompt, completion     the completion; for text also the end-of-text token
    input_ids, labels      as the labels say; without labels, all
"""

from collections.abc import Mapping
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, is_conversational, maybe_convert_to_chatml
from trl.data_utils import common_prefix_length
from trl.trainer.utils import global_then_local_main_first

from llmmix.rows.prompts import template_options

logger = get_logger(__name__)


def tokenize_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, name: str
) -> Dataset:
    """Token ids and labels of a domain's rows, cut to `max_length`.

    Rows in which `max_length` leaves no scored token are dropped.

    Args:
        rows: Rows of one format.
        tokenizer: Tokenizer of the model, with a chat template where rows have messages.
        args: `max_length`, `truncation_mode`, `completion_only_loss`, `dataset_text_field`,
            `dataset_num_proc`, `shuffle_dataset` and `seed` are read.
        name: Name of the domain, for the progress bar.

    Returns:
        Rows with the columns `input_ids` and `labels`, which is -100 where no token is scored.

    Raises:
        ValueError: `assistant_only_loss` or `packing` is set, or `truncation_mode` is unknown.
    """
    if args.assistant_only_loss or args.packing:
        raise ValueError(
            "Domains of several formats are tokenized one by one, without `assistant_only_loss` "
            "and without `packing`. Set both to False, or give all domains the same format."
        )
    first = maybe_convert_to_chatml(rows[0])
    options = {
        "tokenizer": tokenizer,
        "conversational": is_conversational(first),
        "text_field": args.dataset_text_field,
        "completion_only": args.completion_only_loss is not False,
        "cut": _kept_part(args),
    }
    with global_then_local_main_first():
        made = rows.map(
            _tokenize_row,
            fn_kwargs=options,
            remove_columns=rows.column_names,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenizing the domain {name}",
        )
        if args.max_length is not None:
            made = made.filter(_is_scored, input_columns="labels", num_proc=args.dataset_num_proc)
    return made.shuffle(seed=args.seed) if args.shuffle_dataset else made


def _kept_part(args: SFTConfig) -> slice:
    length = args.max_length
    if length is None:
        return slice(None)
    parts = {"keep_start": slice(None, length), "keep_end": slice(-length, None)}
    if args.truncation_mode not in parts:
        raise ValueError(
            f"`truncation_mode` must be one of {list(parts)}, got {args.truncation_mode!r}."
        )
    return parts[args.truncation_mode]


def _tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    conversational: bool,
    text_field: str,
    completion_only: bool,
    cut: slice,
) -> dict[str, list[int]]:
    """Token ids and labels of a row."""
    if "input_ids" in row:
        ids = row["input_ids"]
        return {"input_ids": ids[cut], "labels": row.get("labels", ids)[cut]}
    row = maybe_convert_to_chatml(dict(row))
    options = template_options(row)
    # Chat templates add their own end of turn
    end = None if conversational else tokenizer.eos_token
    if "prompt" in row:
        prompt, completion = row["prompt"], _ended(row["completion"], end)
        before = _encode(tokenizer, prompt, {"add_generation_prompt": True, **options})
        ids = _encode(tokenizer, prompt + completion, options)
        unscored = _length_of_prompt(before, ids) if completion_only else 0
        labels = [-100] * unscored + ids[unscored:]
    else:
        whole = row["messages"] if conversational else _ended(row[text_field], end)
        labels = ids = _encode(tokenizer, whole, options)
    return {"input_ids": ids[cut], "labels": labels[cut]}


def _ended(text: Any, end: str | None) -> Any:
    return text if end is None or text.endswith(end) else text + end


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str | list[dict], options: dict[str, Any]
) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    found: Any = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)
    return found["input_ids"]


def _length_of_prompt(prompt: list[int], whole: list[int]) -> int:
    """Number of tokens of the prompt: the completion begins where prompt and whole row differ."""
    length = common_prefix_length(prompt, whole)
    if length < len(prompt):
        logger.warning_once(
            "A prompt tokenized alone differs from the start of prompt and completion tokenized "
            "together: the tokens that differ are scored as part of the completion. End prompts "
            "where a token ends, or use a chat template that renders them the same either way."
        )
    return length


def _is_scored(labels: list[int]) -> bool:
    return any(label != -100 for label in labels)
