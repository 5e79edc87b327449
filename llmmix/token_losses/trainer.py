"""The trainer of the token losses: TRL's, with another loss of each token.

    total = sum of the loss of each scored token / N

N counts the scored tokens of the accumulation window, on all processes.

TRL's own reduction, metrics and router loss run on it: with nll the trainer is `SFTTrainer`, and
with dft it is TRL's `loss_type="dft"`, to the last digit.
"""

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import SFTTrainer

from llmmix.arguments import check_types, own_config, own_model
from llmmix.checkpoints.cards import sign
from llmmix.head import FusedHeadOutput
from llmmix.padding_free_setting import padded_by_trl
from llmmix.processes import say_once, warn_once
from llmmix.rows.message_weights import carry_sft_weights
from llmmix.rows.prepared import log_dropped, log_packed
from llmmix.rows.turns import turns_found
from llmmix.rows.weights import take_weights
from llmmix.token_losses.config import TokenLossConfig
from llmmix.token_losses.objective import TokenObjective, together
from llmmix.token_losses.reference_model import check_reference_model
from llmmix.token_losses.references import TokenReference, token_reference
from llmmix.token_losses.settings import nll_for_trl
from llmmix.trainers import (
    ForwardRecorder,
    attach_heads,
    check_sft_datasets,
    check_unsharded,
    keep_outputs_in_fp32,
    leaves_rows_alone,
    length_limit,
)
from llmmix.training.finite import end_unless_finite
from llmmix.training.means import Means, Sums, log_of
from llmmix.training.resuming import keep_token_count
from llmmix.training.unmoved import tell_if_unmoved
from llmmix.training.windows import evaluated, window

if TYPE_CHECKING:
    from peft import PeftModel

COLD = 0.05  # mean weight below which nearly nothing is learned
WEIGHT, PROB = "token_losses/weight", "token_losses/prob"


class TokenLossTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on one of the token losses, averaged over all scored tokens.

    Takes the dataset formats of `SFTTrainer` and its arguments, `packing` among them. Logs, beside
    TRL's metrics, `token_losses/weight` (mean weight of a scored token), `token_losses/prob` (its
    mean probability) and `nll_per_token` (its NLL, which is the loss of an SFT run). The loss of an
    evaluation is the same, over all of its scored tokens.

    Args:
        model: Checkpoint, or a loaded model.
        args: A `TokenLossConfig`, or `SFTConfig` or `TrainingArguments`, which become one.
        data_collator: As in `SFTTrainer`, like the four below.
        train_dataset: The training rows.
        eval_dataset: The rows to evaluate on, or several such by their names.
        processing_class: The tokenizer.
        **kwargs: The other arguments of `SFTTrainer`.

    Raises:
        TypeError: `args`, `model`, the collator or the rows are of a type that it does not take.
        ValueError: Context or sequence parallelism is on; `packing` is set beside `padding_free`,
            or with select; `compute_loss_func` is given; or the model that the loss compares with
            cannot serve (`token_reference`).
        FileNotFoundError: There is no such `reference_model`.
    """

    args: TokenLossConfig  # these two are narrower than in TRL
    model: PreTrainedModel

    _tag_names = [*SFTTrainer._tag_names, "llmmix", "token_losses"]
    objective: TokenObjective
    reference: TokenReference | None

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
        args = own_config(args, TokenLossConfig, "token-losses-output")
        kwargs |= {
            "data_collator": data_collator,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_types(model, train_dataset, kwargs)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` is another loss: leave it out, or `loss_type`.")
        check_reference_model(args)
        start = own_model(model, args, processing_class)
        train_dataset = check_sft_datasets(args, start, train_dataset, kwargs)
        check_reference_model(args, kwargs["processing_class"])
        with turns_found(args, train_dataset), padded_by_trl(args), nll_for_trl(args):
            super().__init__(start, args=args, train_dataset=train_dataset, **kwargs)
        if args.packing and not leaves_rows_alone(args):
            log_packed(train_dataset, self.train_dataset, args)
        else:
            log_dropped(train_dataset, self.train_dataset, length_limit(args))
        check_unsharded("A token loss", self.accelerator)
        keep_outputs_in_fp32(self.accelerator)
        self.objective = TokenObjective(args, self.model.config.get_text_config().vocab_size)
        attach_heads(self, padding_free=args.padding_free, **self.objective.head)
        carry_sft_weights(self)
        end_unless_finite(self)
        tell_if_unmoved(self, "nll_per_token")  # a loss of weights may rise, or stay near -1
        sign(self, f"the token loss {args.loss_type}", self.objective.loss.paper)
        keep_token_count(self)
        self.means = Means(self)
        self.reference = token_reference(self, kwargs.get("peft_config"))
        self._told_cold = False
        self._tell_scale()

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the run to the Hub."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """TRL's training; a snapshot goes on from the checkpoint too."""
        if resume_from_checkpoint and self.reference is not None:
            newest = resume_from_checkpoint is True
            found = get_last_checkpoint(self.args.output_dir) if newest else resume_from_checkpoint
            if found is not None:  # TRL says so where there is none
                self.reference.resume(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's saving; a checkpoint of the run holds a snapshot too."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.reference is not None:
            self.reference.save(output_dir)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Count the tokens of the accumulation window, or of them those that the loss takes."""
        drawn = window(self, epoch_iterator)
        batches, tokens = super().get_batch_samples(drawn, num_batches, device)
        if self.reference is not None:
            tokens = self.reference.count(batches, tokens)
        return batches, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """TRL's loss, with the loss of each token in place of its NLL."""
        inputs, weights = take_weights(evaluated(self, inputs))
        needs: dict[str, Tensor] = {}
        of_reference = None
        if self.reference is not None:
            needs, of_reference = self.reference.before(model, inputs)
        found: dict[str, Tensor] = {}

        def token_loss(output: FusedHeadOutput) -> Tensor:
            arguments, mask = self.objective.arguments(output, needs), output.label_mask
            found["losses"] = weights.times(self.objective.losses(arguments, mask))
            found["weights"] = self.objective.weights(arguments, mask)
            found["taken"] = arguments.get("selected", mask)
            return found["losses"]

        recorder = ForwardRecorder(
            model, together(self.objective.head_objective, of_reference), token_loss
        )
        with nll_for_trl(self.args):
            result = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)
        extra = {} if self.reference is None else self.reference.metrics(recorder.output, needs)
        extra = {**extra, **weights.mean(found["taken"])}
        self._measure(recorder.output, found, extra)
        return result

    def _measure(
        self, output: FusedHeadOutput, found: dict[str, Tensor], extra: Mapping[str, Sums]
    ) -> None:
        """Count what is logged of a micro-batch."""
        log_probs, mask = output.log_probs.detach(), output.label_mask
        losses, tokens, taken = found["losses"], mask.sum(), found["taken"].sum()
        router = torch.zeros_like(losses.sum())
        if self.aux_loss_enabled and output.aux_loss is not None:
            router = self.router_aux_loss_coef * output.aux_loss
        self.means.add(
            {
                WEIGHT: (found["weights"].sum(), tokens),
                PROB: ((log_probs.exp() * mask).sum(), tokens),
                "nll_per_token": (-log_probs.sum(), tokens),
                **extra,
            },
            loss=[(losses.sum(), taken), (router * tokens, tokens)],
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with one warning when next to nothing is learned."""
        early = self.state.global_step < self.state.max_steps / 10
        logged = log_of(self, training=True)
        if self.model.training and not early and not self._told_cold and WEIGHT in logged:
            weight, prob = logged[WEIGHT][0], logged[PROB][0]
            # Of losses that do not weigh, a small mean is no small gradient; and a model that knows
            # the rows has little to learn
            if self.objective.loss.weighs and weight < COLD and prob < 0.5:
                self._told_cold = True
                warn_once(
                    f"The mean weight of a token is {weight:.3g} under "
                    f"`loss_type={self.args.loss_type!r}` (its mean probability: {prob:.3g}), so "
                    "next to nothing is learned. Begin with 'nll', which learns what the model "
                    "does not know yet."
                )
        super().log(logs, start_time)

    def _tell_scale(self) -> None:
        """Say once what a loss with weights does to the scale of the gradient, and of a bad q."""
        args = self.args
        if self.objective.loss.weighs and args.max_grad_norm:
            say_once(
                f"`loss_type={args.loss_type!r}` scales the gradient of each token by its weight "
                f"(`{WEIGHT}` in the log), while `max_grad_norm={args.max_grad_norm:g}` stays: "
                "clipping acts on other steps than under nll."
            )
        if (args.gce_q or 0.0) < 0:
            warn_once(
                f"`gce_q={args.gce_q:g}` is below 0: the weight p^q of an unlikely token has no "
                "bound. Use 0 (nll) or more, or clip by `max_grad_norm`."
            )
