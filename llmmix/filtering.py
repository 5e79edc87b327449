"""Which rows are still worth a step: DCO's idea as data selection, and DCO for chains of thought.

    NCO     keep a row while F(N, p) > threshold,   p of its target, from a forward in eval mode
    DCO^a   p^ = share of `num_samples` sampled completions that end in the right answer
            hard: keep a row while p^ < threshold;   soft: loss = F(N, p^) * cross-entropy

A long chain of thought has a p so small that DCO on it is cross-entropy; what can be covered by N
draws is its final answer, whose probability is a sum over chains and is estimated by sampling the
model in training. Filters hold the batch constant: rows are drawn until as many are kept as a batch
takes, and an epoch is as many kept rows as the dataset has rows. TRL's log shows `filter/kept`, the
share of the candidates kept, `solve_rate/mean`, of the rows asked about, and `solve_rate/failed`,
the share of the samples whose verification failed.

    symbol   name
    p^       SolveRates(rows)
    N        n_samples
    F        dco_weight

    attach_filter(trainer, LikelihoodFilter(trainer))                    NCO
    rates = SolveRates(trainer, verifier)
    attach_filter(trainer, rates.below(0.1)); attach_weights(trainer, rates.weights)    DCO^a

Recipes: recipes/dco_cot.py, recipes/dco.py. Source: arXiv 2502.07154 and its released code.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from llmmix.dco import DCOTrainer, dco_weight
from llmmix.sampling import check_room, encode, sample
from llmmix.solving import reference_answers
from llmmix.verify import Verifier, judge

logger = get_logger(__name__)


class LikelihoodFilter:
    """NCO: whether F(N, p) of a row's target is still above a threshold.

    Args:
        trainer: Whose model scores its own training rows, in eval mode.
        n_samples: N; that of the trainer by default.
        threshold: F below which a row is left out.
    """

    def __init__(
        self, trainer: DCOTrainer, *, n_samples: int | None = None, threshold: float = 0.1
    ):
        self.trainer, self.threshold = trainer, _share("threshold", threshold)
        self.n_samples = trainer.args.n_samples if n_samples is None else n_samples

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(rows,) bool."""
        trainer, model = self.trainer, self.trainer.model
        dataset = trainer.train_dataset.select_columns(["input_ids", "labels"])
        size = trainer.args.per_device_train_batch_size
        logps = [torch.zeros(0, device=trainer.args.device)]
        with _eval_mode(model), torch.no_grad(), trainer.compute_loss_context_manager():
            for start in range(0, len(rows), size):
                batch = trainer.data_collator([dataset[row] for row in rows[start : start + size]])
                batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
                logps.append(model(**batch, fused_lm_head=True).log_probs.sum(1))
        return dco_weight(torch.cat(logps), self.n_samples) > self.threshold


class SolveRates(TrainerCallback, ExportableState):
    """p^, how often the model in training solves each of its rows, estimated by sampling and kept.

    Rows need a `prompt` and an `answer`. During the first `warmup_steps` every p^ is 0, so that
    nothing is filtered and every weight is 1.

    Args:
        trainer: Whose model is sampled, on prompts of its training rows.
        verifier: A `Verifier`, or what it takes.
        num_samples: Completions a row.
        min_samples: With fewer judged ones, p^ counts as 0.
        refresh_every: Optimizer steps for which an estimate is taken as it is.
        warmup_steps: Steps before the first estimate.
        temperature: Of the sampling.
        max_new_tokens: Tokens after which a completion is cut.
        token_budget: As for `sample`.

    Raises:
        ValueError: Rows without a prompt or an answer, prompts that leave no room for a
            completion, or parameters spread over processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        verifier="math",
        *,
        num_samples: int = 64,
        min_samples: int = 1,
        refresh_every: int = 100,
        warmup_steps: int = 20,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        token_budget: int = 16384,
    ):
        check_trainer("Sampling the model in training", trainer)
        rows = trainer.train_dataset
        if missing := {"prompt", "answer"} - set(rows.column_names):
            raise ValueError(
                f"Solve rates need rows with `prompt` and `answer`; {sorted(missing)} is missing."
            )
        if not 1 <= min_samples <= num_samples or refresh_every < 1:
            raise ValueError(
                "`min_samples` must lie between 1 and `num_samples`, and `refresh_every` be 1 or "
                f"more, got {min_samples}, {num_samples} and {refresh_every}."
            )
        self._answers = reference_answers(rows)
        prompts = rows.select_columns(["prompt"])
        ids = [encode(trainer.processing_class, row["prompt"]) for row in prompts]
        check_room(ids, trainer.model, max_new_tokens, token_budget)  # now, not in mid-run
        self.trainer = trainer
        self.verifier = verifier if isinstance(verifier, Verifier) else Verifier(verifier)
        self.num_samples, self.min_samples = num_samples, min_samples
        self.refresh_every, self.warmup_steps = refresh_every, warmup_steps
        self.sampling = {
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "token_budget": token_budget,
        }
        self._known: dict[int, tuple[int, float]] = {}  # row: step, p^
        trainer.add_callback(self)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(rows,) p^ in fp64, sampled where it is not known or too old.

        All processes must call it together, each for rows of its own.
        """
        step = self.trainer.state.global_step
        if step < self.warmup_steps:
            return torch.zeros(len(rows), dtype=torch.float64)
        old = [
            row
            for row in dict.fromkeys(rows)
            if row not in self._known or step - self._known[row][0] >= self.refresh_every
        ]
        found = self._estimate(old) if old else {}
        # Every process learns what each has estimated; they call this together, if for other rows
        for part in gather_object([found]):
            self._known |= {row: (step, rate) for row, rate in part.items()}
        rates = torch.tensor([self._known[row][1] for row in rows], dtype=torch.float64)
        if len(rows):
            _log(self.trainer, "solve_rate/mean", rates.mean().item())
        return rates

    def below(self, threshold: float) -> Callable[[Sequence[int]], Tensor]:
        """The hard filter: rows whose p^ is below the threshold are kept."""
        _share("threshold", threshold)
        return lambda rows: self(rows) < threshold

    def weights(self, rows: Sequence[int]) -> Tensor:
        """(rows,) F(N, p^), with the trainer's N: the soft form."""
        return dco_weight(self(rows).log(), self.trainer.args.n_samples)

    def _estimate(self, rows: list[int]) -> dict[int, float]:
        step = self.trainer.state.global_step
        dataset = self.trainer.train_dataset.select_columns(["prompt"])
        completions = sample(
            self.trainer.model,
            self.trainer.processing_class,
            [dataset[row]["prompt"] for row in rows],
            self.num_samples,
            numbers=rows,
            seed=self.trainer.args.seed * 1_000_003 + step,  # other draws at each refresh
            **self.sampling,
        )
        answers = {row: self._answers[row] for row in rows}
        judged, right = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
        why = None
        for completion, verdict in judge(completions, answers, self.verifier):
            if verdict == "failed":
                why = self.verifier.why(completion.text, answers[completion.prompt])
            judged[completion.prompt] += verdict != "failed"
            right[completion.prompt] += verdict == "right"
        failed = sum(self.num_samples - count for count in judged.values())
        share = failed / (self.num_samples * len(rows))
        _log(self.trainer, "solve_rate/failed", share)
        if share > 0.5:
            logger.warning(
                "%.0f%% of the verifications failed (%s): solve rates rest on the others alone.",
                100 * share,
                why,
            )
        known = [row for row in rows if judged[row] >= self.min_samples]
        return dict.fromkeys(rows, 0.0) | {row: right[row] / judged[row] for row in known}

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget the estimates of another run, or take up those of the one that is resumed."""
        saved = state.stateful_callbacks.setdefault("SolveRates", self.state())
        known = saved["attributes"]["known"] if state.global_step else ()
        self._known = {int(row): tuple(kept) for row, kept in known}

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"known": list(self._known.items())}}


class FilteredSampler(Sampler[int]):
    """Rows in the order of a seeded shuffle, those that a filter leaves out skipped.

    Passes follow one another until an iteration has given as many rows as there are; one that keeps
    nothing ends it.

    Args:
        size: Rows of the dataset.
        keep: (rows) -> bool of each, the same on every process.
        candidates: Rows asked about at once.
        seed: Of the shuffles.
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
        self._given: list[int] = []  # of this iteration
        self._replay: list[int] = []  # at the start of the next one
        self._pass = self._position = self._fruitless = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
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
        """What decides the rows to come."""
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


class FilterCallback(TrainerCallback, ExportableState):
    """Saves and resumes a `FilteredSampler`, and ends training when nothing is kept."""

    def __init__(self, sampler: FilteredSampler):
        self.sampler = sampler

    def on_step_end(self, args, state, control, **kwargs):
        """Stop once a whole pass has kept nothing."""
        if self.sampler.exhausted and not control.should_training_stop:
            logger.warning(
                "The filter kept none of the %d rows in a whole pass: training ends here.",
                self.sampler.size,
            )
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """As after a step: rows may end inside an accumulation window."""
        self.on_step_end(args, state, control)

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin anew, or where the run that is resumed had come."""
        saved = state.stateful_callbacks.setdefault("FilterCallback", self.state())
        if state.global_step:
            ended = float(state.epoch).is_integer()
            self.sampler.load_state_dict(saved["attributes"], new_epoch=ended)
        else:
            self.sampler.reset()

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": self.sampler.state_dict()}


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
        trainer: Any Trainer whose training rows have a length.
        keep: (rows) -> (rows,) bool, such as a `LikelihoodFilter` or `SolveRates.below`.
        warmup_steps: Optimizer steps before the first row is left out.
        candidates: Rows asked about at once; those of a step by default.

    Returns:
        The sampler that the trainer now uses.

    Raises:
        ValueError: Loader workers, which draw rows long before their time; a loader that one
            process reads for all; a second filter; or parameters spread over processes.
    """
    check_trainer("A filter", trainer)
    args = trainer.args
    if args.dataloader_num_workers:
        raise ValueError(
            f"`dataloader_num_workers={args.dataloader_num_workers}` draws rows long before they "
            "are trained on, and a filter decides by the model of the moment. Set it to 0."
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`accelerator_config`: with `dispatch_batches` one process reads the rows of all, and "
            "a filter needs each to ask about its share. Set it to false."
        )
    if any(isinstance(other, FilterCallback) for other in trainer.callback_handler.callbacks):
        raise ValueError("The trainer has a filter already. Combine both into one `keep`.")
    accelerator = trainer.accelerator
    rank, ranks = accelerator.process_index, accelerator.num_processes

    def kept(rows: list[int]) -> list[bool]:
        if trainer.state.global_step < warmup_steps:
            return [True] * len(rows)
        share = -(-len(rows) // ranks)
        mine = rows[rank * share : (rank + 1) * share]
        flags = torch.zeros(share, dtype=torch.bool, device=args.device)
        flags[: len(mine)] = keep(mine).to(args.device)  # even of no rows: it may be collective
        flags = accelerator.gather(flags)[: len(rows)].tolist()
        _log(trainer, "filter/kept", sum(flags) / len(flags))
        return flags

    if candidates is None:
        candidates = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    seed = args.seed if args.data_seed is None else args.data_seed
    sampler = FilteredSampler(len(trainer.train_dataset), kept, candidates, seed)
    trainer._get_train_sampler = lambda train_dataset=None: sampler
    trainer.add_callback(FilterCallback(sampler))
    return sampler


def attach_weights(trainer: DCOTrainer, weights: Callable[[Sequence[int]], Tensor]) -> None:
    """Weigh the cross-entropy of each row by a function of the row, in place of F of its target.

    Args:
        trainer: Its `reduction` decides between the summed and the mean token loss.
        weights: (rows) -> (rows,), such as `SolveRates.weights`; called once for each accumulation
            window, on the rows of this process.
    """
    trainer.train_dataset = trainer.train_dataset.add_column(
        "row", list(range(len(trainer.train_dataset)))
    )
    trainer.data_collator = _WithRows(trainer.data_collator)
    trainer.row_weights = weights


class _WithRows:
    """A collator that passes the number of each row on."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples: list[dict]) -> dict:
        numbered = "row" in examples[0]
        rows = [example.pop("row") for example in examples] if numbered else None
        batch = self.collate(examples)
        if numbered:
            batch["row"] = torch.tensor(rows)
        return batch


def check_trainer(what: str, trainer: Trainer) -> None:
    """Refuse what this module does not hold under.

    Raises:
        ValueError: FSDP or DeepSpeed, under which no process holds the whole model; callbacks
            restored by the Trainer, which cannot make these.
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


def _log(trainer: Trainer, name: str, value: float) -> None:
    """Let TRL average the values since its last log."""
    if hasattr(trainer, "_metrics"):
        trainer._metrics["train"][name].append(value)


class _eval_mode:
    """Every module in eval mode, and back as it was."""

    def __init__(self, model):
        self.training = [module for module in model.modules() if module.training]

    def __enter__(self):
        for module in self.training:
            module.training = False

    def __exit__(self, *exception):
        for module in self.training:
            module.training = True


def _share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must lie in (0, 1], got {value}.")
    return value
