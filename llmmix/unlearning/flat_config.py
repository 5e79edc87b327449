"""The settings of `FLATTrainer`, and what it refuses before any model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmmix.training.ranges import check_settings
from llmmix.unlearning.divergences import DIVERGENCES, check_divergence
from llmmix.unlearning.preparation import ForgetConfig, check_not_negative


@dataclass
class FLATConfig(ForgetConfig):
    """TRL's `SFTConfig` with the fields of FLAT, beside those of `ForgetConfig`.

    Args:
        divergence: Which f-divergence between template and forget answers is maximized.
        mean: Mean of an answer's token probabilities: `"arithmetic"` (the paper) or `"geometric"`.
        prob_reduction: `"token_mean"` over the answer's tokens; `"all_positions"` over
            `max_length - 1`, as the released code.
        batch_reduction: `"per_sequence"`: the mean of the losses; `"batch_scalar"`: the loss of the
            mean probabilities of a micro-batch, as the released code. The latter depends on how a
            batch is split.
        template_sft_steps: Optimizer steps of plain cross-entropy on the templates at the start,
            for a model that finds them all but impossible: P_e has no gradient there.
        retain_weight: Weight of the cross-entropy on retained rows, where such are given. 0 is
            FLAT.
    """

    divergence: str = field(
        default="js",
        metadata={
            "help": f"f-divergence to maximize: one of {', '.join(DIVERGENCES)}, or its name in "
            "the released code."
        },
    )
    mean: str = field(
        default="arithmetic",
        metadata={
            "help": "Mean of an answer's token probabilities: 'arithmetic' (the paper) or "
            "'geometric'."
        },
    )
    prob_reduction: str = field(
        default="token_mean",
        metadata={
            "help": "What an answer's probability is divided by: 'token_mean', its tokens, or "
            "'all_positions', max_length - 1, as the released code."
        },
    )
    batch_reduction: str = field(
        default="per_sequence",
        metadata={
            "help": "'per_sequence': the mean of the losses; 'batch_scalar': the loss of the mean "
            "probabilities, as the released code."
        },
    )
    template_sft_steps: int = field(
        default=0,
        metadata={"help": "Steps of cross-entropy on the template answers at the start."},
    )
    retain_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on retained rows; 0 is FLAT."}
    )

    def __post_init__(self) -> None:
        check_settings(self)
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
        check_not_negative(self, ("template_sft_steps", "retain_weight"))
        if self.min_forget_prob is not None and self.prob_reduction == "all_positions":
            raise ValueError(
                "`min_forget_prob` watches the mean over an answer's tokens, and "
                "`prob_reduction='all_positions'` dilutes it by the padding: leave one out."
            )
        super().__post_init__()

    @property
    def unweighted(self) -> Mapping[str, str]:
        """Rows that may have no `weight`, and why."""
        if self.batch_reduction == "per_sequence":
            return {}
        why = "`batch_reduction='batch_scalar'` has one loss for a batch, not one a row."
        return {"forget": f"{why} Set it to 'per_sequence'"}


def check_retain(args: FLATConfig, retain: bool) -> None:
    """Refuse rows to retain without a weight, and a weight without rows.

    It needs no model, so that a mistake shows before one is loaded.

    Raises:
        ValueError: There is a weight and there are no rows, or rows and no weight.
    """
    if (args.retain_weight > 0) != retain:
        raise ValueError(
            "`retain_weight` and rows to retain (`retain_dataset_name`, `retain_dataset`) go "
            "together: give both, or neither for FLAT on forget data alone. Got retain_weight="
            f"{args.retain_weight:g} and {'rows' if retain else 'no rows'}."
        )
