"""Memorization: the most probable tokens of a model beside the tokens of the answer.

Both measures are those of OpenUnlearning (arXiv 2506.12618), with its two mistakes put right: the
last token is left out only if it ends the sequence, and no match at the end scores 0.
"""

from collections.abc import Sequence

import numpy as np

Ids = np.ndarray | Sequence[int]


def extraction_strength(
    labels: Ids, predictions: Ids, *, eos_token_id: int | Sequence[int] | None = None
) -> float | None:
    """Share of one answer that greedy decoding completes, given what comes before.

        1 - k/n,    k the least with prediction = label at all positions from k on (0 if none is)

    Args:
        labels: The answer's token ids, (n,).
        predictions: The most probable ids under teacher forcing, (n,).
        eos_token_id: The last token does not count if it is this one, or one of these.

    Returns:
        A share in [0, 1]; None for an answer without tokens.

    Raises:
        ValueError: `labels` and `predictions` differ in shape, or a label is masked.
    """
    right = _matches(labels, predictions, eos_token_id)
    if not len(right):
        return None
    wrong = np.flatnonzero(~right)
    return 1 - (int(wrong[-1]) + 1) / len(right) if len(wrong) else 1.0


def exact_memorization(
    labels: Ids, predictions: Ids, *, eos_token_id: int | Sequence[int] | None = None
) -> float | None:
    """Share of one answer's tokens that are the most probable ones under teacher forcing.

    Arguments, result and errors are those of `extraction_strength`.
    """
    right = _matches(labels, predictions, eos_token_id)
    return float(right.mean()) if len(right) else None


def _matches(labels: Ids, predictions: Ids, eos_token_id: int | Sequence[int] | None) -> np.ndarray:
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            "`labels` and `predictions` must be two sequences of one length, got shapes "
            f"{labels.shape} and {predictions.shape}; give one answer at a time."
        )
    if (labels < 0).any():
        raise ValueError(
            f"`labels` must hold the answer's ids alone, got {labels.min()}; select the scored "
            "positions of both first."
        )
    right = labels == predictions
    ends = len(labels) and eos_token_id is not None and np.isin(labels[-1], eos_token_id)
    return right[:-1] if ends else right
