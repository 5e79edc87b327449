"""A weight for each row of a dataset, in the place of DCO's F of the row's own target.

Recipe: recipes/dco_cot.py, with the weights of llmmix/solve_rates.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from llmmix.rows.weights import keep_columns
from llmmix.trainers import training_rows


def attach_weights(trainer: Trainer, weights: Callable[[Sequence[int]], Tensor]) -> None:
    """Weight the cross-entropy of each row by a function of the row, in place of F of its target.

    A `weight` that the row itself has multiplies it.

    Args:
        trainer: A `DCOTrainer`; its `reduction` decides between summed and mean token losses.
        weights: (rows) -> (rows,), such as `SolveRates.weights`; called once for each accumulation
            window, on the rows of this process.

    Raises:
        TypeError: The trainer's loss takes no weights.
        ValueError: Rows are streamed.
    """
    if not hasattr(trainer, "row_weights"):
        raise TypeError(
            f"`trainer` must take a weight for each row, as `DCOTrainer` does, got "
            f"{type(trainer).__name__}."
        )
    rows = training_rows(trainer, "A weight for each row")
    trainer.train_dataset = rows.add_column("row", list(range(len(rows))))
    trainer.data_collator = _WithRows(trainer.data_collator)
    trainer.row_weights = weights
    keep_columns(trainer, "row")


class _WithRows:
    """A collator that passes the number of each row on."""

    def __init__(self, collate: Callable[[list[dict]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[dict]) -> dict:
        numbered = "row" in examples[0]
        rows = [example.pop("row") for example in examples] if numbered else []
        batch = self.collate(examples)
        if numbered:
            batch["row"] = torch.tensor(rows)
        return batch
