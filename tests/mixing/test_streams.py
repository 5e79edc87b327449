"""Streams as domains: the same rows as ever, on time, and after a resume."""

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments, default_data_collator

from llmmix.files import read_record
from llmmix.mixing import MixtureSampler, attach_mixture
from llmmix.mixing.streams import STRIDE, StreamedRows


def streams(sizes=(5, 7)) -> StreamedRows:
    """Rows of four tokens that say where they come from."""
    made = {}
    for name, size, first in zip("ab", sizes, (10, 100), strict=True):
        ids = [[first + row] * 4 for row in range(size)]
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
        made[name] = rows.to_iterable_dataset()
    return StreamedRows(made)


class Kept(Trainer):
    """Keeps what it was given."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"][:, 0].tolist()]
        return super().training_step(model, inputs, num_items_in_batch)


def trainer(model, folder, **options):
    settings = {"max_steps": 8, "per_device_train_batch_size": 2, "save_steps": 3}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True} | options
    args = TrainingArguments(str(folder), dataloader_pin_memory=False, **settings)
    return Kept(model, args, train_dataset=streams(), data_collator=default_data_collator)


def test_rows_come_in_their_order_and_a_stream_begins_again():
    rows = streams()
    read = [rows[STRIDE + place]["input_ids"][0] for place in range(9)]
    assert read == [100, 101, 102, 103, 104, 105, 106, 100, 101]
    assert rows[3]["input_ids"][0] == 13 and rows[1]["input_ids"][0] == 11  # back to the start
    assert rows.locate(np.array([1, 0]), np.array([2, 3]), np.zeros(2)).tolist() == [STRIDE + 2, 3]


def test_a_trainer_reads_what_the_sampler_draws_and_resumes(model, tmp_path):
    first = trainer(model, tmp_path / "run")
    sampler = MixtureSampler(first.train_dataset.domains, [0.7, 0.3], seed=1)
    attach_mixture(first, sampler)
    first.train()
    seen = np.concatenate(first.seen)
    for start, size, name in ((10, 5, "a"), (100, 7, "b")):
        own = seen[(seen >= start) & (seen < start + 50)]
        assert own.tolist() == [start + place % size for place in range(sampler.counts[name])]
    _, entries = read_record(tmp_path / "run")
    assert sum(np.array([e["counts"] for e in entries if "counts" in e])).tolist() == [
        *sampler.counts.values()
    ]
    again = trainer(model, tmp_path / "run")
    attach_mixture(again, MixtureSampler(again.train_dataset.domains, [0.7, 0.3], seed=1))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert again.seen == first.seen[3:]


def test_what_is_amiss_is_said(model, tmp_path):
    with pytest.raises(ValueError, match="`domains` is empty"):
        StreamedRows({})
    with pytest.raises(ValueError, match="'a' is a Dataset, no `IterableDataset`"):
        StreamedRows({"a": Dataset.from_dict({"input_ids": [[1]]})})
    with pytest.raises(ValueError, match="the stream 'a' has no rows"):
        StreamedRows({"a": IterableDataset.from_generator(lambda: iter(()))})[0]
    busy = trainer(model, tmp_path, dataloader_num_workers=1)
    with pytest.raises(ValueError, match="`dataloader_num_workers=1`"):
        attach_mixture(busy, MixtureSampler(busy.train_dataset.domains))
    other = trainer(model, tmp_path)
    with pytest.raises(ValueError, match="the streams are"):
        attach_mixture(other, MixtureSampler({"c": range(3)}))
    with pytest.raises(ValueError, match="has no indices"):
        next(iter(MixtureSampler(streams().domains)))
