"""Rows scored up to the token at which sampling stops, where a loss is about what is sampled.

TRL scores all that a chat template writes, a newline behind the last turn among it. Sampling never
draws that newline: p of the row would be another than that of the completion.
"""

from collections.abc import Sequence
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, is_conversational
from trl.trainer.utils import global_then_local_main_first

from llmmix.rows.prompts import check_turn_end, stop_tokens, template_options, turn_end


def scored_to_the_end(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> list[int]:
    """The labels of a row, -100 behind the token that ends its last scored turn; see `turn_end`."""
    scored = [place for place, label in enumerate(labels) if label != -100]
    if not scored:
        return list(labels)
    stop = scored[-1] + 1
    start = next((p for p in range(stop - 1, -1, -1) if labels[p] == -100), -1) + 1
    end = turn_end(tokenizer, ids[:stop], start)
    return [*labels[:end], *[-100] * (len(labels) - end)]


def score_what_is_sampled(trainer: SFTTrainer) -> None:
    """Let a trainer's rows, and those that it will evaluate, be scored up to their last turn's end.

    Rows that it takes as they are (`skip_prepare_dataset`) are left so. Said once: that the chat
    template ends a turn with a token at which sampling would not stop.

    Args:
        trainer: The trainer, before `train()`.
    """
    tokenizer, args = trainer.processing_class, cast(SFTConfig, trainer.args)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return  # of images too
    if isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset"):
        return
    prepare, workers = trainer._prepare_dataset, args.dataset_num_proc

    def prepared(*args: Any, **kwargs: Any) -> Any:
        return _cut(prepare(*args, **kwargs), tokenizer, workers)

    trainer._prepare_dataset = prepared  # type: ignore[method-assign]  # on this trainer alone
    trainer.train_dataset = _cut(trainer.train_dataset, tokenizer, workers)
    rows = trainer.eval_dataset
    if isinstance(rows, dict):
        rows = {name: _cut(part, tokenizer, workers) for name, part in rows.items()}
    else:
        rows = _cut(rows, tokenizer, workers)
    trainer.eval_dataset = rows
    first: dict[str, Any] = next(iter(trainer.train_dataset), {})
    if is_conversational(first):
        check_turn_end(tokenizer, stop_tokens(trainer.model, tokenizer), template_options(first))


def _cut(rows: Any, tokenizer: PreTrainedTokenizerBase, workers: int | None) -> Any:
    """Rows of token ids and labels; others as they are."""
    if not isinstance(rows, Dataset | IterableDataset):
        return rows
    if not {"input_ids", "labels"} <= set(rows.column_names or next(iter(rows), {})):
        return rows

    def end(ids: list[int], labels: list[int]) -> dict[str, list[int]]:
        return {"labels": scored_to_the_end(tokenizer, ids, labels)}

    columns, named = ["input_ids", "labels"], {}
    if isinstance(rows, Dataset):  # a stream knows no more
        named = {"num_proc": workers, "desc": "Ending rows with their last turn"}
    with global_then_local_main_first():
        return rows.map(end, input_columns=columns, **named)
