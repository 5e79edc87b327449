"""Attention within each of the sequences that stand in one row, one behind the other.

Under a mask the row would pay (sum of lengths)^2; by segments it pays the sum of length^2.

Models of transformers look their attention up by its name and hand the arguments of their forward
on to it. `segments=` among these asks for the attention here, in the place of "sdpa"; a call
without it goes to what stands under that name. An argument goes wherever the call goes: gradient
checkpointing runs a layer again in the backward, with the arguments that it had.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

try:
    from torch.nn.attention import varlen
except ImportError:  # torch < 2.10
    varlen = None  # type: ignore[assignment]

# The name of transformers under which the attention here is found
NAME = "sdpa"
# What a call of "sdpa" may ask for and the attention here does not do
FOREIGN = ("softcap", "position_bias", "cache", "s_aux")


class Segments:
    """Where each sequence of a row begins and ends.

    Args:
        lengths: Tokens of each sequence, none of them 0.
        device: Where the row is.

    Attributes:
        lengths: As given.
        longest: The largest of them.
        bounds: (S+1,) int32; sequence s is the tokens from bounds[s] to bounds[s+1].
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths, self.longest = lengths, max(lengths)
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds = bounds.to(device, non_blocking=True)
        self._bands: dict[tuple[int, int, torch.device], Tensor] = {}

    def band(self, length: int, window: int, device: torch.device) -> Tensor:
        """The causal mask (length, length) in which a token sees the last `window`, itself too."""
        key = (length, window, device)
        if key not in self._bands:
            ones = torch.ones(length, length, dtype=torch.bool, device=device)
            self._bands[key] = ones.tril() & ones.triu(1 - window)
        return self._bands[key]


def no_mask(device: torch.device) -> Tensor:
    """A mask (1, 1, 0, 0) for models to hand on: they build none, and nothing can be masked by it.

    An attention that does not know `segments=` fails on it, and does not mix sequences in silence.
    """
    return torch.empty(1, 1, 0, 0, device=device)


def serve_segments() -> None:
    """Let models whose attention is "sdpa" take `segments=`. Doing so again changes nothing."""
    interface = AttentionInterface()
    own = interface[NAME]
    if not hasattr(own, "serves_segments"):
        AttentionInterface.register(NAME, _serving(own))


def _serving(own: Callable) -> Callable:
    @functools.wraps(own)
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if segments is None:
            return own(module, query, key, value, attention_mask, *args, **kwargs)
        _check_plain(module, kwargs)
        dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
        return attend(query, key, value, segments, _window(module, kwargs), scale, dropout), None

    attention.serves_segments = True  # type: ignore[attr-defined]
    return attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of each sequence of a row to itself.

    Args:
        query: (1, heads, N, D).
        key: (1, groups, N, D), of a number of groups that divides that of the heads.
        value: (1, groups, N, E).
        segments: The sequences, N tokens together.
        window: Tokens that a token sees, itself too; None for all before it.
        scale: Factor of the scores; None for 1 / sqrt(D).
        dropout: Share of the attention that is dropped.

    Returns:
        (1, N, heads, E).
    """
    if _fits_varlen(query, value, dropout):
        return _by_varlen(query, key, value, segments, window, scale)
    grouped = query.size(1) != key.size(1)
    parts = zip(
        segments.lengths,
        *(x.split(segments.lengths, dim=2) for x in (query, key, value)),
        strict=True,
    )  # split, not sliced: the backward of a slice fills the whole row with zeros
    seen = []
    for length, q, k, v in parts:
        mask = None
        if window is not None and window < length:
            mask = segments.band(length, window, q.device)
        seen.append(
            scaled_dot_product_attention(
                *(q, k, v, mask, dropout),
                is_causal=mask is None,
                scale=scale,
                enable_gqa=grouped,
            ).transpose(1, 2)
        )
    return torch.cat(seen, dim=1)


def _by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    scale: float | None,
) -> Tensor:
    dtype = _kernel_dtype(query)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    bounds, longest = segments.bounds.to(q.device), segments.longest
    out: Any = varlen.varlen_attn(
        *(q, k, v, bounds, bounds, longest, longest),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.size(1) != k.size(1),
    )
    return out.unsqueeze(0)


def _fits_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel of torch for sequences of varied lengths can serve a call."""
    return (
        query.is_cuda
        and _varlen_has_all()
        and dropout == 0
        and _kernel_dtype(query) in (torch.float16, torch.bfloat16)
        and query.size(-1) == value.size(-1) <= 256
        and query.size(-1) % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@functools.cache
def _varlen_has_all() -> bool:
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen is not None and needed <= set(inspect.signature(varlen.varlen_attn).parameters)


def _kernel_dtype(query: Tensor) -> torch.dtype:
    """The dtype that autocast would have sdpa compute in, which does not know of the kernel."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _check_plain(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse an attention that is more than causal, scaled and within a window.

    Raises:
        ValueError: It has a softcap, a bias, or sees tokens to come.
    """
    found = [name for name in FOREIGN if kwargs.get(name) is not None]
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        found.append("tokens to come")
    if found:
        raise ValueError(f"{type(module).__name__} attends with {', '.join(found)}.")


def _window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The window of an attention, which the model's mask would have had too.

    Raises:
        ValueError: The model's config has another window for it, or none.
    """
    given = kwargs.get("sliding_window")
    config = getattr(module, "config", None)
    expected = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kind = kinds[module.layer_idx] if hasattr(module, "layer_idx") else None
        known = kind in ("full_attention", "sliding_attention")
        expected = expected if kind == "sliding_attention" else None
    else:
        known = getattr(config, "attention_chunk_size", None) is None
    if not known or given != expected:
        raise ValueError(
            f"{type(module).__name__} attends within a window of {given}, its config says "
            f"{expected if known else kinds}."
        )
    return given
