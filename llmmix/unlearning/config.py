"""The settings of `UnlearnTrainer`, and what a loss refuses before any model is loaded."""

from dataclasses import dataclass, field

from llmmix.training.ranges import check_settings
from llmmix.unlearning.guards import check_limit
from llmmix.unlearning.loss_table import LOSSES
from llmmix.unlearning.objective import Loss
from llmmix.unlearning.preparation import ForgetConfig, check_not_negative
from llmmix.unlearning.references import KINDS

NOT_NEGATIVE = (
    *("forget_weight", "retain_weight", "beta", "beta2"),
    *("skip_tokens", "dual_step", "ascent_cap"),
)


@dataclass
class UnlearnConfig(ForgetConfig):
    """TRL's `SFTConfig` with the fields of the unlearning losses, beside those of `ForgetConfig`.

    A setting that is left at None takes the value of the loss's row in `LOSSES`, which is not its
    authors' for every loss: docs/methods/unlearning.md says whose each default is.

    Args:
        loss: Name of the loss, among `LOSSES`.
        forget_weight: gamma, the weight of the forget term.
        retain_weight: alpha, the weight of the retain term; 0 needs no rows to retain. With pdu,
            the first value of its multiplier, which its authors start at 50 to 100.
        retain_loss: `"nll"`, or `"kl"`: the divergence from the reference on retained rows.
        beta: beta of npo, simnpo, dpo, undial and wga; beta1 of satimp.
        beta2: beta2 of satimp.
        delta: Margin of simnpo, in nats a token.
        ascent_cap: NLL, in nats, from which a token is pushed no further by grad_ascent, grad_diff
            and kl. 0 stands for ln V, what a uniform guess has; inf for none.
        skip_tokens: First tokens of an answer that ceu leaves alone.
        layer: Layer whose output rmu steers, counted from 0. None: 7, or half way in a model of
            fewer than 14 layers.
        steering: c of rmu, the length of the vector that hidden states are steered to.
        epsilon: NLL a token that pdu allows on retained rows.
        dual_step: eta, the step size of pdu's multiplier.
        dual_warmup_epochs: Epochs before pdu's multiplier moves.
        reference: `"adapter"`: the new adapter switched off; `"precomputed"`: log-probabilities
            kept from before the first step; `"copy"`: a frozen copy. `"auto"`: the first of them
            that serves.
        max_retain_loss: Training ends when the mean of the retain term exceeds it: an NLL a token;
            under kl a divergence, with rmu a squared distance.
    """

    loss: str = field(
        default="npo", metadata={"help": f"Unlearning loss: one of {', '.join(LOSSES)}."}
    )
    forget_weight: float | None = field(
        default=None,
        metadata={"help": "gamma, the weight of the forget term; each loss has its own default."},
    )
    retain_weight: float | None = field(
        default=None,
        metadata={
            "help": "alpha, the weight of the retain term; each loss has its own default. 0 needs "
            "no rows to retain. With pdu, the first value of its multiplier."
        },
    )
    retain_loss: str | None = field(
        default=None,
        metadata={
            "help": "Retain term: 'nll', or 'kl', the divergence from the reference on retained "
            "rows. Default: kl with the loss kl, nll with all others."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "beta of npo, simnpo, dpo, undial and wga, and beta1 of satimp; each has its "
            "own default."
        },
    )
    beta2: float = field(default=1.0, metadata={"help": "beta2 of satimp."})
    delta: float = field(default=0.0, metadata={"help": "Margin of simnpo, in nats a token."})
    ascent_cap: float = field(
        default=0.0,
        metadata={
            "help": "NLL, in nats, from which grad_ascent, grad_diff and kl push a token no "
            "further; 0 stands for ln V, inf for no cap."
        },
    )
    skip_tokens: int = field(
        default=1, metadata={"help": "Number of first tokens of an answer that ceu leaves alone."}
    )
    layer: int | None = field(
        default=None,
        metadata={"help": "Layer whose output rmu steers, from 0; 7 or the middle by default."},
    )
    steering: float = field(
        default=2.0, metadata={"help": "c of rmu, the length of the vector it steers to."}
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "NLL a token that pdu allows on retained rows."}
    )
    dual_step: float = field(
        default=1.0, metadata={"help": "eta, the step size of pdu's multiplier."}
    )
    dual_warmup_epochs: float = field(
        default=5.0, metadata={"help": "Epochs before pdu's multiplier moves."}
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "How the model before unlearning is kept: its adapter switched off, "
            "log-probabilities computed before the first step, a copy, or the first of them that "
            "serves (auto).",
            "choices": KINDS,
        },
    )
    max_retain_loss: float | None = field(
        default=None,
        metadata={"help": "Training ends when the mean of the retain term exceeds this."},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self.loss = self.loss.strip().lower().replace("-", "_")
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        loss = LOSSES[self.loss]
        for name in ("forget_weight", "retain_weight", "retain_loss", "beta"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(loss, name))
        self._check_settings(loss)
        check_not_negative(self, NOT_NEGATIVE)
        check_limit("max_retain_loss", self.max_retain_loss)
        super().__post_init__()

    def _check_settings(self, loss: Loss) -> None:
        if self.retain_loss not in ("nll", "kl"):
            raise ValueError(f"`retain_loss` must be 'nll' or 'kl', got {self.retain_loss!r}.")
        if self.reference not in KINDS:
            raise ValueError(
                f"`reference` must be one of {', '.join(KINDS)}, got {self.reference!r}."
            )
        if "forget" not in loss.reads and self.min_forget_prob is not None:
            raise ValueError(
                f"`min_forget_prob` watches the answers to forget, which {self.loss} never reads."
            )
        if loss.beta is None and self.beta is not None:
            raise ValueError(f"`beta` is no setting of {self.loss!r}: leave it out.")
        if loss.positive_beta and not (self.beta or 0.0) > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        loss.objective.check(
            self.retain_loss, {name: getattr(self, name) for name in loss.settings}
        )


def check_needs(args: UnlearnConfig, retain: bool) -> None:
    """Refuse a loss without the rows it needs, or with rows it would not use.

    It needs no model, so that a mistake shows before one is loaded.

    Raises:
        ValueError: The loss has a retain term and there are no rows to retain; there are such rows
            and no such term; `max_retain_loss` is set and there are no such rows.
    """
    required = LOSSES[args.loss].retain_required
    needed = required or (args.retain_weight or 0.0) > 0
    if needed and not retain:
        raise ValueError(
            f"`loss={args.loss!r}` has a term on rows to retain (retain_weight "
            f"{args.retain_weight:g}): give them by `retain_dataset_name` (`retain_dataset`), or "
            "set `retain_weight` to 0 to do without."
            if not required
            else f"`loss={args.loss!r}` needs rows to retain: give them by `retain_dataset_name` "
            "(`retain_dataset`)."
        )
    if retain and not needed:
        raise ValueError(
            f"`loss={args.loss!r}` does not use rows to retain with retain_weight 0: set "
            "`retain_weight` above 0, or leave the rows out."
        )
    if args.max_retain_loss is not None and not needed:
        raise ValueError("`max_retain_loss` watches rows to retain, and there are none.")
