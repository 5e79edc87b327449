"""Stage 2 of SFTMix: the confident and the unconfident half of a dataset, drawn in pairs.

    D^c, D^u  = the half of higher and the half of lower confidence, at the median

Stage 1, which writes the confidence, is in scoring.py.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

CONFIDENCE = "confidence"  # the column that stage 1 writes and stage 2 reads


def check_confidence(dataset: object) -> None:
    """Refuse rows whose confidence is not known beforehand.

    Raises:
        ValueError: The dataset is streamed, or has no `confidence` column.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"SFTMix needs the confidence of every row beforehand, so `train_dataset` must be a "
            f"map-style `Dataset`, got {type(dataset).__name__}."
        )
    if CONFIDENCE not in dataset.column_names:
        raise ValueError(
            f"`train_dataset` has no `{CONFIDENCE}` column (it has {dataset.column_names}). Write "
            "one with `llmmix run confidence`, or set `mixup_weight=0`."
        )


def read_confidence(dataset: Dataset) -> Tensor:
    """(n,) the `confidence` column in fp64, NaN where it is null."""
    scores = dataset.with_format(None)[CONFIDENCE][:]
    return torch.tensor(
        [float("nan") if score is None else score for score in scores], dtype=torch.float64
    )


def confident_half(scores: Tensor) -> Tensor:
    """Which examples lie in the confident half: the floor(B/2) of highest confidence.

    Ties go to the earlier example, and the extra one of an odd number to the unconfident half.

    Args:
        scores: (B,) confidence.

    Returns:
        (B,) bool.

    Raises:
        ValueError: A confidence is not a number, or there are fewer than two examples.
    """
    if bad := int(scores.isnan().sum()):
        raise ValueError(
            f"The `{CONFIDENCE}` column has {bad} NaN among {len(scores)} rows: score the dataset "
            "again with `llmmix run confidence`, or remove those rows."
        )
    if len(scores) < 2:
        raise ValueError(f"SFTMix pairs examples and needs at least two, got {len(scores)}.")
    order = torch.argsort(scores, descending=True, stable=True)
    confident = torch.zeros(len(scores), dtype=torch.bool)
    confident[order[: len(scores) // 2]] = True
    return confident


class PairSampler(Sampler[int]):
    """Confident, unconfident, confident, ...: any even batch of it is half and half, in pairs.

    Both halves are shuffled anew each epoch from (seed, epoch) alone, so a resumed run draws the
    same pairs. An epoch visits every example; with an odd number, the unconfident half is one
    longer and its last example is paired with a confident one seen before.

    Args:
        confident: (n,) bool, the half of each example.
        seed: Seed of the shuffles.
        epoch: Called when an iteration begins; returns the current epoch.
    """

    def __init__(self, confident: Tensor, seed: int, epoch: Callable[[], int]):
        self._halves = [np.flatnonzero(confident), np.flatnonzero(~confident)]
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        return 2 * max(map(len, self._halves))

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch()])
        orders = [np.resize(rng.permutation(half), len(self) // 2) for half in self._halves]
        yield from np.stack(orders, axis=1).ravel().tolist()


def draw_shares(alpha: float, places: slice, seeds: Sequence[int]) -> Tensor:
    """One draw of Beta(alpha, alpha) a pair, from (seed, step, place in the step) and nothing else.

    So a resumed run draws the same, and a step split over ranks or micro-batches draws what one
    large batch would.

    Args:
        alpha: Positive.
        places: The first pair and the one after the last, among those of the step.
        seeds: Seed of the run and number of the step.

    Returns:
        The confident rows' shares in fp32.
    """
    draws = np.asarray(np.random.default_rng(list(seeds)).beta(alpha, alpha, size=places.stop))
    return torch.as_tensor(draws[places], dtype=torch.float32)
