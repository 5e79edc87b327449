"""`StreamedRows`: streams as the domains of a mixture, each read in its own order.

    streams = StreamedRows({"web": web, "code": code})      # datasets.IterableDataset, tokenized
    trainer = Trainer(model, args, train_dataset=streams)   # args.max_steps is the length
    attach_mixture(trainer, MixtureSampler(streams.domains, [0.7, 0.3]))

The k-th draw of a stream is its k-th row. A stream that ends begins again, in the order of its next
epoch. Each process reads every stream and skips the rows of other processes. A resumed run skips
the rows that were trained on, which takes as long as reading them.
"""

from collections.abc import Mapping

import numpy as np
import torch
from datasets import IterableDataset

STRIDE = 1 << 44  # index of a row = number of its stream * STRIDE + number of the row


class StreamedRows(torch.utils.data.Dataset):
    """Streams as a dataset, whose rows are asked for by ascending number within a stream.

    Args:
        domains: Streams by name, with rows as the trainer's collator takes them. Shuffle them
            beforehand with `IterableDataset.shuffle`.

    Raises:
        ValueError: `domains` is empty or has a value that is no `IterableDataset`; on reading, a
            stream has no rows.
    """

    def __init__(self, domains: Mapping[str, IterableDataset]):
        if not domains:
            raise ValueError("`domains` is empty: name at least one stream.")
        for name, stream in domains.items():
            if not isinstance(stream, IterableDataset):
                raise ValueError(
                    f"`domains`: {name!r} is a {type(stream).__name__}, no `IterableDataset`. Rows "
                    "with a length are mixed with `label_domains`."
                )
        self.domains = dict(domains)
        self._streams = list(domains.values())
        self._readers: list[tuple | None] = [None] * len(domains)  # iterator, next row, epoch

    def locate(self, domains: np.ndarray, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """The indices of draws (see `rows.Locate`)."""
        return domains * STRIDE + rows

    def __getitem__(self, index: int) -> dict:
        number, row = divmod(int(index), STRIDE)
        reader = self._readers[number]
        if reader is None or row < reader[1]:  # read again from the start
            self._streams[number].set_epoch(0)
            reader = (iter(self._streams[number]), 0, 0)
        rows, place, epoch = reader
        while True:
            try:
                found = next(rows)
            except StopIteration:
                epoch += 1
                self._streams[number].set_epoch(epoch)
                rows = iter(self._streams[number])
                found = next(rows, None)
                if found is None:
                    name = list(self.domains)[number]
                    raise ValueError(f"`domains`: the stream {name!r} has no rows.") from None
            place += 1
            if place > row:
                break
        self._readers[number] = (rows, place, epoch)
        return found
