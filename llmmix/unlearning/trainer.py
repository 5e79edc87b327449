"""One trainer for the losses of `llmmix.unlearning`: its `loss` says what it needs.

    total = forget_weight * loss(rows to forget) + retain_weight * loss(rows to retain)

from one forward over templates, rows to forget and rows to retain. A row to retain is drawn for
each row to forget. Forget losses that are means over tokens are so over the tokens of the whole
step; the others over its rows.

Recipe: recipes/unlearn.py. Evaluation: eval/unlearning.py. Losses: llmmix/unlearning/losses.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from llmmix.head import attach_head
from llmmix.trainers import check_own_loss, check_unsharded, default_to_cpu, keep_outputs_in_fp32
from llmmix.unlearning import losses as unlearning
from llmmix.unlearning.flat import sequence_probs
from llmmix.unlearning.guards import UnlearningGuard, check_limit
from llmmix.unlearning.references import KINDS, Reference, decoder_layers, logits_of, select, tap
from llmmix.unlearning.rows import (
    check_args,
    count_window,
    epoch_sampler,
    forward_parts,
    prepare_rows,
    resolve_templates,
)


@dataclass(frozen=True)
class Needs:
    """What a loss needs beside the rows to forget, and its authors' settings.

    Attributes:
        template: Whether it needs template answers.
        reference: What of the reference: "logps", "logits", "hidden", or nothing.
        logits: Whether it needs the whole vocabulary of the rows to forget.
        token_mean: Whether it is a mean over the tokens of a step, or over its rows.
        forget_weight: gamma.
        retain_weight: alpha; 0 where it needs no rows to retain.
        retain_loss: "nll" or "kl".
        beta: Its beta.
    """

    template: bool = False
    reference: str = ""
    logits: bool = False
    token_mean: bool = True
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain_loss: str = "nll"
    beta: float | None = None


LOSSES = {
    "grad_ascent": Needs(retain_weight=0.0),
    "grad_diff": Needs(),
    "kl": Needs(retain_loss="kl"),
    "npo": Needs(reference="logps", token_mean=False, beta=0.1),
    "simnpo": Needs(token_mean=False, forget_weight=0.125, beta=4.5),
    "dpo": Needs(template=True, reference="logps", token_mean=False, beta=0.1),
    "undial": Needs(reference="logits", logits=True, retain_weight=0.0, beta=10.0),
    "ceu": Needs(logits=True, retain_weight=0.0),
    "wga": Needs(beta=1.0),
    "satimp": Needs(retain_weight=0.1, beta=5.0),
    "rmu": Needs(reference="hidden", token_mean=False),
    "pdu": Needs(logits=True),
    "idk": Needs(template=True),
}


@dataclass
class UnlearnConfig(SFTConfig):
    """TRL's `SFTConfig` with the fields of the unlearning losses.

    A setting that is left at None takes the value that the loss's authors use.

    Args:
        loss: Among `LOSSES`.
        forget_weight: gamma, of the forget term.
        retain_weight: alpha, of the retain term; 0 needs no rows to retain. With pdu, the first
            value of its multiplier.
        retain_loss: `"nll"`, or `"kl"`: the divergence from the reference on retained rows.
        beta: Of npo, simnpo, dpo, undial, wga and satimp (its beta1).
        beta2: Of satimp.
        delta: Of simnpo, in nats a token.
        ascent_cap: NLL, in nats, from which a token is pushed no further by grad_ascent, grad_diff
            and kl. 0 stands for ln V, what a uniform guess has; inf for none.
        skip_tokens: First tokens of an answer that ceu leaves alone.
        layer: At which rmu steers: its output, counted from 0. 7, or half way in a model of fewer
            than 14 layers.
        steering: c of rmu, how long the vector is that hidden states are steered to.
        epsilon: NLL a token that pdu allows on retained rows.
        dual_step: eta of pdu.
        dual_warmup_epochs: Epochs before pdu's multiplier moves.
        reference: `"adapter"`: the new adapter switched off; `"precomputed"`: log-probabilities
            kept from before the first step; `"copy"`: a frozen copy. `"auto"`: the first of them
            that serves.
        template_file: Template answers, one a line, where rows have no `template`.
        resample_templates: Draw a row's template anew each epoch.
        include_eos: Score the end-of-sequence token.
        min_forget_prob: Training ends when the mean probability of the tokens to forget falls
            below it.
        max_retain_loss: Training ends when the mean of the retain term exceeds it: an NLL a token;
            under kl a divergence, with rmu a squared distance.
    """

    loss: str = field(default="npo", metadata={"help": f"One of {', '.join(LOSSES)}."})
    forget_weight: float | None = field(default=None, metadata={"help": "gamma."})
    retain_weight: float | None = field(
        default=None, metadata={"help": "alpha; 0 needs no rows to retain."}
    )
    retain_loss: str | None = field(
        default=None, metadata={"help": "'nll', or 'kl' to the reference."}
    )
    beta: float | None = field(default=None, metadata={"help": "The loss's beta (or beta1)."})
    beta2: float = field(default=1.0, metadata={"help": "beta2 of satimp."})
    delta: float = field(default=0.0, metadata={"help": "delta of simnpo, in nats a token."})
    ascent_cap: float = field(
        default=0.0, metadata={"help": "NLL of a token where ascent ends; 0: ln V, inf: none."}
    )
    skip_tokens: int = field(default=1, metadata={"help": "First answer tokens ceu leaves alone."})
    layer: int | None = field(default=None, metadata={"help": "Layer of rmu, from 0."})
    steering: float = field(default=2.0, metadata={"help": "c of rmu."})
    epsilon: float | None = field(
        default=None, metadata={"help": "pdu: the NLL a token allowed on retained rows."}
    )
    dual_step: float = field(default=1.0, metadata={"help": "eta of pdu."})
    dual_warmup_epochs: float = field(
        default=5.0, metadata={"help": "Epochs before pdu's multiplier moves."}
    )
    reference: str = field(
        default="auto", metadata={"help": "auto, adapter, precomputed or copy.", "choices": KINDS}
    )
    template_file: str | None = field(
        default=None, metadata={"help": "Template answers, one a line; refusals by default."}
    )
    resample_templates: bool = field(
        default=True, metadata={"help": "Draw each row's template anew each epoch."}
    )
    include_eos: bool = field(default=True, metadata={"help": "Score the end-of-sequence token."})
    min_forget_prob: float | None = field(
        default=None, metadata={"help": "End when the mean token probability falls below it."}
    )
    max_retain_loss: float | None = field(
        default=None, metadata={"help": "End when the retain term (an NLL a token) exceeds it."}
    )

    def __post_init__(self):
        self.loss = self.loss.strip().lower().replace("-", "_")
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        needs = LOSSES[self.loss]
        for name in ("forget_weight", "retain_weight", "retain_loss", "beta"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(needs, name))
        self._check_settings(needs)
        self._check_numbers()
        default_to_cpu(self)
        super().__post_init__()

    def _check_settings(self, needs: Needs) -> None:
        if self.retain_loss not in ("nll", "kl"):
            raise ValueError(f"`retain_loss` must be 'nll' or 'kl', got {self.retain_loss!r}.")
        if self.reference not in KINDS:
            raise ValueError(
                f"`reference` must be one of {', '.join(KINDS)}, got {self.reference!r}."
            )
        if self.loss == "idk" and self.min_forget_prob is not None:
            raise ValueError(
                "`min_forget_prob` watches the answers to forget, which idk never reads."
            )
        if self.loss == "rmu" and self.retain_loss != "nll":
            raise ValueError("`retain_loss` is no setting of 'rmu', whose retain term is its own.")
        if needs.beta is None and self.beta is not None:
            raise ValueError(f"`beta` is no setting of {self.loss!r}: leave it out.")
        if self.loss in ("npo", "simnpo", "dpo") and not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if self.loss == "pdu" and (self.epsilon is None or self.retain_loss != "nll"):
            raise ValueError(
                "pdu holds the NLL a token on retained rows below `epsilon`: set it, such as to "
                "0.3 above what the model has now, and leave `retain_loss` at 'nll'."
            )

    def _check_numbers(self) -> None:
        for name in ("forget_weight", "retain_weight", "beta", "beta2", "skip_tokens", "dual_step"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if not self.ascent_cap >= 0:
            raise ValueError(f"`ascent_cap` must not be negative, got {self.ascent_cap}.")
        check_limit("min_forget_prob", self.min_forget_prob, top=1)
        check_limit("max_retain_loss", self.max_retain_loss)


def check_needs(args: UnlearnConfig, retain: bool) -> None:
    """Refuse a loss without the rows it needs, or rows it would not use; cheap, before any model.

    Raises:
        ValueError: Either.
    """
    needed = args.retain_weight > 0 or args.loss == "pdu"
    if needed and not retain:
        raise ValueError(
            f"`loss={args.loss!r}` has a term on rows to retain (retain_weight "
            f"{args.retain_weight:g}): give them by `retain_dataset_name` (`retain_dataset`), or "
            "set `retain_weight` to 0 to do without."
            if args.loss != "pdu"
            else "`loss='pdu'` needs rows to retain: give them by `retain_dataset_name` "
            "(`retain_dataset`)."
        )
    if retain and not needed:
        raise ValueError(
            f"`loss={args.loss!r}` does not use rows to retain with retain_weight 0: set "
            "`retain_weight` above 0, or leave the rows out."
        )
    if args.max_retain_loss is not None and not needed:
        raise ValueError("`max_retain_loss` watches rows to retain, and there are none.")


class UnlearnTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on one of the unlearning losses.

    `train_dataset` has rows to forget: `question` and `answer`, `prompt` and `completion`, or
    `text`. Logs `unlearn/forget_loss` and `unlearn/retain_loss` without their weights,
    `unlearn/forget_prob` and `unlearn/template_prob` (mean probability of an answer's tokens),
    `unlearn/capped` (share of tokens beyond `ascent_cap`) and `unlearn/multiplier` (of pdu), where
    the loss has them.

    Args:
        retain_dataset: Rows to retain, in any of the same formats, for a loss with a retain term.
        templates: Answers to draw from where rows have none of their own, or a function of a row.

    Raises:
        ValueError: A loss without what it needs; rows that `ForgetRows` refuses; packing; losses
            over the whole vocabulary where FSDP or DeepSpeed spread the head.
    """

    _tag_names = ["llmmix", "unlearn"]
    _name = "Unlearning"
    loss_is_scaled_for_ga = True  # the loss is divided by the counts of the whole window

    def __init__(
        self,
        model,
        args: UnlearnConfig | None = None,
        train_dataset=None,
        *,
        retain_dataset=None,
        templates=None,
        **kwargs,
    ):
        args = args or UnlearnConfig("unlearn-output")
        check_own_loss("Unlearning", args, kwargs)
        check_needs(args, retain_dataset is not None)
        check_args(args, train_dataset)
        self.needs = LOSSES[args.loss]
        self.parts = tuple(
            part
            for part, wanted in (
                ("template", self.needs.template),
                ("forget", args.loss != "idk"),
                ("retain", retain_dataset is not None),
            )
            if wanted
        )
        templates = resolve_templates(args.template_file, templates)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        check_unsharded("Unlearning", self.accelerator)
        skip = args.skip_tokens if args.loss == "ceu" else 0
        self._prepared = prepare_rows(self, self.parts, retain_dataset, templates, skip)
        keep_outputs_in_fp32(self.accelerator)
        attach_head(self.model)
        to_reference = "retain" in self.parts and args.retain_loss == "kl"
        self._logits = ["forget"] * self.needs.logits + ["retain"] * to_reference
        self._refuse_spread_head()
        if args.loss == "rmu":
            self._prepare_rmu()
        self._prepare_reference(kwargs.get("peft_config"))
        cap = args.ascent_cap or math.log(self.model.config.get_text_config().vocab_size)
        self._cap = None if math.isinf(cap) else cap
        limits = {name: getattr(args, name) for name in ("min_forget_prob", "max_retain_loss")}
        self.guard = UnlearningGuard(self, **limits)
        self.add_callback(self.guard)
        self._multiplier = DualAscent(self) if args.loss == "pdu" else None
        if self._multiplier is not None:
            self.add_callback(self._multiplier)

    def _send_telemetry(self):
        """Send nothing: TRL would report the run to the Hub."""

    def _refuse_spread_head(self) -> None:
        if self._logits and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"`loss={self.args.loss!r}` needs the logits of the whole vocabulary from a head "
                "that FSDP or DeepSpeed spread over processes. Use DDP, or a loss of token "
                "probabilities such as npo, simnpo or wga."
            )

    def _prepare_reference(self, peft_config) -> None:
        # PiSSA and its like change the weights below the adapter
        start = getattr(peft_config, "init_lora_weights", True)
        fresh_adapter = peft_config is not None and start in (True, False, "gaussian")
        of_retained = "retain" in self._logits
        self.reference = None
        if self.needs.reference or of_retained:
            self.reference = Reference(
                self,
                self.args.reference,
                fresh_adapter=fresh_adapter,
                logps_of_training_rows_suffice=self.needs.reference == "logps"
                and not of_retained
                and self.eval_dataset is None,
            )

    def _prepare_rmu(self) -> None:
        """Leave only three layers up to the steered one to train, and draw the target."""
        args, layers = self.args, decoder_layers(self.model)
        layer = min(7, len(layers) // 2) if args.layer is None else args.layer
        if not 0 <= layer < len(layers):
            raise ValueError(f"`layer` must lie in [0, {len(layers)}), got {args.layer}.")
        near = [module for place, module in enumerate(layers) if layer - 2 <= place <= layer]
        trained = {
            parameter: name
            for module in near
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        last = {parameter for parameter, name in trained.items() if "down_proj" in name}
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in (last or trained))
        if not trained:
            raise ValueError(
                f"rmu trains layers {max(layer - 2, 0)} to {layer} alone, and nothing there is "
                "trainable. Check `lora_target_modules`, or `layer`."
            )
        self._layer = layer
        size = self.model.config.get_text_config().hidden_size
        self._target = unlearning.rmu_target(size, args.steering, args.seed)

    def evaluate(self, eval_dataset=None, **kwargs):
        """TRL's; rows that are given are prepared as those of the constructor.

        Raises:
            ValueError: The reference is known for the training rows alone.
        """
        if self.reference is not None and self.reference.kind == "precomputed":
            raise ValueError(
                "`reference='precomputed'` holds for the training rows alone: set "
                "`reference='copy'` to evaluate others."
            )
        return super().evaluate(self._prepared(eval_dataset, "eval_dataset"), **kwargs)

    mixture_strata = None  # a mixture draws from all rows alike

    def _get_train_sampler(self, train_dataset=None):
        return epoch_sampler(self)

    def train(self, *args, **kwargs):
        """TRL's, after the reference's log-probabilities are kept where they are to be."""
        if self.reference is not None:
            given, rows = self.args, self.train_dataset
            a_step = given.train_batch_size * given.gradient_accumulation_steps * given.world_size
            passes = given.max_steps / max(1, len(rows) // a_step)
            epochs = math.ceil(passes if given.max_steps > 0 else given.num_train_epochs)
            self.reference.precompute(rows, epochs + 1, self.parts)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Count rows and tokens of each part over the accumulation window of every process."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = count_window(self.accelerator, batches, self.parts, device)
        return batches, self._window[self._subject][0]

    @property
    def _subject(self) -> str:
        """The part that the forget term is of."""
        return "forget" if "forget" in self.parts else "template"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The forget and the retain term, from one forward."""
        args, training = self.args, num_items_in_batch is not None
        device = inputs["labels"].device
        window = self._window if training else count_window(None, [inputs], self.parts, device)
        step = self._forward(model, inputs)
        values = {}
        losses, weights = FORGET[args.loss](step)
        of_forget = (losses * weights).sum()
        count = window[self._subject][1 if self.needs.token_mean else 0]
        values["forget_loss"] = (of_forget, weights.sum())
        loss = args.forget_weight * of_forget / count
        if "retain" in self.parts:
            losses, weights = self._retain_losses(step)
            of_retain = (losses * weights).sum()
            values["retain_loss"] = (of_retain, weights.sum())
            retained = of_retain / window["retain"][0 if args.loss == "rmu" else 1]
            if self._multiplier is not None:
                share = weights.sum() / window["retain"][1]
                loss = loss + self._multiplier.value * (retained - args.epsilon * share)
                value = torch.tensor(self._multiplier.value, device=device)
                values["multiplier"] = (value, torch.ones_like(value))
            else:
                loss = loss + args.retain_weight * retained
        for part in (p for p in ("template", "forget") if p in self.parts):
            probs = sequence_probs(*step.parts[part])
            values[f"{part}_prob"] = (probs.sum(), torch.tensor(float(len(probs)), device=device))
        if args.loss in ("grad_ascent", "grad_diff", "kl") and self._cap is not None:
            logps, mask = step.parts["forget"]
            values["capped"] = ((logps < -self._cap).sum(), mask.sum())
        self.guard.add("unlearn", values)
        loss = loss * (self.accelerator.num_processes if training else 1)  # DDP averages gradients
        return (loss, step.output) if return_outputs else loss

    def _forward(self, model, inputs) -> "Step":
        objective = logits_of(self.parts, self._logits) if self._logits else None
        hidden = None
        if self.args.loss == "rmu":
            with tap(self.accelerator.unwrap_model(model), self._layer) as caught:
                parts, output = forward_parts(model, inputs, self.parts, objective)
            hidden = dict(zip(self.parts, caught[0].chunk(len(self.parts)), strict=True))
        else:
            parts, output = forward_parts(model, inputs, self.parts, objective)
        return Step(self, model, inputs, parts, output, output.objective or {}, hidden)

    def _retain_losses(self, step: "Step") -> tuple[Tensor, Tensor]:
        logps, mask = step.parts["retain"]
        if self.args.loss == "rmu":
            with self.reference.model(step.model) as reference:
                bare = self.accelerator.unwrap_model(reference)
                with tap(bare, self._layer) as caught:
                    forward_parts(reference, select(step.batch, self.parts, ["retain"]), ["retain"])
            found = unlearning.rmu_loss(step.hidden["retain"], caught[0], step.answers("retain"))
            return found, (mask.sum(1) > 0).float()
        if self.args.retain_loss == "kl":
            ref_logits = step.ref_logits("retain")
            return step.over_vocabulary(unlearning.kl_loss, "retain", ref_logits=ref_logits)
        return unlearning.nll_loss(logps, mask), mask.sum(1)


@dataclass
class Step:
    """A micro-batch after its forward, as the losses below ask for it."""

    trainer: UnlearnTrainer
    model: torch.nn.Module
    batch: dict
    parts: dict[str, tuple[Tensor, Tensor]]
    output: object
    logits: dict[str, Tensor]
    hidden: dict[str, Tensor] | None

    @property
    def args(self) -> UnlearnConfig:
        """The trainer's settings."""
        return self.trainer.args

    def logps(self, part: str) -> Tensor:
        """(B,) summed log-probabilities."""
        return self.parts[part][0].sum(1)

    def ref_logps(self, part: str) -> Tensor:
        """(B,) summed log-probabilities under the reference."""
        return self.trainer.reference.logps(self.model, self.batch, self.trainer.parts, part)

    def labels(self, part: str) -> Tensor:
        """(B, T) labels of a part."""
        places = dict(zip(self.trainer.parts, range(len(self.trainer.parts)), strict=True))
        return self.batch["labels"].chunk(len(places))[places[part]]

    def answers(self, part: str) -> Tensor:
        """(B, T), true at the tokens of the answers."""
        return self.labels(part) != -100

    def by_row(self, losses: Tensor, part: str = "forget") -> tuple[Tensor, Tensor]:
        """Losses with a weight of one for each row that has something to score."""
        return losses, self.parts[part][1].any(1).float()

    def by_token(self, losses: Tensor, part: str = "forget") -> tuple[Tensor, Tensor]:
        """Losses, each a mean over its row's tokens, weighted by their number."""
        return losses, self.parts[part][1].sum(1)

    def over_vocabulary(self, loss: Callable, part: str, **others) -> tuple[Tensor, Tensor]:
        """A loss of (1, N, V) logits at the N scored positions of a part, weighted by N."""
        labels = self.labels(part)[:, 1:]
        labels = labels[labels != -100]
        others = {
            name: x.unsqueeze(0) if isinstance(x, Tensor) else x for name, x in others.items()
        }
        found = loss(self.logits[part].unsqueeze(0), labels=labels.unsqueeze(0), **others)
        return found, torch.full_like(found, len(labels))

    def ref_logits(self, part: str) -> Tensor:
        """(N, V) logits of the reference at the scored positions of a part."""
        objective = logits_of([part], [part])
        _, output = self.trainer.reference.forward(
            self.model, self.batch, self.trainer.parts, [part], head_objective=objective
        )
        return output.objective[part]


def _ascent(step: Step) -> tuple[Tensor, Tensor]:
    return step.by_token(unlearning.grad_ascent_loss(*step.parts["forget"], cap=step.trainer._cap))


def _dpo(step: Step) -> tuple[Tensor, Tensor]:
    template, forget = step.logps("template"), step.logps("forget")
    reference = step.ref_logps("template"), step.ref_logps("forget")
    return step.by_row(unlearning.dpo_loss(template, forget, *reference, step.args.beta))


def _undial(step: Step) -> tuple[Tensor, Tensor]:
    options = {"teacher_logits": step.ref_logits("forget"), "beta": step.args.beta}
    return step.over_vocabulary(unlearning.undial_loss, "forget", **options)


def _rmu(step: Step) -> tuple[Tensor, Tensor]:
    target = step.trainer._target.to(step.hidden["forget"].device)
    answers = step.answers("forget")
    return step.by_row(unlearning.rmu_loss(step.hidden["forget"], target, answers))


# The forget term of each loss: values, and the weight that each has in the mean
FORGET: dict[str, Callable[[Step], tuple[Tensor, Tensor]]] = {
    "grad_ascent": _ascent,
    "grad_diff": _ascent,
    "kl": _ascent,
    "npo": lambda s: s.by_row(
        unlearning.npo_loss(s.logps("forget"), s.ref_logps("forget"), s.args.beta)
    ),
    "simnpo": lambda s: s.by_row(
        unlearning.simnpo_loss(
            s.logps("forget"), s.parts["forget"][1].sum(1), s.args.beta, s.args.delta
        )
    ),
    "dpo": _dpo,
    "undial": _undial,
    "ceu": lambda s: s.over_vocabulary(unlearning.ceu_loss, "forget"),
    "wga": lambda s: s.by_token(unlearning.wga_loss(*s.parts["forget"], s.args.beta)),
    "satimp": lambda s: s.by_token(
        unlearning.satimp_loss(*s.parts["forget"], s.args.beta, s.args.beta2)
    ),
    "rmu": _rmu,
    "pdu": lambda s: s.over_vocabulary(unlearning.pdu_loss, "forget"),
    "idk": lambda s: s.by_token(unlearning.nll_loss(*s.parts["template"]), "template"),
}


class DualAscent(TrainerCallback, ExportableState):
    """The multiplier of pdu: moved after each step by the step's own NLL on retained rows."""

    def __init__(self, trainer: UnlearnTrainer):
        self.trainer, self.value = trainer, trainer.args.retain_weight

    def on_step_end(self, args, state, control, **kwargs):
        """One step of dual ascent, after the warm-up."""
        if state.epoch >= args.dual_warmup_epochs:
            retained = self.trainer.guard.step["retain_loss"]
            self.value = unlearning.pdu_multiplier(
                self.value, retained, args.epsilon, args.dual_step
            )

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin anew, or where the run that is resumed had come."""
        saved = state.stateful_callbacks.setdefault("DualAscent", self.state())
        self.value = saved["attributes"]["value"] if state.global_step else args.retain_weight

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"value": self.value}}
