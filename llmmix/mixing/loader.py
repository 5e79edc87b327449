"""What a trainer reads in place of its own loader: micro-batches, drawn when they are due.

Draw i of a step goes to micro-batch i // (batch * processes), process i // batch modulo processes:
the layout of accelerate, so that two processes see the rows that two accumulated micro-batches of
one process see. Each process makes all draws, which are cheap, and reads its own rows.

A `DataLoader` of torch reads rows ahead when it has workers. Here it reads no further than the
mixture is decided, and forgets what it read when the mixture is decided anew. Without workers
nothing is read ahead, not even the one micro-batch that accelerate's loader does.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from llmmix.mixing.draws import uniforms
from llmmix.mixing.rows import Locate
from llmmix.mixing.sampler import MixtureSampler


class MixtureLoader:
    """Micro-batches of one process.

    Args:
        sampler: Sampler that draws the rows.
        loader: The trainer's own loader, whose dataset, collator and workers serve here.
        locate: (domains, rows, passes), each (n,), to the n indices that the dataset takes.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of a step on one process.
        process: (rank, number of processes).
        steps_an_epoch: Steps of an epoch where domains have no length; else an epoch is as many
            draws as there are rows.

    Attributes:
        draws_a_step: Draws of a step, on all processes.
        keep: Whether to keep the batches of a step, for what is measured on them.
        kept: Domains (rows of the process,) and batch of each micro-batch of the step.
        ended: Whether the domains hold no further step.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        loader: DataLoader,
        locate: Locate,
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
        self._skip = 0  # micro-batches of the next epoch that a resumed run has seen
        self.ended = self.keep = False
        self.kept: list[tuple[np.ndarray, dict]] = []
        self._domains: list[np.ndarray] = []  # of the micro-batches read and not yet given
        workers = loader.num_workers
        self._loader: DataLoader | None = DataLoader(
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

    @classmethod
    def of_trainer(
        cls, trainer: Trainer, sampler: MixtureSampler, loader: DataLoader, locate: Locate
    ) -> "MixtureLoader":
        """What a trainer reads of a sampler's rows, in place of its own loader."""
        args = trainer.args
        return cls(
            sampler,
            loader,
            locate,
            args.train_batch_size,
            args.gradient_accumulation_steps,
            (args.process_index, args.world_size),
            args.max_steps if sampler.passes.endless else None,
        )

    class _MicroBatches:
        """The indices of the process's micro-batches, until nothing more is decided."""

        def __init__(self, owner: "MixtureLoader"):
            self._owner = owner

        def __iter__(self) -> Iterator[list[int]]:
            return self._owner.indices()

    def go_on(self, step: int, total_steps: int) -> None:
        """Skip what a run that is resumed at a step has seen of its epoch."""
        self._skip = step % self.steps_an_epoch * self._accumulation
        if step >= total_steps:
            self._skip = len(self)  # nothing is left of the run

    def rows_to_learn_from(self, domain: int, step: int) -> list[dict]:
        """Rows of a domain to take its gradient on at a step, as many as a step has.

        They are drawn with replacement, and are the same on every process.

        Raises:
            ValueError: A domain has no length.
        """
        if self.sampler.passes.endless:
            raise ValueError("Gradients by domain are taken on any of its rows: streams have none.")
        name, size = self.sampler.names[domain], int(self.sampler.sizes[domain])
        count = self.draws_a_step
        numbers = uniforms(self.sampler.seed, f"gradients {name} {step}", 0, count)
        rows = (numbers * size).astype(int)
        where = self._locate(np.full(count, domain), rows, np.zeros(count, dtype=int))
        return [self.dataset[index] for index in where.tolist()]

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
        left, self._skip = len(self) - self._skip, 0
        given, self.ended = 0, False
        while given < left and self._loader is not None:
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
