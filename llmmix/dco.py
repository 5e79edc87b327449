"""DCO, Direct Coverage Optimization: a loss that trains for pass@N (arXiv 2502.07154).

    loss_N(p) = -log(1 - (1 - p)^N)
    gradient  = F(N, p) * gradient of (-log p),   F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N)

F falls from 1 to 0 as p passes 1/N: an example stops pulling once N draws would solve it. p is the
model's probability of the whole completion, never of a token and never normalized by length. With
N = 1 the loss is -log p. With `votes` = k above 1, k of the N draws must be the completion, as for
a majority vote; loss, weight and their numerics are in llmmix/majority.py.

    symbol   name
    log p    logps       summed over the completion's tokens
    N        n_samples   how many completions may be drawn at test time
    F        dco_weight  detached, from the same forward as the loss

Recipe: recipes/dco.py. Evaluation: eval/pass_at_n.py. Invariants: tests/test_invariants.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer

from llmmix.arguments import check_types, own_config, own_model
from llmmix.checkpoints.cards import sign
from llmmix.majority import check_votes, majority_loss, majority_weight
from llmmix.padding_free_setting import padded_by_trl, padding_free_field
from llmmix.rows.message_weights import carry_sft_weights
from llmmix.rows.prepared import log_dropped
from llmmix.rows.turn_ends import score_what_is_sampled
from llmmix.rows.turns import turns_found
from llmmix.rows.weights import take_weights
from llmmix.trainers import (
    ForwardRecorder,
    attach_heads,
    check_own_loss,
    check_sft_datasets,
    check_unsharded,
    default_to_cpu,
    keep_outputs_in_fp32,
    length_limit,
)
from llmmix.training.finite import end_unless_finite
from llmmix.training.means import Mean, Means
from llmmix.training.ranges import check_settings
from llmmix.training.resuming import keep_token_count
from llmmix.training.unmoved import tell_if_unmoved
from llmmix.training.windows import evaluated, window

if TYPE_CHECKING:
    from peft import PeftModel

logger = get_logger(__name__)

MASKS_ONLY = "DCO needs p of a whole completion, which has no part of a token"
# What a model's card says of training with more than one vote
OF_VOTES = (
    "Majority vote",
    ("Compute Aligned Training: Optimizing for Test Time Inference", "2604.24957"),
)


def dco_loss(logps: Tensor, n_samples: int) -> Tensor:
    """-log(1 - (1-p)^N), stable for every log p, with the gradient -F(N, p).

    Args:
        logps: (B,) summed completion log-probabilities, in nats; values above 0 count as 0.
        n_samples: N, at least 1.

    Returns:
        (B,) in fp64 for fp64 input, else fp32.

    Raises:
        ValueError: `n_samples` is below 1.
    """
    return majority_loss(logps, n_samples, 1)


def dco_weight(logps: Tensor, n_samples: int) -> Tensor:
    """F(N, p) = N p (1-p)^(N-1) / (1 - (1-p)^N), in [0, 1] and detached.

    Args:
        logps: (B,) summed completion log-probabilities, in nats; values above 0 count as 0.
        n_samples: N, at least 1.

    Returns:
        (B,) in fp64 for fp64 input, else fp32.

    Raises:
        ValueError: `n_samples` is below 1.
    """
    return majority_weight(logps, n_samples, 1)


def n_samples_of(trainer: SFTTrainer) -> int:
    """N of a trainer's config.

    Raises:
        ValueError: The config has no `n_samples`.
    """
    n = getattr(trainer.args, "n_samples", None)
    if n is None:
        raise ValueError(
            f"`n_samples` is no field of {type(trainer.args).__name__}: give it, or train with "
            "`DCOTrainer`."
        )
    return n


def votes_of(trainer: SFTTrainer) -> int:
    """The k of a trainer's config; 1, which is DCO, where it has none."""
    return getattr(trainer.args, "votes", 1)


@dataclass
class DCOConfig(SFTConfig):
    """TRL's `SFTConfig` with the fields of DCO.

    Args:
        n_samples: N, the number of completions the model may draw at test time. 1 is sequence
            cross-entropy; larger N trades pass@1 for pass@N.
        votes: k, how many of the N must be the completion, between 1 and N: the loss is
            -log P(Bin(N, p) >= k). 1 is DCO. With more, the model is trained for a majority vote
            over N, and an unlikely completion pulls up to k times as much.
        reduction: `"sum"` is the loss whose gradient is exact: per example, on the summed
            log-probability. `"token_mean"` is the authors' released code: F times the mean token
            loss, so a long completion pulls less per token.

    Raises:
        ValueError: `n_samples` is below 1, `votes` is not between 1 and `n_samples`, `reduction` is
            neither, or another setting is out of its range.
    """

    n_samples: int = field(
        default=64,
        metadata={"help": "N: the model is trained for pass@N. 1 is sequence cross-entropy."},
    )
    votes: int = field(
        default=1,
        metadata={
            "help": "k: how many of the N must be right. 1 is DCO. More train for a majority vote, "
            "with a gradient up to k times DCO's where the completion is unlikely."
        },
    )
    reduction: str = field(
        default="sum",
        metadata={
            "help": "Reduction over the tokens of a completion. 'sum': the exact gradient. "
            "'token_mean': F times the mean token loss, as in the authors' released code.",
            "choices": ["sum", "token_mean"],
        },
    )
    padding_free: bool = padding_free_field()

    def __post_init__(self) -> None:
        check_settings(self)
        check_votes(self.n_samples, self.votes)
        if self.reduction not in ("sum", "token_mean"):
            raise ValueError(f"`reduction` must be 'sum' or 'token_mean', got {self.reduction!r}.")
        default_to_cpu(self)
        super().__post_init__()


class DCOTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on the DCO loss, averaged over examples, never over tokens.

    Takes the dataset formats of `SFTTrainer` and its arguments. Logs, beside TRL's metrics,
    `dco/weight` (mean F), `dco/braked` (share of examples with F below 0.1) and `nll_per_token`
    (NLL of a scored token, which is the loss of an SFT run). With `votes` = k, F is the weight w of
    llmmix/majority.py, which reaches k, and the share is that below 0.1 k. Where rows have weights,
    each multiplies the loss of its row, and `weight/mean` is logged.

    Args:
        model: Checkpoint, or a loaded model.
        args: A `DCOConfig`, or `SFTConfig` or `TrainingArguments`, which become one.
        data_collator: As in `SFTTrainer`, like the four below.
        train_dataset: The training rows.
        eval_dataset: The rows to evaluate on, or several such by their names.
        processing_class: The tokenizer.
        **kwargs: The other arguments of `SFTTrainer`.

    Raises:
        TypeError: `args`, `model`, the collator or the rows are of a type that it does not take.
        ValueError: Batches are packed, which merges the examples whose probability the loss is
            of; context or sequence parallelism splits them; or another loss is asked for.
    """

    args: DCOConfig  # these two are narrower than in TRL
    model: PreTrainedModel

    _tag_names = [*SFTTrainer._tag_names, "llmmix", "dco"]
    _name = "DCO"
    _paper = {
        "title": "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence "
        "Improves Mathematical Reasoning",
        "id": "2502.07154",
    }
    # The loss is divided by the examples of the whole window; TRL declares None for a bool
    loss_is_scaled_for_ga = True  # type: ignore[assignment]
    row_weights: Callable[[list[int]], Tensor] | None = None  # see attach_weights

    def __init__(
        self,
        model: "str | PathLike | PreTrainedModel | PeftModel",
        args: TrainingArguments | None = None,
        data_collator: Callable[[list], dict] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = own_config(args, DCOConfig, "dco-output")
        kwargs |= {
            "data_collator": data_collator,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_types(model, train_dataset, kwargs)
        check_own_loss("DCO", args, kwargs)
        start = own_model(model, args, processing_class)
        train_dataset = check_sft_datasets(args, start, train_dataset, kwargs, MASKS_ONLY)
        with turns_found(args, train_dataset), padded_by_trl(args):
            super().__init__(start, args=args, train_dataset=train_dataset, **kwargs)
        log_dropped(train_dataset, self.train_dataset, length_limit(args))
        check_unsharded("DCO", self.accelerator)
        keep_outputs_in_fp32(self.accelerator)
        attach_heads(self, padding_free=args.padding_free)
        carry_sft_weights(self, MASKS_ONLY)
        end_unless_finite(self)
        tell_if_unmoved(self)
        sign(self, *(() if args.votes == 1 else OF_VOTES))
        keep_token_count(self)
        if args.n_samples > 1:  # with 1 no p counts, and the loss is that of TRL's tokens
            score_what_is_sampled(self)
        self.means = Means(self)
        self._unbraked = Mean()  # share of this process's examples of full weight; see `log`
        self._warned_unbraked = False

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the run to the Hub."""

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Count examples, where TRL counts tokens, over the accumulation window of every rank."""
        batches, _ = super().get_batch_samples(window(self, epoch_iterator), num_batches, device)
        scored = [(batch["labels"][:, 1:] != -100).any(1) for batch in batches]
        count = torch.tensor(sum(int(rows.sum()) for rows in scored), device=device)
        count = self.accelerator.gather(count).sum()
        if self.row_weights is not None and batches:
            rows = [batch.pop("row")[known] for batch, known in zip(batches, scored, strict=True)]
            weights = self.row_weights(torch.cat(rows).tolist()).to(device, torch.float32)
            parts = weights.split([len(part) for part in rows])
            for batch, known, part in zip(batches, scored, parts, strict=True):
                batch["row_weights"] = part.new_zeros(known.shape).masked_scatter(known, part)
        return batches, count.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """DCO on the same forward that TRL's metrics come from."""
        inputs, weights = take_weights(evaluated(self, inputs))
        given = inputs.pop("row_weights", None)
        recorder = ForwardRecorder(model)
        result = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)
        output = recorder.output
        lengths = output.label_mask.sum(1)
        logps = output.log_probs.sum(1)
        draws = self.args.n_samples, self.args.votes
        weight = majority_weight(logps, *draws) if given is None else given
        if given is not None and self.args.reduction == "sum":
            losses = weight * -logps
        elif self.args.reduction == "sum":
            losses = majority_loss(logps, *draws)
        else:
            losses = weight * -logps / lengths.clamp(min=1)
        scored = lengths > 0
        losses = weights.times(losses) * scored  # a row without targets adds an exact zero
        router = torch.zeros_like(losses.sum())
        if self.aux_loss_enabled and output.aux_loss is not None:
            router = self.router_aux_loss_coef * output.aux_loss
        self.means.add(
            {
                **self._measured(weight, scored),
                **weights.mean(scored),
                "nll_per_token": (-logps.sum(), lengths.sum()),
            },
            loss=[(losses.sum(), scored.sum()), (router * scored.sum(), scored.sum())],
        )
        if num_items_in_batch is None:
            loss = losses.sum() / scored.sum().clamp(min=1) + router
        else:  # DDP averages gradients over ranks
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
            loss = loss + router / self.current_gradient_accumulation_steps
        return (loss, result[1]) if return_outputs else loss

    def _measured(self, weight: Tensor, scored: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum and count of what is said of the weights (B,) of the rows that are scored."""
        weight, rows = weight.detach(), scored.sum()
        share = weight / self.args.votes  # of the most that a weight can be
        if self.means.training:
            unbraked = ((share > 0.99) & scored).sum()
            self._unbraked.add(*torch.stack([unbraked, rows]).tolist())
        return {
            "dco/weight": ((weight * scored).sum(), rows),
            "dco/braked": (((share < 0.1) & scored).sum(), rows),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with one warning when the loss is cross-entropy in all but name."""
        (unbraked,), self._unbraked = self._unbraked, Mean()
        early = self.state.global_step < self.state.max_steps / 10  # when every weight is near 1
        own = self.row_weights is None  # else a weight of 1 says nothing of the completion
        n, k = self.args.n_samples, self.args.votes
        told = self._warned_unbraked or early or not own or n == k  # where every weight is k
        if unbraked > 0.99 and not told:
            self._warned_unbraked = True
            logger.warning(
                "More than 99%% of the examples since the last log have a DCO weight above %g, so "
                "this is %scross-entropy so far: their completions are far less likely than %s. If "
                "this lasts, they are too long for DCO on whole sequences.",
                0.99 * k,
                "" if k == 1 else f"{k} times ",
                f"1/N = 1/{n}" if k == 1 else f"votes/N = {k}/{n}",
            )
        super().log(logs, start_time)
