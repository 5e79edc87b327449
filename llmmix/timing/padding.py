"""Steps on real batches of uneven rows: without their padding, and with it.

Each contender trains on one batch of the rows as they are, uncut: on the tokens alone, or padded to
the longest row. The batch is padded as much as the batches of an epoch are together.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from llmmix.timing.clock import Case
from llmmix.timing.steps import made_trainer, stepping

METHODS = {"nll": "nll", "DCO": "dco", "SFTMix": "sftmix", "RPO": "rpo"}  # by name in the table
PAIRED = ("RPO",)
ROWS = 1000  # of a dataset, to draw batches from


def padding_cases(
    *,
    models: Sequence[str],
    methods: Collection[str],
    device: str,
    batch_sizes: Sequence[int],
    dataset: str,
    preferences: str,
) -> list[list[Case]]:
    """Rows of training steps in full: without padding first, then padded, on the same batch.

    Args:
        models: Hub ids, folders, `.gguf` files or built-ins.
        methods: Keys of `METHODS`.
        device: "cpu" or "cuda".
        batch_sizes: Rows of a batch; pairs, for RPO.
        dataset: Prompts and completions: a hub id, folder, file or built-in.
        preferences: Preference pairs, likewise.
    """
    groups = []
    for model in models:
        for size in batch_sizes:
            for name in (name for name in METHODS if name in methods):
                paired = name in PAIRED
                shared = {
                    "model": model,
                    "device": device,
                    "batch_size": size,
                    "method": METHODS[name],
                    "dataset": preferences if paired else dataset,
                }
                row = f"{name}, {Path(model).name}, {size} {'pairs' if paired else 'rows'}"
                groups.append(
                    [
                        Case(row, contender, padding_call, {**shared, "padding_free": free})
                        for contender, free in {"without padding": True, "padded": False}.items()
                    ]
                )
    return groups


def padding_call(
    *, model: str, device: str, batch_size: int, method: str, dataset: str, padding_free: bool
) -> Callable[[], dict]:
    """One optimizer step on one batch, with gradient checkpointing, as `train` would make it.

    A step on the two shortest rows comes before: it makes what is made once, such as the state of
    the optimizer.

    Returns:
        A call that returns the tokens of the batch, those that are read with its padding, the share
        of padding among them, and that share over the batches of an epoch.

    Raises:
        ValueError: The rows do not fill a batch.
    """
    trainer: Any = made_trainer(
        method,
        model,
        lambda _: _drawn(dataset, method),
        {"max_length": None, "padding_free": padding_free},
        device=device,
    )
    rows = trainer.train_dataset
    lengths = [sequence_lengths(row) for row in rows]
    if len(lengths) < batch_size:
        raise ValueError(
            f"{dataset} has {len(lengths)} rows to train on, and a batch {batch_size}."
        )
    chosen, overall = typical_batch(lengths, batch_size)
    shortest = np.argsort([sum(row) for row in lengths], kind="stable")[:2]
    warming, batch = (
        trainer.data_collator([rows[int(row)] for row in numbers]) for numbers in (shortest, chosen)
    )
    step = stepping(trainer, checkpointing=True)
    step(iter([warming]))
    tokens, read = read_of([lengths[row] for row in chosen])
    figures = {
        "tokens": tokens,
        "read": read,
        "padding": 1 - tokens / read,
        "padding_of_an_epoch": overall,
    }

    def call() -> dict:
        step(iter([batch]))
        return figures

    return call


def sequence_lengths(row: dict[str, Any]) -> list[int]:
    """Tokens of each sequence that a prepared row brings to a batch: one, or two of a pair."""
    if "input_ids" in row:
        return [len(row["input_ids"])]
    prompt = len(row["prompt_ids"])
    return [prompt + len(row[f"{side}_ids"]) for side in ("chosen", "rejected")]


def read_of(lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens of a batch, and those that are read of it when each sequence is as the longest."""
    sequences = [length for row in lengths for length in row]
    return sum(sequences), len(sequences) * max(sequences)


def typical_batch(lengths: Sequence[Sequence[int]], size: int) -> tuple[list[int], float]:
    """A batch that is padded as the batches of an epoch are together.

    Of the tenth of the batches whose share of padding is nearest to that of all together, it is the
    one of the fewest tokens, so that a step is short.

    Args:
        lengths: Tokens of each sequence of each row.
        size: Rows of a batch, at most as many as there are.

    Returns:
        The numbers of its rows, and the share of padding of all batches.
    """
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = [order[i : i + size].tolist() for i in range(0, len(order) - size + 1, size)]
    tokens, read = np.array([read_of([lengths[row] for row in batch]) for batch in batches]).T
    overall = 1 - tokens.sum() / read.sum()
    distance = abs(1 - tokens / read - overall)
    near = np.argsort(distance, kind="stable")[: -(-len(batches) // 10)]
    return batches[min(near, key=lambda batch: read[batch])], float(overall)


def _drawn(dataset: str, method: str) -> Dataset:
    """Rows of a dataset, with a confidence for SFTMix to make pairs by."""
    from llmmix.data import load_role

    rows: Any = load_role(dataset, "train")
    rows = rows.shuffle(seed=0).take(min(ROWS, len(rows)))
    if method != "sftmix" or "confidence" in rows.column_names:
        return rows
    return rows.add_column("confidence", [float(row) for row in range(len(rows))])
