r"""FLAT: unlearning with forget data alone, by an f-divergence of two answers (arXiv 2410.11143).

For a question x, its answer to forget y_f and a template answer y_e such as "I don't know.",

    L = -g(P_e) + f*(g(P_f)),     P = P(x, y) = (1/|y|) sum_t p(y_t | x, y_<t)

where f* is the conjugate of f and g an increasing function. P_e is pushed up and P_f down, each
with a weight that the divergence decides; a is P_e and c is P_f:

    kl                 -a + exp(c - 1)                           dL/dc = exp(c - 1)
    js                 softplus(-a) + softplus(c) - 2 ln 2       sigmoid(c)
    pearson            -a + c + c^2 / 4                          1 + c / 2
    tv                 (tanh c - tanh a) / 2                     sech^2(c) / 2: falls with c
    jeffrey            -a + w + 1/w + c - 2,  w + ln w = 1 - c   1 / w
    reverse_kl         exp(-a) - 1 + c                           1
    squared_hellinger  exp(-a) + exp(c) - 2                      exp(c)
    neyman             exp(-a) + 1 - 2 exp(-c / 2)               exp(-c / 2): falls with c

All of them are computed from P itself, not from the logarithms, so that P has a gradient only
where a token is not already impossible. The released code takes the mean of p over prompt and
padding too and over the batch before g; `prob_reduction` and `batch_reduction` offer that. Its
reverse_kl, squared_hellinger and neyman have a sign astray, and it cuts jeffrey off at the third
power; here they are the textbook's.

    symbol   name
    P_e      template_probs
    P_f      forget_probs

Recipe: recipes/flat.py. Evaluation: eval/unlearning.py. Invariants: tests/test_flat.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from llmmix.head import attach_head
from llmmix.trainers import check_own_loss, check_unsharded, default_to_cpu, keep_outputs_in_fp32
from llmmix.unlearning.guards import UnlearningGuard, check_limit
from llmmix.unlearning.losses import at_least_fp32, nll_loss
from llmmix.unlearning.rows import (
    check_args,
    count_window,
    epoch_sampler,
    forward_parts,
    prepare_rows,
    resolve_templates,
)


def flat_loss(template_probs: Tensor, forget_probs: Tensor, divergence: str = "js") -> Tensor:
    """-g(P_e) + f*(g(P_f)): falls with the template's probability, rises with the forgotten one's.

    Args:
        template_probs: (B,) P_e, in [0, 1].
        forget_probs: (B,) P_f, in [0, 1].
        divergence: Among `DIVERGENCES`, in any case and with hyphens or underscores.

    Returns:
        (B,).

    Raises:
        ValueError: An unknown divergence.
    """
    probs = (at_least_fp32(given) for given in (template_probs, forget_probs))
    return DIVERGENCES[check_divergence(divergence)](*probs)


def _jeffrey(a: Tensor, c: Tensor) -> Tensor:
    with torch.no_grad():
        w = 1 - c / 2  # for c in [0, 1], w + ln w = 1 - c has one root in [0.5, 1]
        for _ in range(4):
            w = w - (w + w.log() - 1 + c) / (1 + 1 / w)
    w = w - (w + w.log() - 1 + c) / (1 + 1 / w)  # and the gradient of w by c
    return -a + w + 1 / w + c - 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda a, c: -a + torch.exp(c - 1),
    "js": lambda a, c: F.softplus(-a) + F.softplus(c) - 2 * math.log(2),
    "pearson": lambda a, c: -a + c + c**2 / 4,
    "tv": lambda a, c: (torch.tanh(c) - torch.tanh(a)) / 2,
    "jeffrey": _jeffrey,
    "reverse_kl": lambda a, c: torch.exp(-a) - 1 + c,
    "squared_hellinger": lambda a, c: torch.exp(-a) + torch.exp(c) - 2,
    "neyman": lambda a, c: torch.exp(-a) + 1 - 2 * torch.exp(-c / 2),
}

ALIASES = {"jensen_shannon": "js", "jenson_shannon": "js", "total_variation": "tv"}


def check_divergence(name: str) -> str:
    """The name in `DIVERGENCES` of a divergence, however it is written.

    Raises:
        ValueError: There is none.
    """
    plain = str(name).strip().lower().replace("-", "_").replace(" ", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {name!r}.")
    return plain


def sequence_probs(
    token_logps: Tensor, mask: Tensor, *, mean: str = "arithmetic", positions: int | None = None
) -> Tensor:
    """P(x, y): the mean probability of the tokens of each answer.

    Args:
        token_logps: (B, T) in nats.
        mask: (B, T), true where scored.
        mean: `"arithmetic"`, or `"geometric"`: exp of the mean log-probability.
        positions: What to divide by instead of the answer's tokens: the length of the padded
            sequences, as the released code does.

    Returns:
        (B,) in [0, 1]; 0 for a row without a token.

    Raises:
        ValueError: An unknown mean, or positions with the geometric one.
    """
    lengths, token_logps = mask.sum(1), at_least_fp32(token_logps)
    if mean == "arithmetic":
        total = token_logps.exp().masked_fill(~mask, 0).sum(1)
        return total / (lengths.clamp(min=1) if positions is None else positions)
    if mean != "geometric":
        raise ValueError(f"`mean` must be 'arithmetic' or 'geometric', got {mean!r}.")
    if positions is not None:
        raise ValueError("`positions` goes with `mean='arithmetic'` alone.")
    logps = token_logps.masked_fill(~mask, 0).sum(1) / lengths.clamp(min=1)
    return logps.exp() * (lengths > 0)


@dataclass
class FLATConfig(SFTConfig):
    """TRL's `SFTConfig` with the fields of FLAT.

    Args:
        divergence: Which f-divergence between template and forget answers is maximised.
        mean: How the probability of an answer is made of its tokens'.
        prob_reduction: `"token_mean"` over the answer's tokens; `"all_positions"` over
            `max_length - 1`, as the released code.
        batch_reduction: `"per_sequence"`: the mean of the losses; `"batch_scalar"`: the loss of the
            mean probabilities of a micro-batch, as the released code. The latter depends on how a
            batch is split.
        template_file: Template answers, one a line, where rows have no `template`; our own list of
            refusals by default.
        resample_templates: Draw a row's template anew each epoch, instead of once.
        include_eos: Score the end-of-sequence token.
        template_sft_steps: Optimizer steps of plain cross-entropy on the templates at the start,
            for a model that finds them all but impossible: P_e has no gradient there.
        retain_weight: Weight of the cross-entropy on retained rows, where such are given. 0 is
            FLAT.
        min_forget_prob: Training ends when the mean of P_f falls below it.
    """

    divergence: str = field(
        default="js", metadata={"help": f"One of {', '.join(DIVERGENCES)}; the code's names too."}
    )
    mean: str = field(
        default="arithmetic", metadata={"help": "'arithmetic' (the paper) or 'geometric'."}
    )
    prob_reduction: str = field(
        default="token_mean",
        metadata={"help": "'token_mean', or 'all_positions': as the released code."},
    )
    batch_reduction: str = field(
        default="per_sequence",
        metadata={"help": "'per_sequence', or 'batch_scalar': as the released code."},
    )
    template_file: str | None = field(
        default=None, metadata={"help": "Template answers, one a line; refusals by default."}
    )
    resample_templates: bool = field(
        default=True, metadata={"help": "Draw each row's template anew each epoch."}
    )
    include_eos: bool = field(default=True, metadata={"help": "Score the end-of-sequence token."})
    template_sft_steps: int = field(
        default=0, metadata={"help": "Steps of cross-entropy on the templates at the start."}
    )
    retain_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on retained rows; 0 is FLAT."}
    )
    min_forget_prob: float | None = field(
        default=None, metadata={"help": "End training when the mean of P_f falls below it."}
    )

    def __post_init__(self):
        self.divergence = check_divergence(self.divergence)
        for name, choices in (
            ("mean", ("arithmetic", "geometric")),
            ("prob_reduction", ("token_mean", "all_positions")),
            ("batch_reduction", ("per_sequence", "batch_scalar")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}."
                )
        if self.prob_reduction == "all_positions" and (
            self.max_length is None or self.mean == "geometric"
        ):
            raise ValueError(
                "`prob_reduction='all_positions'` divides by `max_length - 1`: set `max_length`, "
                "and leave `mean` at 'arithmetic'."
            )
        for name in ("template_sft_steps", "retain_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        check_limit("min_forget_prob", self.min_forget_prob, top=1)
        if self.min_forget_prob is not None and self.prob_reduction == "all_positions":
            raise ValueError(
                "`min_forget_prob` watches the mean over an answer's tokens, and "
                "`prob_reduction='all_positions'` dilutes it by the padding: leave one out."
            )
        default_to_cpu(self)
        super().__post_init__()


def check_retain(args: FLATConfig, retain: bool) -> None:
    """Refuse rows to retain without a weight, and a weight without rows; cheap, before any model.

    Raises:
        ValueError: Either.
    """
    if (args.retain_weight > 0) != retain:
        raise ValueError(
            "`retain_weight` and rows to retain (`retain_dataset_name`, `retain_dataset`) go "
            "together: give both, or neither for FLAT on forget data alone. Got retain_weight="
            f"{args.retain_weight:g} and {'rows' if retain else 'no rows'}."
        )


class FLATTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on the FLAT loss, from one forward over templates and answers to forget.

    `train_dataset` has rows of `question` and `answer`, or of `prompt` and `completion`, to forget,
    and perhaps `template`: an answer to learn instead, or a list to draw from. Logs
    `flat/template_prob` and `flat/forget_prob`, P_e and P_f, and `flat/loss`.

    Args:
        templates: Answers to draw from where rows have none of their own, or a function of a row;
            `template_file` or our own list by default.
        retain_dataset: Rows to retain, where `retain_weight` is above 0.

    Raises:
        ValueError: Packing or another loss asked for beside it; rows, templates or retained rows
            that `ForgetRows` refuses; a retain weight without rows, or rows without a weight.
    """

    _tag_names = ["llmmix", "flat"]
    _name = "FLAT"
    _paper = {
        "title": "LLM Unlearning via Loss Adjustment with Only Forget Data",
        "id": "2410.11143",
    }
    loss_is_scaled_for_ga = True  # the loss is divided by the rows of the whole window

    def __init__(
        self,
        model,
        args: FLATConfig | None = None,
        train_dataset=None,
        *,
        templates=None,
        retain_dataset=None,
        **kwargs,
    ):
        args = args or FLATConfig("flat-output")
        check_own_loss("FLAT", args, kwargs)
        check_retain(args, retain_dataset is not None)
        self.parts = ("template", "forget") + ("retain",) * (retain_dataset is not None)
        templates = resolve_templates(args.template_file, templates)
        check_args(args, train_dataset)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        check_unsharded("FLAT", self.accelerator)
        self._prepared = prepare_rows(self, self.parts, retain_dataset, templates)
        keep_outputs_in_fp32(self.accelerator)
        attach_head(self.model)
        self.guard = UnlearningGuard(self, min_forget_prob=args.min_forget_prob)
        self.add_callback(self.guard)

    def _send_telemetry(self):
        """Send nothing: TRL would report the run to the Hub."""

    def evaluate(self, eval_dataset=None, **kwargs):
        """TRL's; rows that are given are prepared as those of the constructor."""
        return super().evaluate(self._prepared(eval_dataset, "eval_dataset"), **kwargs)

    mixture_strata = None  # a mixture draws from all rows alike

    def _get_train_sampler(self, train_dataset=None):
        return epoch_sampler(self)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Count rows and tokens of each part over the accumulation window of every process."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = count_window(self.accelerator, batches, self.parts, device)
        return batches, self._window["forget"][0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """FLAT from one forward of [template; forget; retain]."""
        args, training = self.args, num_items_in_batch is not None
        parts, output = forward_parts(model, inputs, self.parts)
        positions = args.max_length - 1 if args.prob_reduction == "all_positions" else None
        template, forget = (
            sequence_probs(logps, mask, mean=args.mean, positions=positions)
            for logps, mask in (parts["template"], parts["forget"])
        )
        rows = torch.tensor(float(len(forget)), device=forget.device)
        window = self._window if training else count_window(None, [inputs], self.parts, rows.device)
        if training and self.state.global_step < args.template_sft_steps:
            total = nll_loss(*parts["template"]).sum()
        elif args.batch_reduction == "batch_scalar":
            total = rows * flat_loss(template.mean(), forget.mean(), args.divergence)
        else:
            total = flat_loss(template, forget, args.divergence).sum()
        loss = total / window["forget"][0]
        values = {
            "loss": (total, rows),
            "template_prob": (template.sum(), rows),
            "forget_prob": (forget.sum(), rows),
        }
        if "retain" in parts:
            logps, mask = parts["retain"]
            loss = loss - args.retain_weight * logps.sum() / window["retain"][1]
            values["retain_loss"] = (-logps.sum(), mask.sum())
        self.guard.add("flat", values)
        loss = loss * (self.accelerator.num_processes if training else 1)  # DDP averages gradients
        return (loss, output) if return_outputs else loss
