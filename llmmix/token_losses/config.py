"""The settings of `TokenLossTrainer`."""

from dataclasses import dataclass, field
from numbers import Real

from llmmix.padding_free_setting import padding_free_field
from llmmix.token_losses.settings import TokenLossSettings


@dataclass
class TokenLossConfig(TokenLossSettings):
    """TRL's `SFTConfig` with the fields of the token losses, beside those of `TokenLossSettings`.

    Args:
        asft_alpha: Weight of the divergence from the reference in asft.
        psft_clip: How far below and above 1 psft lets the ratio to its snapshot go.
        psft_snapshot_steps: Optimizer steps after which psft renews its snapshot.
        select_share: Share of each row's tokens that select trains on.
        reference_model: Checkpoint that asft and select compare with. None: the model as training
            begins.
    """

    asft_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the divergence from the reference in asft. Default: 0.05."},
    )
    psft_clip: list[float] | None = field(
        default=None,
        metadata={
            "help": "How far below and above 1 psft lets the ratio of a token's probability to "
            "that of its snapshot go: two numbers. Default: 0.2 0.28."
        },
    )
    psft_snapshot_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps after which psft renews its snapshot. Default: 8."},
    )
    select_share: float | None = field(
        default=None,
        metadata={"help": "Share of each row's tokens that select trains on. Default: 0.6."},
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint that asft and select compare with. Default: the model as training "
            "begins."
        },
    )
    padding_free: bool = padding_free_field()

    def __post_init__(self) -> None:
        if self.psft_clip is not None:
            two = isinstance(self.psft_clip, list | tuple) and len(self.psft_clip) == 2
            if not two or not all(isinstance(number, Real) for number in self.psft_clip):
                raise ValueError(
                    "`psft_clip` must be two numbers, how far below and above 1 a ratio may go, "
                    f"got {self.psft_clip}."
                )
            self.psft_clip = list(self.psft_clip)
            if not self.psft_clip[0] < 1:
                raise ValueError(
                    "`psft_clip` must begin with a number below 1, how far a ratio may fall, got "
                    f"{self.psft_clip}."
                )
        super().__post_init__()
        if self.loss_type == "select" and (self.packing or self.eval_packing):
            raise ValueError(
                "`packing=True` merges rows into one, and `loss_type='select'` takes a share of "
                "each row: set `padding_free=True`, which keeps them apart."
            )
