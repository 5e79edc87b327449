"""What a trainer reads in place of its own loader: micro-batches, drawn when they are due.

Draw i of a step goes to micro-batch i // (batch * processes), process i // batch modulo processes:
the layout of accelerate, so that two processes see the rows that two accumulated micro-batches of
one process see. Each process makes all draws, which are cheap, and reads its own rows.

A `DataLoader` of torch reads rows ahead when it has workers. Here it reads no further than the
mixture is decided, and forgets what it read when the mixture is decided anew. Without workers
nothing is read ahead, not even the one micro-batch that accelerate's loader does.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from llmmix.mixing.sampler import MixtureSampler


class MixtureLoader:
    """Micro-batches of one process.

    Args:
        sampler: What draws the rows.
        loader: The trainer's own, whose dataset, collator and workers serve here.
        locate: (domains, rows, passes), each (n,), to the n indices that the dataset takes.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of a step on one process.
        process: (rank, number of processes).
        steps_an_epoch: Of domains without a length; else as many draws as there are rows.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        loader: DataLoader,
        locate: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
        batch_size: int,
        accumulation: int,
        process: tuple[int, int],
        steps_an_epoch: int | None = None,
    ):
        self.sampler, self.dataset = sampler, loader.dataset
        self._locate, self._accumulation = locate, accumulation
        self._batch_size, self._process = batch_size, process
        self.draws_a_step = batch_size * accumulation * process[1]
        whole = max(1, int(sampler.sizes.sum()) // self.draws_a_step)
        self.steps_an_epoch = steps_an_epoch or whole
        self.skip = 0  # micro-batches of the next epoch that a resumed run has seen
        self.ended = False  # whether the domains hold no further step
        self.keep = False  # keep the batches of the step, for what is measured on them
        self.kept: list[tuple[np.ndarray, dict]] = []  # domains (rows of the process,), batch
        self._domains: list[np.ndarray] = []  # of the micro-batches read and not yet given
        workers = loader.num_workers
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=self._MicroBatches(self),
            collate_fn=loader.collate_fn,
            num_workers=workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            prefetch_factor=loader.prefetch_factor,
            multiprocessing_context=loader.multiprocessing_context,
            persistent_workers=workers > 0,  # a plan may be a few steps long
            generator=torch.Generator(),  # its own, or each beginning would move the model's
        )

    class _MicroBatches:
        """The indices of the process's micro-batches, until nothing more is decided."""

        def __init__(self, owner: "MixtureLoader"):
            self._owner = owner

        def __iter__(self):
            return self._owner.indices()

    def close(self) -> None:
        """End the workers; left to the garbage collector, each waits five seconds for its end."""
        self._loader = None

    def __len__(self) -> int:
        """Micro-batches an epoch: as many draws as there are rows, in whole steps."""
        return self.steps_an_epoch * self._accumulation

    def indices(self) -> Iterator[list[int]]:
        """The indices of one micro-batch after the other."""
        rank, processes = self._process
        while (step := self._draw_step()) is not None:
            domains, indices = (
                part.reshape(self._accumulation, processes, self._batch_size)[:, rank]
                for part in step
            )
            self._domains.extend(domains)
            yield from indices.tolist()

    def _draw_step(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Domains and indices of the draws of a step, or None where there are not as many."""
        parts, missing = [], self.draws_a_step
        while missing:
            block = self.sampler.take(missing)
            if block is None:
                return None
            indices = self._locate(block.domains, block.rows, block.passes)
            parts.append((block.domains, indices))
            missing -= len(indices)
        domains, indices = zip(*parts, strict=True)
        return np.concatenate(domains), np.concatenate(indices)

    def __iter__(self) -> Iterator[dict]:
        left, self.skip = len(self) - self.skip, 0
        given, self.ended = 0, False
        while given < left:
            self.sampler.rewind()
            self._domains.clear()
            version, before = self.sampler.version, given
            for batch in self._loader:
                if given % self._accumulation == 0:
                    self.kept = []
                domains = self._domains.pop(0)
                if self.keep:
                    self.kept.append((domains, batch))
                given += 1
                if given % self._accumulation == 0:
                    self.sampler.use(self.draws_a_step)
                yield batch
                if given >= left or self.sampler.version != version:
                    break
            if given == before:
                self.ended = True
                return
