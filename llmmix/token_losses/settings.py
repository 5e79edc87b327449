"""The settings of the token losses that need no other model, for every config that has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from llmmix.token_losses.loss_table import LOSSES
from llmmix.token_losses.weights import KEEPS
from llmmix.trainers import default_to_cpu
from llmmix.training.ranges import check_settings


@dataclass
class TokenLossSettings(SFTConfig):
    """TRL's `SFTConfig` with the choice of a token loss, and its settings.

    A setting that is left at None takes the value of the loss's row in `LOSSES`; one that belongs
    to another loss is refused.

    Args:
        loss_type: Name of the loss.
        gce_q: q of gce, and of the loss that threshold keeps: 0 is -log p, 1 is 1 - p. Default .7
            for gce, 0 for threshold.
        threshold_p: Probability at the border of threshold.
        threshold_keep: `"top"` keeps tokens at or above it, `"bottom"` those at or below.
        eaft_alpha: Power of eaft's gate.
        eaft_top_k: Number of most likely tokens whose entropy is eaft's gate; 0 for all.
        focal_gamma: gamma of focal.
        label_smoothing_factor: The share of label_smoothing that goes to all tokens alike.
        gem_beta: Temperature of gem.
    """

    loss_type: str = field(
        default="nll",
        metadata={"help": "Loss of a token; nll is cross-entropy.", "choices": list(LOSSES)},
    )
    gce_q: float | None = field(
        default=None,
        metadata={
            "help": "q of gce, whose weight is p^q, and of what threshold keeps: 0 is -log p, 1 is "
            "1 - p. Default: 0.7 for gce, 0 for threshold."
        },
    )
    threshold_p: float | None = field(
        default=None,
        metadata={"help": "Probability at the border of threshold. Default: 0.1."},
    )
    threshold_keep: str | None = field(
        default=None,
        metadata={
            "help": "Tokens that threshold trains on: at or above the border (top, the default), "
            "or at or below it (bottom)."
        },
    )
    eaft_alpha: float | None = field(
        default=None, metadata={"help": "Power of eaft's gate. Default: 1."}
    )
    eaft_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Number of most likely tokens whose entropy is eaft's gate; 0 for all. "
            "Default: 20."
        },
    )
    focal_gamma: float | None = field(
        default=None, metadata={"help": "gamma of focal. Default: 2."}
    )
    # TRL's, which smooths the labels of nll by a second forward
    label_smoothing_factor: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Share of label_smoothing that goes to all tokens alike. Default: 0.1."},
    )
    gem_beta: float | None = field(
        default=None, metadata={"help": "Temperature of gem. Default: 0.7."}
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self.loss_type = self.loss_type.strip().lower().replace("-", "_")
        if self.loss_type not in LOSSES:
            raise ValueError(
                f"`loss_type` must be one of {', '.join(LOSSES)}, got {self.loss_type!r}."
            )
        self._check_owners()
        for name, value in LOSSES[self.loss_type].settings.items():
            if getattr(self, name, value) is None:
                setattr(self, name, list(value) if isinstance(value, tuple) else value)
        if self.label_smoothing_factor is None:
            self.label_smoothing_factor = 0.0
        if self.threshold_keep not in (None, *KEEPS):
            raise ValueError(
                f"`threshold_keep` must be 'top' or 'bottom', got {self.threshold_keep!r}."
            )
        default_to_cpu(self)
        super().__post_init__()

    def _check_owners(self) -> None:
        """Refuse a setting of another loss."""
        owners: dict[str, list[str]] = {}
        for loss_type, loss in LOSSES.items():
            for name in loss.settings:
                owners.setdefault(name, []).append(loss_type)
        unset: dict[str, Any] = {"label_smoothing_factor": 0.0}  # TRL's default
        for name, losses in owners.items():
            value = getattr(self, name, None)
            if self.loss_type in losses or value is None or value == unset.get(name):
                continue
            raise ValueError(
                f"`{name}` is a setting of {' and '.join(losses)}, and `loss_type` is "
                f"{self.loss_type!r}: leave it out, or set `loss_type` to {losses[0]!r}."
            )


def check_alone(args: TokenLossSettings, method: str) -> None:
    """Refuse a loss that compares with another model, in a method that runs one.

    Raises:
        ValueError: The config's loss does.
    """
    if LOSSES[args.loss_type].reference:
        others = [name for name, loss in LOSSES.items() if not loss.reference]
        raise ValueError(
            f"`loss_type={args.loss_type!r}` compares with another model, and {method} has none: "
            f"use one of {', '.join(others)}, or train with `TokenLossTrainer`."
        )


@contextmanager
def nll_for_trl(args: SFTConfig) -> Iterator[None]:
    """While TRL reads its settings: it knows no other loss, and smooths labels by a second forward.

    Args:
        args: The trainer's settings; `loss_type` and `label_smoothing_factor` are TRL's defaults
            for the time.
    """
    given = args.loss_type, args.label_smoothing_factor
    args.loss_type, args.label_smoothing_factor = "nll", 0.0
    try:
        yield
    finally:
        args.loss_type, args.label_smoothing_factor = given
