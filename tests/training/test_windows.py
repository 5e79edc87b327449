"""Which rows of an epoch's last batch are new, in any loader that accelerate makes."""

import itertools

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler

from llmmix.filtering import FilteredSampler
from llmmix.sftmix.pairing import PairSampler
from llmmix.training.windows import new_rows


def in_order(rows):
    return SequentialSampler(range(rows))


def paired(rows):
    """Longer than an odd number of rows: it draws one of them twice."""
    return PairSampler(torch.arange(rows) < rows // 2, seed=0, epoch=lambda: 0)


class Short(FilteredSampler):
    """Two rows in three, and then none."""

    def __init__(self, rows):
        super().__init__(rows, self.keep_once, candidates=2, seed=0)
        self.kept = set()

    def keep_once(self, asked):
        new = [row for row in asked if row % 3 and row not in self.kept]
        self.kept.update(new)
        return [row in new for row in asked]


def new_on_all(sampler, rows, ranks, batch, *, split=False, skipped=0, **options):
    """The rows that count, in the order in which one process would read them."""
    batches = []
    for rank in range(ranks):
        loader = DataLoader(range(rows), batch_size=batch, sampler=sampler(rows), **options)
        loader = prepare_data_loader(
            loader, num_processes=ranks, process_index=rank, split_batches=split
        )
        loader = skip_first_batches(loader, skipped) if skipped else loader
        batches.append([some[: new_rows(loader, len(some))].tolist() for some in loader])
    return [row for step in zip(*batches, strict=True) for part in step for row in part]


@pytest.mark.parametrize("sampler", [in_order, paired, Short])
def test_each_row_of_an_epoch_is_new_once(sampler):
    for rows, batch, ranks in itertools.product(range(3, 30), (2, 3, 4), (2, 3)):
        assert new_on_all(sampler, rows, ranks, batch) == list(sampler(rows))


def test_rows_of_a_batch_that_ranks_share_are_new_once():
    for rows, batch, ranks in itertools.product(range(1, 30), (6, 12), (2, 3)):
        assert new_on_all(in_order, rows, ranks, batch, split=True) == list(range(rows))


def test_a_loader_that_drops_the_last_batch_repeats_nothing():
    for rows in range(8, 30):
        found = new_on_all(in_order, rows, 2, 4, drop_last=True)
        assert found == list(range(rows // 8 * 8))


def test_a_resumed_epoch_goes_on_with_rows_that_are_new():
    for rows, skipped in itertools.product(range(17, 30), (1, 2)):
        found = new_on_all(in_order, rows, 2, 4, skipped=skipped)
        assert found == list(range(8 * skipped, rows))


def test_a_stream_may_repeat_rows_and_says_so_once(caplog):
    """Seven rows over two ranks in batches of two: accelerate repeats one, and does not say so."""
    stream = Dataset.from_dict({"n": range(7)}).to_iterable_dataset()
    for rank in (0, 1):
        loader = DataLoader(stream, batch_size=2)
        loader = prepare_data_loader(
            loader, num_processes=2, process_index=rank, dispatch_batches=False
        )
        assert [new_rows(loader, len(batch["n"])) for batch in loader] == [2, 2]
    assert caplog.text.count("Rows are streamed") == 1
