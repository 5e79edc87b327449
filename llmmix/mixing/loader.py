"""`MixtureLoader`: replaces a trainer's own loader by one whose micro-batches a sampler draws.

Draw i of a step goes to micro-batch i // (batch * processes) and to process i // batch modulo
processes. This is the layout of accelerate: two processes see the rows that two accumulated
micro-batches of one process see. Each process makes all draws, which are cheap, and reads its own
rows.

A torch `DataLoader` with workers reads rows ahead. Here it reads no further than the plan reaches,
and forgets what it read when there is a new plan. Without workers it reads nothing ahead, not even
the one micro-batch that accelerate's loader does.
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
    """The micro-batches of one process.

    Args:
        sampler: Sampler that draws the rows.
        loader: The trainer's own loader, whose dataset, collator and worker settings are used.
        locate: Maps (domains, rows, passes), each (n,), to n indices of the dataset.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of a step on one process.
        process: (rank, number of processes).
        steps_an_epoch: Steps of an epoch. Default: as many draws as there are rows, in whole steps.

    Attributes:
        draws_a_step: Draws of a step, on all processes.
        keep: Whether to keep the batches of a step, to measure on them.
        kept: For each micro-batch of the step, the domain of each of its rows, and the batch.
        ended: Whether the domains have too few rows left for a step.
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
        self._domains: list[np.ndarray] = []  # by micro-batch, of those read ahead
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
            persistent_workers=workers > 0,  # a plan may last only a few steps
            generator=torch.Generator(),  # else each start would advance the global one
        )

    @classmethod
    def of_trainer(
        cls, trainer: Trainer, sampler: MixtureSampler, loader: DataLoader, locate: Locate
    ) -> "MixtureLoader":
        """The loader of a trainer's process, with the sizes that the trainer's arguments say."""
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
        """Batch sampler of the process's micro-batches, up to the end of the plan."""

        def __init__(self, owner: "MixtureLoader"):
            self._owner = owner

        def __iter__(self) -> Iterator[list[int]]:
            return self._owner.indices()

    def go_on(self, step: int, total_steps: int) -> None:
        """Skip the part of its epoch that a run resumed at `step` has trained on."""
        self._skip = step % self.steps_an_epoch * self._accumulation
        if step >= total_steps:
            self._skip = len(self)  # nothing is left of the run

    def rows_to_learn_from(self, domain: int, step: int) -> list[dict]:
        """Rows of a domain to take its gradient on, as many as a step has.

        They are drawn with replacement, and are the same on every process.

        Raises:
            ValueError: A domain has no length.
        """
        if self.sampler.passes.endless:
            raise ValueError(
                "Gradients by domain are taken on rows drawn at random, which a stream does not "
                "allow: give domains with a length."
            )
        name, size = self.sampler.names[domain], int(self.sampler.sizes[domain])
        count = self.draws_a_step
        numbers = uniforms(self.sampler.seed, f"gradients {name} {step}", 0, count)
        rows = (numbers * size).astype(int)
        where = self._locate(np.full(count, domain), rows, np.zeros(count, dtype=int))
        return [self.dataset[index] for index in where.tolist()]

    def close(self) -> None:
        """Stop the workers now: the garbage collector would wait five seconds for each."""
        self._loader = None

    def __len__(self) -> int:
        """Number of micro-batches of an epoch."""
        return self.steps_an_epoch * self._accumulation

    def indices(self) -> Iterator[list[int]]:
        """The indices of each micro-batch of this process, up to the end of the plan."""
        rank, processes = self._process
        while (step := self._draw_step()) is not None:
            domains, indices = (
                part.reshape(self._accumulation, processes, self._batch_size)[:, rank]
                for part in step
            )
            self._domains.extend(domains)
            yield from indices.tolist()

    def _draw_step(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Domains and indices of the draws of a step; None where too few are left."""
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
