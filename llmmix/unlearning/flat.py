r"""FLAT: unlearning with forget data alone, by an f-divergence of two answers (arXiv 2410.11143).

For a question x, its answer to forget y_f and a template answer y_e such as "I don't know.",

    L = -g(P_e) + f*(g(P_f)),     P = P(x, y) = (1/|y|) sum_t p(y_t | x, y_<t)

where f* is the conjugate of f and g an increasing function. P_e is pushed up and P_f down, each
with a weight that the divergence decides; llmmix/unlearning/divergences.py has them all.

All of them are computed from P itself, not from the logarithms, so that P has a gradient only
where a token is not already impossible. The released code takes the mean of p over prompt and
padding too and over the batch before g; `prob_reduction` and `batch_reduction` offer that.

    symbol   name
    P_e      template_probs
    P_f      forget_probs

Recipe: recipes/flat.py. Evaluation: eval/unlearning.py. Invariants:
tests/unlearning/test_flat.py.
"""

from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PredictionOutput
from trl import SFTTrainer

from llmmix.arguments import check_types, own_config, own_model
from llmmix.head import FusedHeadOutput
from llmmix.padding_free_setting import padded_by_trl
from llmmix.precision import at_least_fp32
from llmmix.trainers import check_own_loss
from llmmix.training.windows import evaluated, window
from llmmix.unlearning.divergences import DIVERGENCES, check_divergence
from llmmix.unlearning.flat_config import FLATConfig, check_retain
from llmmix.unlearning.guards import UnlearningGuard
from llmmix.unlearning.losses import nll_loss, sequence_probs
from llmmix.unlearning.parts import (
    count_window,
    forward_parts,
    over_processes,
    predicted,
    row_weights,
    weight_means,
    with_retained,
)
from llmmix.unlearning.preparation import check_args, epoch_sampler, prepare_trainer
from llmmix.unlearning.rows import EpochSampler, ForgetRows
from llmmix.unlearning.templates import Templates, resolve_templates

if TYPE_CHECKING:
    from peft import PeftModel


def flat_loss(template_probs: Tensor, forget_probs: Tensor, divergence: str = "js") -> Tensor:
    """-g(P_e) + f*(g(P_f)): falls with the template's probability, rises with the forgotten one's.

    Args:
        template_probs: (B,) P_e, in [0, 1].
        forget_probs: (B,) P_f, in [0, 1].
        divergence: Name among `DIVERGENCES`, in any case and with hyphens or underscores.

    Returns:
        (B,).

    Raises:
        ValueError: `divergence` is not among `DIVERGENCES`.
    """
    probs = (at_least_fp32(given) for given in (template_probs, forget_probs))
    return DIVERGENCES[check_divergence(divergence)](*probs)


class FLATTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on the FLAT loss, from one forward over templates and answers to forget.

    `train_dataset` has rows of `question` and `answer`, or of `prompt` and `completion`, to forget,
    and perhaps `template`, an answer to learn instead or a list to draw from, and `weight`, which
    multiplies the loss of its row. Logs `flat/template_prob` and `flat/forget_prob`, P_e and P_f,
    `flat/loss`, `nll_per_token` of the answers to forget, `retain_nll_per_token`, and with weights
    `weight/mean` and `weight/retain_mean`.

    Args:
        model: A causal language model, or its name.
        args: Settings of FLAT: a `FLATConfig`, or `SFTConfig` or `TrainingArguments`, which become
            one.
        data_collator: None: `ForgetRows` make their batches.
        train_dataset: Rows to forget.
        eval_dataset: Rows to evaluate on, or several such by their names.
        processing_class: The tokenizer.
        templates: Answers to draw from where rows have none of their own, or a function of a row;
            `template_file` or our own list by default.
        retain_dataset: Rows to retain, where `retain_weight` is above 0.
        **kwargs: The other arguments of `SFTTrainer`.

    Raises:
        ValueError: Packing or another loss is asked for; `ForgetRows` refuses rows,
            templates or retained rows; there is a retain weight without rows, or rows without one.
    """

    _tag_names = ["trl", "llmmix", "flat"]
    _name = "FLAT"
    _paper = {
        "title": "LLM Unlearning via Loss Adjustment with Only Forget Data",
        "id": "2410.11143",
    }
    # The loss is divided by the rows of the whole window
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL declares None
    mixture_strata = None  # a mixture draws from all rows alike

    args: FLATConfig
    train_dataset: ForgetRows

    def __init__(
        self,
        model: "str | PathLike | PreTrainedModel | PeftModel",
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        templates: Templates | None = None,
        retain_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        args = own_config(args, FLATConfig, "flat-output")
        kwargs |= {
            "data_collator": data_collator,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_types(model, train_dataset, kwargs)
        check_own_loss("FLAT", args, kwargs)
        check_retain(args, retain_dataset is not None)
        self.parts = with_retained(("template", "forget"), retain_dataset is not None)
        templates = resolve_templates(args.template_file, templates)
        check_args(args, train_dataset, kwargs)
        start = own_model(model, args, processing_class)
        with padded_by_trl(args):
            super().__init__(start, args=args, train_dataset=train_dataset, **kwargs)
        self._prepared = prepare_trainer(
            self,
            "FLAT",
            args,
            self.parts,
            retain_dataset=retain_dataset,
            templates=templates,
            unweighted=args.unweighted,
        )
        self.guard = UnlearningGuard(self, min_forget_prob=args.min_forget_prob)
        self.add_callback(self.guard)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the run to the Hub."""

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """TRL's evaluation; rows given here are prepared like those of the constructor."""
        rows = self._prepared(eval_dataset, "eval_dataset")
        return super().evaluate(rows, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """TRL's predictions, for the rows to forget; rows are prepared like the constructor's."""
        rows = self._prepared(test_dataset, "test_dataset")
        return super().predict(rows, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss, and logits and labels of the rows to forget alone."""
        loss = super().prediction_step(model, inputs, True, ignore_keys)[0]
        if prediction_loss_only:
            return loss, None, None
        return loss, *predicted(self, model, inputs, self.parts)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return epoch_sampler(self, self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Count rows and tokens of each part over the accumulation window of every process."""
        drawn = window(self, epoch_iterator, len(self.parts))
        batches, _ = super().get_batch_samples(drawn, num_batches, device)
        self._window = self._count(batches, device)
        return batches, self._window["forget"][0]

    def _count(self, batches: list[dict], device: torch.device) -> dict[str, Tensor]:
        return count_window(self.accelerator, batches, self.parts, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, FusedHeadOutput]:
        """FLAT from one forward of [template; forget; retain]."""
        args, training = self.args, num_items_in_batch is not None
        inputs = evaluated(self, inputs, len(self.parts))
        parts, output = forward_parts(model, inputs, self.parts)
        positions = None
        if args.prob_reduction == "all_positions" and args.max_length is not None:
            positions = args.max_length - 1
        scored = parts["forget"][1].any(1)
        template, forget = (
            sequence_probs(logps, mask, mean=args.mean, positions=positions)[scored]
            for logps, mask in (parts["template"], parts["forget"])
        )
        rows, weights = scored.sum(), row_weights(inputs, self.parts)
        of_row = weights["forget"][scored]
        window = self._window if training else self._count([inputs], rows.device)
        if training and self.state.global_step < args.template_sft_steps:
            total = (weights["template"] * nll_loss(*parts["template"])).sum()
        elif args.batch_reduction == "batch_scalar":
            count = rows.clamp(min=1)
            of_means = flat_loss(template.sum() / count, forget.sum() / count, args.divergence)
            total = rows * of_means
        else:
            total = (of_row * flat_loss(template, forget, args.divergence)).sum()
        loss, terms = total / window["forget"][0], [(total, rows)]
        values = {
            "loss": (total, rows),
            "template_prob": (template.sum(), rows),
            "forget_prob": (forget.sum(), rows),
        }
        if "retain" in parts:
            logps, mask = parts["retain"]
            retained = -(weights["retain"] * logps.sum(1)).sum()
            loss = loss + args.retain_weight * retained / window["retain"][1]
            terms.append((args.retain_weight * retained, mask.sum()))
            values["retain_loss"] = (retained, mask.sum())
        self.guard.add("flat", values, terms, parts, weight_means(inputs, parts))
        loss = over_processes(self.accelerator, loss, training=training)
        return (loss, output) if return_outputs else loss
