"""One trainer for the losses of `llmmix.unlearning`: its `loss` says what it needs.

    total = forget_weight * loss(rows to forget) + retain_weight * loss(rows to retain)

from one forward over templates, rows to forget and rows to retain. A row to retain is drawn for
each row to forget. A forget loss is a mean over the tokens of the whole step, or over its rows, as
its row of the loss table says.

Recipe: recipes/unlearn.py. Evaluation: eval/unlearning.py. Losses: llmmix/unlearning/losses.py, and
what each needs: llmmix/unlearning/loss_table.py. Settings: llmmix/unlearning/config.py.
"""

import math
from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PredictionOutput, TrainOutput
from trl import SFTTrainer

from llmmix.arguments import check_types, own_config, own_model
from llmmix.checkpoints.cards import sign
from llmmix.frozen import switches_off
from llmmix.head import FusedHeadOutput
from llmmix.padding_free_setting import padded_by_trl
from llmmix.trainers import check_own_loss
from llmmix.training.windows import evaluated, window
from llmmix.unlearning.config import UnlearnConfig, check_needs
from llmmix.unlearning.guards import UnlearningGuard
from llmmix.unlearning.loss_table import LOSSES
from llmmix.unlearning.losses import sequence_probs
from llmmix.unlearning.objective import Objective
from llmmix.unlearning.parts import (
    count_window,
    over_processes,
    predicted,
    weight_means,
    with_retained,
)
from llmmix.unlearning.preparation import check_args, epoch_sampler, prepare_trainer
from llmmix.unlearning.references import Reference
from llmmix.unlearning.rows import EpochSampler, ForgetRows
from llmmix.unlearning.templates import Templates, resolve_templates

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class UnlearnTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on one of the unlearning losses.

    `train_dataset` has rows to forget: `question` and `answer`, `prompt` and `completion`, or
    `text`, and perhaps `weight`, which multiplies the loss of its row. Logs `unlearn/forget_loss`
    and `unlearn/retain_loss` without `forget_weight` and `retain_weight`, `unlearn/forget_prob` and
    `unlearn/template_prob` (mean probability of an answer's tokens), `unlearn/capped` (share of
    tokens beyond `ascent_cap`) and `unlearn/multiplier` (of pdu), where the loss has them;
    `nll_per_token` of the answers to forget and `retain_nll_per_token`; with weights of rows,
    `weight/mean` and `weight/retain_mean`.

    Args:
        model: A causal language model, or its name.
        args: The loss and its settings: an `UnlearnConfig`, or `SFTConfig` or `TrainingArguments`,
            which become one.
        data_collator: None: `ForgetRows` make their batches.
        train_dataset: Rows to forget.
        eval_dataset: Rows to evaluate on, or several such by their names.
        processing_class: The tokenizer.
        retain_dataset: Rows to retain, in any of the same formats, for a loss with a retain term.
        templates: Answers to draw from where rows have none of their own, or a function of a row.
        **kwargs: The other arguments of `SFTTrainer`.

    Raises:
        ValueError: The loss lacks what it needs; `ForgetRows` refuses the rows; packing is on; the
            loss needs the whole vocabulary, and FSDP or DeepSpeed spread the head.
    """

    _tag_names = ["trl", "llmmix", "unlearn"]
    _name = "Unlearning"
    # The loss is divided by the counts of the whole window
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL declares None
    mixture_strata = None  # a mixture draws from all rows alike

    args: UnlearnConfig
    model: "PreTrainedModel | PeftModel"
    train_dataset: ForgetRows
    objective: Objective
    reference: Reference | None

    def __init__(
        self,
        model: "str | PathLike | PreTrainedModel | PeftModel",
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        retain_dataset: Dataset | None = None,
        templates: Templates | None = None,
        **kwargs: Any,
    ):
        args = own_config(args, UnlearnConfig, "unlearn-output")
        kwargs |= {
            "data_collator": data_collator,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_types(model, train_dataset, kwargs)
        check_own_loss("Unlearning", args, kwargs)
        check_needs(args, retain_dataset is not None)
        check_args(args, train_dataset, kwargs)
        loss = LOSSES[args.loss]
        self.parts = with_retained(loss.reads, retain_dataset is not None)
        templates = resolve_templates(args.template_file, templates)
        start = own_model(model, args, processing_class)
        with padded_by_trl(args):
            super().__init__(start, args=args, train_dataset=train_dataset, **kwargs)
        self._prepared = prepare_trainer(
            self,
            "Unlearning",
            args,
            self.parts,
            retain_dataset=retain_dataset,
            templates=templates,
            skip_tokens=args.skip_tokens if loss.skips_tokens else 0,
            unweighted=loss.objective.unweighted,
        )
        sign(self, f"the unlearning loss {args.loss}", loss.paper)
        self.objective = _objective(self)
        self.reference = _reference(self, kwargs.get("peft_config"))
        self.guard = UnlearningGuard(
            self, min_forget_prob=args.min_forget_prob, max_retain_loss=args.max_retain_loss
        )
        self.add_callback(self.guard)
        for callback in self.objective.callbacks(self.guard):
            self.add_callback(callback)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the run to the Hub."""

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """TRL's evaluation; rows given here are prepared like those of the constructor.

        Raises:
            ValueError: The reference is known for the training rows alone.
        """
        if self.reference is not None and self.reference.kind == "precomputed":
            raise ValueError(
                "`reference='precomputed'` holds for the training rows alone: set "
                "`reference='copy'` to evaluate others."
            )
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

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """TRL's training, after the reference's log-probabilities are kept, if they are to be."""
        if self.reference is not None:
            given, rows = self.args, self.train_dataset
            step_size = (
                given.train_batch_size * given.gradient_accumulation_steps * given.world_size
            )
            passes = given.max_steps / max(1, len(rows) // step_size)
            epochs = math.ceil(passes if given.max_steps > 0 else given.num_train_epochs)
            self.reference.precompute(rows, epochs + 1, self.parts)
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Count rows and tokens of each part over the accumulation window of every process."""
        drawn = window(self, epoch_iterator, len(self.parts))
        batches, _ = super().get_batch_samples(drawn, num_batches, device)
        self._window = self._count(batches, device)
        return batches, self._window[self.objective.loss.subject][0]

    def _count(self, batches: list[dict], device: torch.device) -> dict[str, Tensor]:
        return count_window(self.accelerator, batches, self.parts, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, FusedHeadOutput]:
        """The forget and the retain term, from one forward."""
        objective, training = self.objective, num_items_in_batch is not None
        inputs = evaluated(self, inputs, len(self.parts))
        device = inputs["labels"].device
        window = self._window if training else self._count([inputs], device)
        step = objective.forward(model, inputs, self.reference)
        losses, weights = objective.forget(step)
        forgotten = (losses * weights).sum()
        count = window[objective.loss.subject][1 if objective.loss.token_mean else 0]
        values = {"forget_loss": (forgotten, weights.sum())}
        forgotten = (self.args.forget_weight or 0.0) * forgotten
        loss, terms = forgotten / count, [(forgotten, weights.sum())]
        if "retain" in self.parts:
            losses, weights = objective.retain(step)
            retained = (losses * weights).sum()
            count = window["retain"][0 if objective.retains_by_row else 1]
            values["retain_loss"] = (retained, weights.sum())
            loss = loss + objective.weigh(retained / count, weights.sum() / count)
            terms.append((objective.weigh(retained, weights.sum()), weights.sum()))
        for part in objective.loss.reads:
            scored = step.parts[part][1].any(1)
            values[f"{part}_prob"] = (sequence_probs(*step.parts[part]).sum(), scored.sum())
        values |= objective.metrics(step)
        self.guard.add("unlearn", values, terms, step.parts, weight_means(inputs, step.parts))
        loss = over_processes(self.accelerator, loss, training=training)
        return (loss, step.output) if return_outputs else loss


def _objective(trainer: UnlearnTrainer) -> Objective:
    args, loss = trainer.args, LOSSES[trainer.args.loss]
    cap = args.ascent_cap or math.log(trainer.model.config.get_text_config().vocab_size)
    objective = loss.objective(
        loss,
        trainer.model,
        trainer.accelerator,
        trainer.parts,
        retain_loss=args.retain_loss or loss.retain_loss,
        retain_weight=args.retain_weight or 0.0,
        cap=None if math.isinf(cap) else cap,
        **{name: getattr(args, name) for name in loss.settings},
    )
    if objective.whole and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            f"`loss={args.loss!r}` needs the logits of the whole vocabulary from a head "
            "that FSDP or DeepSpeed spread over processes. Use DDP, or a loss of token "
            "probabilities such as npo, simnpo or wga."
        )
    return objective


def _reference(trainer: UnlearnTrainer, peft_config: "PeftConfig | None") -> Reference | None:
    needed, of_retained = trainer.objective.loss.reference, "retain" in trainer.objective.whole
    if not needed and not of_retained:
        return None
    return Reference(
        trainer,
        trainer.args.reference,
        fresh_adapter=switches_off(peft_config),
        logps_of_training_rows_suffice=needed == "logps"
        and not of_retained
        and trainer.eval_dataset is None,
    )
