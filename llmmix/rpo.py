"""RPO, Regularized Preference Optimization (arXiv 2405.16436).

    L = -log sigmoid(h) - eta * beta * log pi(chosen)        sft_reduction = "sum", the paper
    L = -log sigmoid(h) - eta * log pi(chosen) / |chosen|    sft_reduction = "mean"
    h = beta * [log pi/pi_ref (chosen) - log pi/pi_ref (rejected)]

The second term keeps the likelihood of the chosen responses from falling, which DPO lets happen.
It is neither the `rpo_alpha` of older TRL (arXiv 2404.19733, another paper) nor TRL's
`loss_type=["sigmoid", "sft"]`, whose term is a token mean over the batch and not scaled by beta.

    symbol   name
    beta     beta        of DPOConfig
    eta      rpo_eta
    |chosen| chosen_lengths

Recipe: recipes/rpo.py. Invariants: tests/test_invariants.py.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from trl import DPOConfig, DPOTrainer

from llmmix.arguments import check_types, own_config, own_model
from llmmix.checkpoints.cards import sign
from llmmix.padding_free_setting import padded_by_trl, padding_free_field
from llmmix.precision import evaluating
from llmmix.rows.answer_weights import carry_answer_weights
from llmmix.rows.prepared import log_dropped
from llmmix.rows.weights import ROW, take_weights
from llmmix.trainers import (
    ForwardRecorder,
    attach_heads,
    check_preference_datasets,
    default_to_cpu,
    keep_outputs_in_fp32,
)
from llmmix.training.finite import end_unless_finite
from llmmix.training.means import Means
from llmmix.training.pairs import count_scored_pairs, scored_pairs
from llmmix.training.ranges import check_settings
from llmmix.training.resuming import keep_token_count
from llmmix.training.unmoved import tell_if_unmoved
from llmmix.training.windows import evaluated, window

if TYPE_CHECKING:
    from peft import PeftModel


def rpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    eta: float,
    sft_reduction: str = "sum",
    chosen_lengths: Tensor | None = None,
) -> Tensor:
    """DPO's sigmoid loss plus the SFT term on the chosen responses.

    Args:
        chosen_logps: (B,) summed log-probabilities of the chosen responses, in nats.
        rejected_logps: (B,) summed log-probabilities of the rejected responses.
        ref_chosen_logps: (B,) the same of the chosen responses under the reference model.
        ref_rejected_logps: (B,) the same of the rejected responses under the reference model.
        beta: Strength of the KL term, positive.
        eta: Weight of the SFT term, not negative; 0 is DPO.
        sft_reduction: `"sum"` (times beta, the paper) or `"mean"` over tokens (not times beta).
        chosen_lengths: (B,) tokens of each chosen response, for `"mean"`.

    Returns:
        (B,).

    Raises:
        ValueError: `eta` is negative, `sft_reduction` is unknown, or it is `"mean"` and there are
            no `chosen_lengths`.
    """
    h = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    return F.softplus(-h) + sft_term(
        chosen_logps,
        beta=beta,
        eta=eta,
        sft_reduction=sft_reduction,
        chosen_lengths=chosen_lengths,
    )


def sft_term(
    chosen_logps: Tensor,
    *,
    beta: float,
    eta: float,
    sft_reduction: str = "sum",
    chosen_lengths: Tensor | None = None,
) -> Tensor:
    """The SFT term of `rpo_loss` alone, (B,); its arguments and errors are those of `rpo_loss`."""
    _check_eta(eta)
    if sft_reduction == "sum":
        return -eta * beta * chosen_logps
    if sft_reduction != "mean":
        raise ValueError(f"`sft_reduction` must be 'sum' or 'mean', got {sft_reduction!r}.")
    if chosen_lengths is None:
        raise ValueError("`sft_reduction='mean'` needs `chosen_lengths`, the tokens of each row.")
    return -eta * chosen_logps / chosen_lengths.clamp(min=1)


def _check_eta(eta: float) -> None:
    if not eta >= 0:
        raise ValueError(f"`rpo_eta` must not be negative, got {eta}; 0 is DPO.")


@dataclass
class RPOConfig(DPOConfig):
    """TRL's `DPOConfig` with the fields of RPO.

    Args:
        rpo_eta: eta, the weight of the SFT term. 0 is DPO.
        sft_reduction: `"sum"`: summed log-probability times beta, as the paper trains chat models.
            `"mean"`: token mean, not times beta, which its authors prefer for reasoning.
    """

    rpo_eta: float = field(
        default=0.005, metadata={"help": "eta: the weight of the SFT term. 0 is DPO."}
    )
    sft_reduction: str = field(
        default="sum",
        metadata={
            "help": "Form of the SFT term. 'sum': summed log-probability times beta, as in the "
            "paper. 'mean': mean over tokens, not times beta.",
            "choices": ["sum", "mean"],
        },
    )
    padding_free: bool = padding_free_field()

    def __post_init__(self) -> None:
        check_settings(self)
        _check_eta(self.rpo_eta)
        if self.sft_reduction not in ("sum", "mean"):
            raise ValueError(
                f"`sft_reduction` must be 'sum' or 'mean', got {self.sft_reduction!r}."
            )
        default_to_cpu(self)
        super().__post_init__()
        loss_types = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if loss_types != ["sigmoid"]:
            raise ValueError(
                f"RPO adds its own SFT term to DPO's sigmoid loss, so `loss_type` must be "
                f"['sigmoid'], got {self.loss_type}."
            )


class RPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with the SFT term of RPO, from the same forward.

    Takes the preference formats and the arguments of `DPOTrainer`. Logs, beside TRL's metrics
    (`logps/chosen` among them, the log-probability that RPO keeps from falling), `rpo/dpo_loss` and
    `rpo/sft_loss`, the two terms as they enter the loss, and `nll_per_token` (NLL of a token of the
    chosen responses). A `weight` of a row multiplies both terms, and `weight/mean` is logged.

    Args:
        model: Checkpoint, or a loaded model.
        ref_model: The reference model; by default the model as it is at the start.
        args: An `RPOConfig`, or `DPOConfig` or `TrainingArguments`, which become one.
        data_collator: As in `DPOTrainer`, like the four below.
        train_dataset: The training rows.
        eval_dataset: The rows to evaluate on, or several such by their names.
        processing_class: The tokenizer.
        **kwargs: The other arguments of `DPOTrainer`.

    Raises:
        TypeError: `args`, `model`, the collator or the rows are of a type that it does not take.
    """

    _attached = False
    args: RPOConfig  # these two are narrower than in TRL
    model: PreTrainedModel
    # The loss is divided by the rows of the whole window
    loss_is_scaled_for_ga = True

    _tag_names = [*DPOTrainer._tag_names, "llmmix", "rpo"]
    _name = "RPO"
    _paper = {
        "title": "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an "
        "Adversarial Regularizer",
        "id": "2405.16436",
    }

    def __init__(
        self,
        model: "str | PathLike | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list], dict] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = own_config(args, RPOConfig, "rpo-output")
        kwargs |= {
            "data_collator": data_collator,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_types(model, train_dataset, kwargs | {"ref_model": ref_model})
        start = own_model(model, args, processing_class)
        train_dataset = check_preference_datasets(args, start, train_dataset, kwargs)
        loaded = isinstance(start, PreTrainedModel) and kwargs.get("peft_config") is None
        if ref_model is None and loaded and not start.config.name_or_path:
            ref_model = copy.deepcopy(start)  # TRL loads it by its name, and this has none
        self._padding_free = args.padding_free  # TRL may score the reference while it makes `self`
        with padded_by_trl(args):
            super().__init__(start, ref_model, args=args, train_dataset=train_dataset, **kwargs)
        log_dropped(train_dataset, self.train_dataset, args.max_length)
        carry_answer_weights(self)
        self._attach_own_heads()
        end_unless_finite(self)
        tell_if_unmoved(self)
        sign(self)
        keep_token_count(self)
        self.means = Means(self)

    def create_accelerator_and_postprocess(self) -> None:
        """Keep log-probabilities in fp32, set before TRL prepares the reference model."""
        super().create_accelerator_and_postprocess()
        keep_outputs_in_fp32(self.accelerator)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the run to the Hub."""

    def _attach_own_heads(self) -> None:
        """Attach our head once, and have no log-probabilities of another head taken from a cache.

        TRL keeps those of a reference by the model and the tokenized rows alone.
        """
        if self._attached:
            return
        attach_heads(self, padding_free=self._padding_free)
        args = self.args
        how = (args.max_length, args.truncation_mode, args.ld_alpha)
        precision = self.accelerator.mixed_precision
        self._precompute_model_hash = f"{self._precompute_model_hash} llmmix {how} {precision}"
        self._attached = True

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._attach_own_heads()  # TRL computes them while it makes the trainer
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """TRL's log-probabilities of the chosen and rejected responses, without dropout."""
        with evaluating(model, self):
            return super().compute_ref_log_probs(model, take_weights(inputs)[0])

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Count rows over the accumulation window of every rank."""
        batches, _ = super().get_batch_samples(window(self, epoch_iterator, 2), num_batches, device)
        scored = [scored_pairs(b["completion_mask"][:, 1:], b.get(ROW)) for b in batches]
        rows = torch.tensor(sum(int(pairs.sum()) for pairs in scored), device=device)
        return batches, self.accelerator.gather(rows).sum().clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """TRL's DPO loss plus the SFT term, from one policy forward."""
        inputs, weights = take_weights(evaluated(self, inputs, 2))
        recorder = ForwardRecorder(model)
        given = self.precompute_ref_logps
        if not given:
            names = ("ref_chosen_logps", "ref_rejected_logps")
            reference = self.model if self.ref_model is None else self.ref_model
            logps = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, **dict(zip(names, logps, strict=True))}
        try:
            self.precompute_ref_logps = True  # TRL would call the reference in training mode
            result = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = given
        loss, outputs = result if return_outputs else (result, None)
        output = recorder.output
        scored = scored_pairs(output.label_mask, weights.rows)
        router = torch.zeros_like(loss)
        if self.aux_loss_enabled and output.aux_loss is not None:
            router = self.router_aux_loss_coef * output.aux_loss
        chosen, rejected = output.log_probs.sum(1).chunk(2)
        lengths = output.label_mask.sum(1).chunk(2)[0]
        if weights.given:  # each pair by itself, as TRL has it with the settings that go with them
            before = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            pairs = rpo_loss(chosen, rejected, *before, beta=self.args.beta, eta=0.0)
            dpo = (weights.times(pairs) * scored).sum()
        else:  # TRL's is a mean over rows, where one without a token has a margin of 0
            dpo = len(scored) * (loss - router) - math.log(2) * (~scored).sum()
        sft = sft_term(
            chosen,
            beta=self.args.beta,
            eta=self.args.rpo_eta,
            sft_reduction=self.args.sft_reduction,
            chosen_lengths=lengths,
        )
        sft, rows = weights.times(sft).sum(), scored.sum()
        found = self.means.add(
            {
                "rpo/dpo_loss": (dpo, rows),
                "rpo/sft_loss": (sft, rows),
                "nll_per_token": (-chosen.sum(), lengths.sum()),
                **weights.mean(scored),
            },
            loss=[(dpo + sft, rows), (router * rows, rows)],
        )
        count = found["rpo/dpo_loss"][1]
        count_scored_pairs(self, output.label_mask, count, training=self.means.training)
        if num_items_in_batch is None:
            loss = (dpo + sft) / scored.sum().clamp(min=1) + router
        else:  # DDP averages gradients over ranks
            loss = (dpo + sft) / num_items_in_batch * self.accelerator.num_processes
            loss = loss + router / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss
