"""Which rows of an epoch's last batch are new, in any loader that accelerate makes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler

from llmmix.filtering import FilteredSampler
from llmmix.sftmix.pairing import PairSampler
from llmmix.training.windows import evaluated, new_rows, window


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


def test_a_packed_batch_is_scored_whole(caplog):
    """Its rows are one, and which of them were given before cannot be told."""
    loader = DataLoader(range(5), batch_size=2)
    loader = prepare_data_loader(loader, num_processes=2, process_index=1)
    state = SimpleNamespace(active_dataloader=loader, num_processes=2)
    trainer = SimpleNamespace(
        callback_handler=SimpleNamespace(eval_dataloader=loader),
        accelerator=SimpleNamespace(gradient_state=state, num_processes=2),
        state=SimpleNamespace(max_steps=0, global_step=0),
        control=SimpleNamespace(should_training_stop=False),
    )
    *_, last = loader
    assert len(last) == 2 and new_rows(loader, 2) == 0  # this process's are repeated
    padded = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    padded["labels"] = torch.ones(2, 3)
    assert evaluated(trainer, padded)["labels"].eq(-100).all()
    packed = {name: torch.ones(1, 6) for name in ("input_ids", "labels", "position_ids")}
    assert evaluated(trainer, packed) is packed
    assert [batch is packed for batch in window(trainer, iter([packed]))] == [True]
    assert "Rows are packed: where they do not fill the last batch" in caplog.text
