"""NCO: train on the rows whose target the model does not yet find likely, in full batches.

    keep a row while F(N, p) > threshold,   p of its target, from a forward in eval mode

DCO's idea as data selection. A filter holds the batch constant: rows are drawn until as many are
kept as a batch takes, and an epoch is as many kept rows as the dataset has rows. TRL's log shows
`filter/kept`, the share of the candidates kept.

    attach_filter(trainer, LikelihoodFilter(trainer))

The filter of DCO^a is in llmmix/solve_rates.py. Recipe: recipes/dco.py. Source: arXiv 2502.07154
and its released code.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTTrainer

from llmmix.dco import n_samples_of, votes_of
from llmmix.majority import majority_weight
from llmmix.precision import evaluating
from llmmix.rows.turn_ends import scored_to_the_end
from llmmix.trainers import training_rows
from llmmix.training.means import log_metric
from llmmix.training.resuming import ResumedCallback

logger = get_logger(__name__)


class LikelihoodFilter:
    """NCO: whether F(N, p) of a row's target is still above a threshold.

    Args:
        trainer: The trainer whose model scores its own training rows, in eval mode.
        n_samples: N; that of the trainer by default, with its `votes` = k: F is then w / k of
            llmmix/majority.py.
        threshold: F below which a row is left out.

    Raises:
        ValueError: `threshold` is not in (0, 1], or TRL joins the rows of a batch.
    """

    def __init__(
        self, trainer: SFTTrainer, *, n_samples: int | None = None, threshold: float = 0.1
    ):
        if getattr(trainer, "padding_free", False):
            raise ValueError(
                "TRL's `padding_free` and `packing` join a batch into one row, and a filter needs "
                "rows apart. Leave them off; `attach_heads(trainer, padding_free=True)` computes "
                "no padding."
            )
        self.trainer: Any = trainer  # transformers types its model and its collator as optional
        self.threshold = check_share("threshold", threshold)
        self.votes = votes_of(trainer) if n_samples is None else 1
        self.n_samples = n_samples_of(trainer) if n_samples is None else n_samples

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(rows,) bool: whether each is kept."""
        trainer, model = self.trainer, self.trainer.model
        dataset = training_rows(trainer, "A filter").select_columns(["input_ids", "labels"])
        size = trainer.args.per_device_train_batch_size
        logps = [torch.zeros(0, device=trainer.args.device)]
        with evaluating(model, trainer):
            for start in range(0, len(rows), size):
                part = [dataset[row] for row in rows[start : start + size]]
                batch = trainer.data_collator([self._ended(row) for row in part])
                batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
                logps.append(model(**batch, fused_lm_head=True).log_probs.sum(1))
        weight = majority_weight(torch.cat(logps), self.n_samples, self.votes)
        return weight / self.votes > self.threshold

    def _ended(self, row: dict[str, list[int]]) -> dict[str, list[int]]:
        tokenizer = self.trainer.processing_class
        return row | {"labels": scored_to_the_end(tokenizer, row["input_ids"], row["labels"])}


class FilteredSampler(Sampler[int]):
    """Rows in the order of a seeded shuffle, those that a filter leaves out skipped.

    Passes over the dataset follow one another until an iteration has given as many rows as the
    dataset has. A pass in which nothing is kept ends the iteration.

    Args:
        size: Rows of the dataset.
        keep: (rows) -> bool of each, the same on every process.
        candidates: Rows asked about at once.
        seed: Seed of the shuffles.
    """

    def __init__(
        self, size: int, keep: Callable[[list[int]], list[bool]], candidates: int, seed: int
    ):
        self.size, self.keep, self.candidates, self.seed = size, keep, candidates, seed
        self.reset()

    def reset(self) -> None:
        """Begin with the first pass."""
        self.exhausted = False
        self._waiting: deque[int] = deque()
        self._given: list[int] = []  # in this iteration
        self._replay: list[int] = []  # to be given again, first, by the next iteration
        self._pass = self._position = self._fruitless = 0

    def __len__(self) -> int:
        return self.size

    @property
    def rows_given(self) -> int:
        """Rows of this iteration so far, which may end before `len(self)`."""
        return len(self._given)

    def __iter__(self) -> Iterator[int]:
        # What a resumed run has seen. It is cleared here and not at the end, which a loader that
        # reads ahead reaches before its last batch is trained on
        self._given, self._replay = self._replay, []
        yield from list(self._given)
        while len(self._given) < self.size:
            while not self._waiting and not self.exhausted:
                self._ask()
            if self.exhausted:
                return
            self._given.append(self._waiting.popleft())
            yield self._given[-1]

    def _ask(self) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._pass)
        order = torch.randperm(self.size, generator=generator).tolist()
        rows = order[self._position : self._position + self.candidates]
        self._position += len(rows)
        if self._position >= self.size:
            self._pass, self._position = self._pass + 1, 0
        kept = [row for row, wanted in zip(rows, self.keep(rows), strict=True) if wanted]
        self._waiting += kept
        self._fruitless = 0 if kept else self._fruitless + len(rows)
        self.exhausted = self._fruitless >= self.size

    def state_dict(self) -> dict:
        """The state that decides which rows come next."""
        return {
            "given": self._given,
            "waiting": list(self._waiting),
            "place": [self._pass, self._position, self._fruitless],
        }

    def load_state_dict(self, state: dict, *, new_epoch: bool = False) -> None:
        """Go on from `state_dict`: the next iteration gives what the last one had given, and more.

        Args:
            state: From `state_dict`.
            new_epoch: Whether the last iteration was trained on to its end, and another is due.
        """
        self.reset()
        self._replay, self._waiting = list(state["given"]), deque(state["waiting"])
        self._pass, self._position, self._fruitless = state["place"]
        if new_epoch:
            self._replay = []


class FilterCallback(ResumedCallback):
    """Saves and resumes a `FilteredSampler`, and ends training when nothing is kept."""

    def __init__(self, sampler: FilteredSampler):
        self.sampler = sampler

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop once a whole pass has kept nothing."""
        if self.sampler.exhausted and not control.should_training_stop:
            logger.warning(
                "The filter kept none of the %d rows in a whole pass: training ends here.",
                self.sampler.size,
            )
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop as after a step: rows may end inside an accumulation window."""
        self.on_step_end(args, state, control)

    def begin(self) -> None:
        """Begin with the first pass."""
        self.sampler.reset()

    def saved(self) -> dict:
        """The state of the sampler."""
        return self.sampler.state_dict()

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Go on with the rows of the step after the checkpoint."""
        self.sampler.load_state_dict(saved, new_epoch=float(state.epoch).is_integer())


def attach_filter(
    trainer: Trainer,
    keep: Callable[[Sequence[int]], Tensor],
    *,
    warmup_steps: int = 20,
    candidates: int | None = None,
) -> FilteredSampler:
    """Train on the rows that a filter keeps, in batches of constant size.

    The filter sees the model as it is when a batch is put together: one micro-batch before that
    batch is trained on. Each process asks about its share of the candidates.

    Args:
        trainer: Any trainer whose training rows have a length.
        keep: (rows) -> (rows,) bool, such as a `LikelihoodFilter` or `SolveRates.below`.
        warmup_steps: Optimizer steps before the first row is left out.
        candidates: Rows asked about at once; as many as a step takes by default.

    Returns:
        The sampler that the trainer now uses.

    Raises:
        ValueError: The loader has workers, which draw rows long before their time; one process
            reads the rows of all; rows are streamed; the trainer has a filter already; or its
            parameters are spread over processes.
    """
    check_trainer("A filter", trainer)
    size = _check_rows_in_time(trainer)
    if any(isinstance(other, FilterCallback) for other in trainer.callback_handler.callbacks):
        raise ValueError("The trainer has a filter already. Combine both into one `keep`.")
    args, accelerator = trainer.args, trainer.accelerator
    rank, ranks = accelerator.process_index, accelerator.num_processes

    def kept(rows: list[int]) -> list[bool]:
        if trainer.state.global_step < warmup_steps:
            return [True] * len(rows)
        share = -(-len(rows) // ranks)
        mine = rows[rank * share : (rank + 1) * share]
        flags = torch.zeros(share, dtype=torch.bool, device=args.device)
        flags[: len(mine)] = keep(mine).to(args.device)  # even of no rows: it may be collective
        flags = accelerator.gather(flags)[: len(rows)].tolist()
        log_metric(trainer, "filter/kept", sum(flags), len(flags))
        return flags

    if candidates is None:
        candidates = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    seed = args.seed if args.data_seed is None else args.data_seed
    sampler = FilteredSampler(size, kept, candidates, seed)
    # The trainer's own hook, replaced on this trainer alone
    trainer._get_train_sampler = lambda train_dataset=None: sampler  # type: ignore[method-assign]
    trainer.add_callback(FilterCallback(sampler))
    return sampler


def _check_rows_in_time(trainer: Trainer) -> int:
    """The number of training rows, if every process reads its own rows just before it uses them."""
    args, dataset = trainer.args, trainer.train_dataset
    if not isinstance(dataset, Sized):
        raise ValueError(
            "A filter counts the rows of an epoch, so `train_dataset` must not be streamed; got "
            f"{type(dataset).__name__}."
        )
    if args.dataloader_num_workers:
        raise ValueError(
            f"`dataloader_num_workers={args.dataloader_num_workers}` draws rows long before they "
            "are trained on, and a filter decides by the model of the moment. Set it to 0."
        )
    config = args.accelerator_config
    if isinstance(config, AcceleratorConfig) and config.dispatch_batches:
        raise ValueError(
            "`accelerator_config`: with `dispatch_batches` one process reads the rows of all, and "
            "a filter needs each to ask about its share. Set it to false."
        )
    return len(dataset)


def check_trainer(what: str, trainer: Trainer) -> None:
    """Refuse a trainer that filters and solve rates do not work with.

    Raises:
        ValueError: The launch is under FSDP or DeepSpeed, where no process holds the whole model;
            or `restore_callback_states_from_checkpoint` is set, which cannot restore these.
    """
    kind = trainer.accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{what} needs the whole model on each process, and {kind} spreads it. Use DDP."
        )
    if trainer.args.restore_callback_states_from_checkpoint:
        raise ValueError(
            f"{what} restores its state by itself: leave `restore_callback_states_from_checkpoint` "
            "at False."
        )


def check_share(name: str, value: float) -> float:
    """The value, if it lies in (0, 1].

    Raises:
        ValueError: `value` is outside (0, 1].
    """
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must lie in (0, 1], got {value}.")
    return value
