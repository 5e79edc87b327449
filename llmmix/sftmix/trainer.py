"""The config and the trainer of SFTMix: mixup in the forward that the cross-entropy comes from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from llmmix.arguments import check_types, own_config, own_model
from llmmix.checkpoints.cards import sign
from llmmix.dco import dco_weight
from llmmix.head import FusedHeadOutput
from llmmix.padding_free_setting import padded_by_trl, padding_free_field
from llmmix.rows.message_weights import carry_sft_weights
from llmmix.rows.prepared import log_dropped
from llmmix.rows.turn_ends import score_what_is_sampled
from llmmix.rows.turns import turns_found
from llmmix.rows.weights import take_weights
from llmmix.sftmix.losses import mix_pairs
from llmmix.sftmix.pairing import (
    PairSampler,
    check_confidence,
    confident_half,
    draw_shares,
    read_confidence,
)
from llmmix.token_losses.objective import TokenObjective, together
from llmmix.token_losses.settings import TokenLossSettings, check_alone, nll_for_trl
from llmmix.trainers import (
    ForwardRecorder,
    attach_heads,
    check_own_loss,
    check_sft_datasets,
    check_unsharded,
    keep_outputs_in_fp32,
    length_limit,
    training_rows,
)
from llmmix.training.finite import end_unless_finite
from llmmix.training.means import Means, Sums
from llmmix.training.resuming import keep_token_count
from llmmix.training.unmoved import tell_if_unmoved
from llmmix.training.windows import evaluated, window

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class SFTMixConfig(TokenLossSettings):
    """TRL's `SFTConfig` with the fields of SFTMix, beside those of `TokenLossSettings`.

    `loss_type` is the loss of the next tokens; the mixup term stays cross-entropy. Losses that
    need another model are refused.

    Args:
        mixup_alpha: alpha of Beta(alpha, alpha), from which each pair's share is drawn.
        mixup_weight: mu, the weight of the mixup term. 0 is `SFTTrainer`, data order included.
        dco_n_samples: When positive, the cross-entropy term is weighted by DCO's F(N, p) of each
            example with this N. 0 for none.
    """

    mixup_alpha: float = field(
        default=0.5,
        metadata={
            "help": "alpha of Beta(alpha, alpha), from which the share of each pair is drawn."
        },
    )
    mixup_weight: float = field(
        default=0.2, metadata={"help": "mu: the weight of the mixup term. 0 is plain SFT."}
    )
    dco_n_samples: int = field(
        default=0,
        metadata={
            "help": "N of DCO, whose weight F(N, p) then multiplies the cross-entropy of each "
            "example. 0: plain cross-entropy."
        },
    )
    padding_free: bool = padding_free_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alone(self, "SFTMix")
        if self.dco_n_samples and self.loss_type != "nll":
            raise ValueError(
                f"`dco_n_samples={self.dco_n_samples}` weights cross-entropy, and `loss_type` is "
                f"{self.loss_type!r}: leave one of them out."
            )
        if not self.mixup_alpha > 0:
            raise ValueError(f"`mixup_alpha` must be positive, got {self.mixup_alpha}.")
        if not self.mixup_weight >= 0:
            raise ValueError(f"`mixup_weight` must not be negative, got {self.mixup_weight}.")
        if self.dco_n_samples < 0:
            raise ValueError(f"`dco_n_samples` must not be negative, got {self.dco_n_samples}.")
        if self.mixup_weight and self.per_device_train_batch_size % 2:
            raise ValueError(
                f"`per_device_train_batch_size` must be even, since SFTMix batches hold pairs, got "
                f"{self.per_device_train_batch_size}."
            )
        if self.mixup_weight and self.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` would break up the "
                "pairs of SFTMix, which draws each batch half and half. Use 'random'."
            )
        if self.mixup_weight and self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size=True` may find an odd batch, and SFTMix batches hold pairs. "
                "Set `per_device_train_batch_size` by hand."
            )


class SFTMixTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with the mixup term: stages 2 and 3 of SFTMix.

    `train_dataset` needs a numeric `confidence` column (higher is more confident), which
    `llmmix run confidence` writes; the rest of it is what `SFTTrainer` takes. With `mixup_weight=0`
    the trainer is `SFTTrainer`, data order included, and needs no such column.

    Logs, beside TRL's metrics, `sftmix/ntp_loss`, `sftmix/mixup_loss`, `sftmix/lam` (mean share of
    the confident example), `sftmix/mixed_tokens` (share of response tokens that took part) and
    `sftmix/confidence_gap` (mean NLL of the unconfident half minus that of the confident half), and
    `nll_per_token` (NLL of a scored token). Where rows have weights, they multiply the
    cross-entropy of each token and of each part of the mixed targets, and `weight/mean` is logged.

    Args:
        model: Checkpoint, or a loaded model.
        args: An `SFTMixConfig`, or `SFTConfig` or `TrainingArguments`, which become one.
        data_collator: As in `SFTTrainer`, like the four below.
        train_dataset: The training rows.
        eval_dataset: The rows to evaluate on, or several such by their names.
        processing_class: The tokenizer.
        **kwargs: The other arguments of `SFTTrainer`.

    Raises:
        TypeError: `args`, `model`, the collator or the rows are of a type that it does not take.
        ValueError: There is no confidence column, or NaN in it; there are fewer than two examples;
            batches are packed, or rows streamed; or context or sequence
            parallelism is on.
    """

    args: SFTMixConfig  # these two are narrower than in TRL
    model: PreTrainedModel
    objective: TokenObjective

    _tag_names = [*SFTTrainer._tag_names, "llmmix", "sftmix"]
    _name = "SFTMix"
    _paper = {
        "title": "SFTMix: Elevating Language Model Instruction Tuning with Mixup Recipe",
        "id": "2410.05248",
    }

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
        args = own_config(args, SFTMixConfig, "sftmix-output")
        kwargs |= {
            "data_collator": data_collator,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_types(model, train_dataset, kwargs)
        with nll_for_trl(args):  # a `loss_type` is the next tokens' here
            check_own_loss("SFTMix", args, kwargs)
        start = own_model(model, args, processing_class)
        train_dataset = check_sft_datasets(args, start, train_dataset, kwargs)
        if args.mixup_weight:
            check_confidence(train_dataset)
        with turns_found(args, train_dataset), padded_by_trl(args), nll_for_trl(args):
            super().__init__(start, args=args, train_dataset=train_dataset, **kwargs)
        log_dropped(train_dataset, self.train_dataset, length_limit(args))
        check_unsharded("SFTMix", self.accelerator)
        keep_outputs_in_fp32(self.accelerator)
        self.objective = TokenObjective(args, self.model.config.get_text_config().vocab_size)
        attach_heads(self, padding_free=args.padding_free, **self.objective.head)
        carry_sft_weights(self)
        end_unless_finite(self)
        tell_if_unmoved(self)
        sign(self)
        keep_token_count(self)
        if args.dco_n_samples > 1:
            score_what_is_sampled(self)
        if args.mixup_weight:
            # The column went through preparation with its rows: dropped rows are gone from it
            self._confident = confident_half(read_confidence(training_rows(self, "SFTMix")))
        self._micro_step = 0
        self.means = Means(self)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the run to the Hub."""

    @property
    def mixture_strata(self) -> Tensor | None:
        """(n,) 0 for confident rows and 1 for the others: a mixture draws from them in turn."""
        return (~self._confident).long() if self.args.mixup_weight else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not self.args.mixup_weight:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PairSampler(self._confident, seed, epoch=lambda: int(self.state.epoch or 0))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Count the pairs of the accumulation window, over every rank."""
        batches, tokens = super().get_batch_samples(
            window(self, epoch_iterator), num_batches, device
        )
        if self.args.mixup_weight:
            masks = [batch["labels"][:, 1:] != -100 for batch in batches]
            pairs = sum(int(_scored_pairs(mask).sum()) for mask in masks)
            pairs_of_all = self.accelerator.gather(torch.tensor(pairs, device=device))
            self._window_pairs = pairs_of_all.sum().clamp(min=1)
        self._micro_step = 0
        return batches, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """TRL's loss plus the mixup term, from one forward."""
        inputs, weights = take_weights(evaluated(self, inputs))
        mixing = self.model.training and self.args.mixup_weight > 0
        lam = self._draw_lam(len(inputs["labels"]) // 2) if mixing else None
        n_samples = self.args.dco_n_samples
        mix = partial(mix_pairs, weigh=weights.times if weights.given else None)
        token_loss = partial(_covered, n_samples=n_samples) if n_samples else self.objective
        recorder = ForwardRecorder(
            model,
            head_objective=together(
                None if lam is None else partial(mix, lam=lam), self.objective.head_objective
            ),
            token_loss=lambda output: weights.times(token_loss(output)),
        )
        with nll_for_trl(self.args):
            result = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        mixed = recorder.output.objective
        log_probs, mask = recorder.output.log_probs, recorder.output.label_mask
        values: dict[str, Sums] = {"nll_per_token": (-log_probs.sum(), mask.sum())}
        values |= weights.mean(mask)
        if not self.model.training and self.accelerator.num_processes > 1:
            # An evaluation weights the loss of each process by its rows
            loss = _mean_over_processes(self.accelerator, loss, mask.sum())
        elif lam is not None and mixed is not None:
            mixup_losses = mixed["mixup_losses"]
            if num_items_in_batch is None:
                mixup = mixup_losses.mean()
            else:  # DDP averages gradients over ranks
                mixup = mixup_losses.sum() / self._window_pairs * self.accelerator.num_processes
            values |= _of_pairs(recorder.output, mixed, lam)
            loss = loss + self.args.mixup_weight * mixup
        self.means.add(values)
        return (loss, outputs) if return_outputs else loss

    def _draw_lam(self, pairs: int) -> Tensor:
        """The shares of a micro-batch, by its place among those of all ranks in the step."""
        place = self._micro_step * self.accelerator.num_processes + self.accelerator.process_index
        self._micro_step += 1
        before = place * (self.args.per_device_train_batch_size // 2)
        places, seeds = slice(before, before + pairs), (self.args.seed, self.state.global_step)
        return draw_shares(self.args.mixup_alpha, places, seeds)


def _covered(output: FusedHeadOutput, n_samples: int) -> Tensor:
    """The cross-entropy of each token, times F of its row."""
    weight = dco_weight(output.log_probs.sum(1), n_samples)
    return weight.unsqueeze(1) * -output.log_probs


def _of_pairs(output: FusedHeadOutput, mixed: dict[str, Tensor], lam: Tensor) -> dict[str, Sums]:
    """Sums and counts of what is logged of the pairs of a micro-batch."""
    nll, mask = -output.log_probs, output.label_mask
    scored, tokens = _scored_pairs(mask), mask.sum()
    pairs = scored.sum()
    return {
        "sftmix/ntp_loss": (nll.sum(), tokens),
        "sftmix/mixup_loss": (mixed["mixup_losses"].sum(), pairs),
        "sftmix/lam": ((lam.to(nll.device) * scored).sum(), pairs),
        "sftmix/mixed_tokens": (mixed["mixed_tokens"], tokens),
        "sftmix/confidence_gap": (
            *(nll[1::2].sum(), mask[1::2].sum()),
            *(nll[0::2].sum(), mask[0::2].sum()),
        ),
    }


def _mean_over_processes(accelerator: Accelerator, mean: Tensor, count: Tensor) -> Tensor:
    """The mean over what all processes have, from this one's mean and what it is over."""
    pair = torch.stack([mean * count, count.to(mean)]).unsqueeze(0)
    total, count = accelerator.gather(pair).sum(0)
    return total / count.clamp(min=1)


def _scored_pairs(mask: Tensor) -> Tensor:
    """(B/2,) bool: which pairs have a token to score, from a mask (B, T)."""
    return mask.any(1).view(-1, 2).any(1)
