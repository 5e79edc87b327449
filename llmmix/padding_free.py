"""A padded batch without its padding: one row, in which each sequence sees itself alone.

Everything outside of the backbone keeps the rows of the batch: labels, pairs, references, metrics.

    symbol   shape
    kept     (B, T)      true at the tokens of the batch, on either side of the padding
    row      (1, N)      its N tokens, one sequence behind the other

A token counts its position from the first of its sequence. A label whose token before is padding
has no hidden state that could predict it, and is not scored: the first token of a row that is
padded on the left and has no prompt.

Ways through the backbone, the first that answers as a padded batch does:

    segments   attention by segments (`llmmix.segment_attention`), for "sdpa"
    flash      flash attention's own kernel for sequences of varied lengths
    positions  the model builds its mask (N, N) from the positions
    masks      it is given that mask, if it does not look at the positions

The last two are right and no faster than a padded batch, flex attention excepted, whose mask is of
blocks.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import is_peft_available

from llmmix.head_check import difference, probe
from llmmix.segment_attention import NAME, Segments, no_mask, serve_segments

logger = logging.getLogger(__name__)

SEGMENTS, FLASH, POSITIONS, MASKS = "segments", "flash", "positions", "masks"
# What a batch may bring that says where its tokens stand: it is run as it came
PLACED = ("position_ids", "cache_position", "past_key_values")
# Kinds of layers that see other tokens through a mask alone, or see none
PLAIN = {"full_attention", "sliding_attention", "attention", "moe", "mlp"}
# Lengths of the rows, padded on the right, on which the ways are compared with a padded batch
LENGTHS = (9, 4, 6)


def check_padding_free(model: Any) -> None:
    """Refuse a model that cannot run without padding, by what its class and its config say.

    `attach_head(model, padding_free=True)` also compares the model with itself on a padded batch.

    Args:
        model: A causal language model, or a `PeftModel` around one.

    Raises:
        ValueError: The model takes no position ids, has layers that are not plain attention, reads
            more than tokens, is split over tensor-parallel ranks, or has a prompt that PEFT learns.
    """
    base = model
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            base = model.get_base_model()
            if any(config.is_prompt_learning for config in model.peft_config.values()):
                _refuse(model, "puts the virtual tokens of an adapter before each row")
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if "chunked_attention" in kinds:  # longer than any batch that it could be compared on
        _refuse(base, "attends within chunks, which would not begin with each row")
    if odd := kinds - PLAIN or ({"state"} if base._is_stateful and not kinds else set()):
        _refuse(
            base,
            f"has layers that are not plain attention ({', '.join(sorted(odd))}) and go on from "
            "one row to the next",
        )
    if text is not base.config:
        _refuse(base, "reads more than tokens, whose places are those of a padded batch")
    if "position_ids" not in inspect.signature(type(backbone_of(base)).forward).parameters:
        _refuse(base, "takes no `position_ids`, and would count on from one row to the next")
    if (getattr(base, "tp_size", None) or 1) > 1:
        _refuse(base, "is split over tensor-parallel ranks")


def runs_without_padding(model: Any) -> bool:
    """Whether `check_padding_free` takes a model."""
    try:
        check_padding_free(model)
    except ValueError:
        return False
    return True


def _refuse(model: nn.Module, why: str) -> NoReturn:
    raise ValueError(
        f"`padding_free=True` joins the rows of a batch, and {type(model).__name__} {why}. Set it "
        'to False; `train_sampling_strategy="group_by_length"` saves most of the padding.'
    )


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that gives its hidden states."""
    base: Any = model.base_model
    # Its name is that of another class's, as in the text models of some others
    return getattr(model, "model", model) if base is model else base


class PaddingFree:
    """How a model runs without padding, found by comparing it with itself on a padded batch.

    Args:
        model: The model that the head is attached to, or a `PeftModel` around it.

    Raises:
        ValueError: `check_padding_free` refuses the model.
    """

    def __init__(self, model: nn.Module):
        check_padding_free(model)
        self._ways: dict[tuple[str, torch.dtype | None], str] = {}
        self._trying: str | None = None

    def settle(
        self, model: PreTrainedModel, fused_forward: Callable[..., Any], attaching: bool
    ) -> None:
        """Find the way for the model's attention, once for each precision. The weights are there.

        Args:
            model: The model.
            fused_forward: A function (outputs, memory_budget, objective, padding_free=, **inputs)
                that answers with a `FusedHeadOutput`.
            attaching: Whether it is no call of the model yet. What then cannot run, such as flash
                attention before autocast is on, is tried again at the first call.

        Raises:
            ValueError: The model does not answer alike without padding, or cannot be asked.
        """
        setting = _setting(model)
        if setting in self._ways:
            return
        name = setting[0]
        batch = _padded_batch(model)
        try:
            expected = probe(model, batch, fused_forward)
        except Exception as error:  # whatever the model needs beside tokens
            if attaching:
                return
            _refuse(model, f"cannot run on tokens alone ({error})")
        failures: list[str] = []
        for way in _ways(name):
            failure = self._try(way, model, batch, expected, fused_forward)
            if failure is None:
                self._ways[setting] = way
                if way in (POSITIONS, MASKS) and name != "flex_attention":
                    _say_dense(model, failures[0] if name == NAME else f"it is {name!r}")
                return
            failures.append(failure)
        _refuse(model, f"does not answer alike without padding ({failures[-1]})")

    def _try(
        self,
        way: str,
        model: PreTrainedModel,
        batch: dict[str, Tensor],
        expected: Any,
        fused_forward: Callable[..., Any],
    ) -> str | None:
        """What comes of a way: None, or why it is not one for the model."""
        self._trying = way
        try:
            found = probe(model, batch, functools.partial(fused_forward, padding_free=self))
        except Exception as error:  # whatever the model makes of what it does not know
            return f"{type(error).__name__}: {error}".rstrip(".")
        finally:
            self._trying = None
        return difference(model, expected, found)

    def row(self, model: PreTrainedModel, args: tuple, inputs: dict[str, Any]) -> "TokenRow | None":
        """The tokens of a batch as one row; None for a batch that is to run as it came.

        It runs as it came without padding, without a token, with a cache or positions of its own,
        with padding between its tokens, or if it is given by place and not by name. A row that
        packs sequences, with positions and without a mask, is one already. The device is waited for
        once.
        """
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if args:
            return None
        if mask is None:
            tokens = None if positions is None else Tokens.packed(positions)
        elif not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        elif placed := [name for name in PLACED if inputs.get(name) is not None]:
            log_once(f"`padding_free`: batches with `{placed[0]}` keep their padding.")
            return None
        else:
            tokens = Tokens.kept_by(mask)
        way = self._trying or self._ways[_setting(model)]
        return None if tokens is None else TokenRow(model, tokens, way, inputs)


class Tokens(NamedTuple):
    """Where the tokens of a batch stand; on the CPU.

    Attributes:
        kept: (B, T); true at the tokens.
        positions: (N,); the position of each in its sequence.
        lengths: Tokens of each sequence, N together.
    """

    kept: Tensor
    positions: Tensor
    lengths: list[int]

    @classmethod
    def kept_by(cls, mask: Tensor) -> "Tokens | None":
        """Those of a mask (B, T); None without padding, without a token, or with holes."""
        kept = (mask != 0).cpu()
        begins = torch.cat([kept[:, :1], kept[:, 1:] & ~kept[:, :-1]], dim=1)
        if kept.all() or not kept.any() or (begins.sum(1) > 1).any():
            return None
        lengths = [length for length in kept.sum(1).tolist() if length]
        return cls(kept, (kept.cumsum(1) - 1)[kept], lengths)

    @classmethod
    def packed(cls, positions: Tensor) -> "Tokens | None":
        """Those of a row of sequences, from their positions (1, N); None if it is one sequence."""
        if positions.size(0) != 1:
            return None
        positions = positions.cpu()
        begins = (positions[0].diff() != 1).nonzero().squeeze(1) + 1
        if not len(begins):
            return None
        bounds = torch.cat([begins.new_zeros(1), begins, begins.new_tensor([positions.size(1)])])
        return cls(
            torch.ones_like(positions, dtype=torch.bool), positions[0], bounds.diff().tolist()
        )


class TokenRow:
    """The tokens of a batch, one sequence behind the other.

    Args:
        model: The model that is to run on them.
        tokens: Where they stand in the batch.
        way: One of the ways through the backbone.
        inputs: What the model was called with.

    Attributes:
        inputs: What its backbone is to be called with.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tokens, way: str, inputs: dict[str, Any]):
        inputs = embedded(model, inputs)
        given = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else None
        device = (inputs["inputs_embeds"] if given is None else given).device
        self._kept = tokens.kept
        self._places = tokens.kept.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        rest = {k: x for k, x in inputs.items() if k not in ("attention_mask", "position_ids")}
        self.inputs: dict[str, Any] = {
            **{name: self._flat(x) for name, x in rest.items()},
            "position_ids": tokens.positions.to(device, non_blocking=True).unsqueeze(0),
        }
        if way == SEGMENTS:
            serve_segments()
            segments = Segments(tokens.lengths, device)
            self.inputs |= {"segments": segments, "attention_mask": no_mask(device)}
        elif way == FLASH:
            segments = Segments(tokens.lengths, device)
            for side in "qk":
                self.inputs[f"cu_seq_lens_{side}"] = segments.bounds
                self.inputs[f"max_length_{side}"] = segments.longest
        elif way == MASKS:
            shape = torch.empty(1, len(self._places), 0, dtype=model.dtype, device=device)
            self.inputs["attention_mask"] = create_masks_for_generate(
                config=model.config.get_text_config(),
                inputs_embeds=shape,
                attention_mask=None,
                past_key_values=None,
                position_ids=self.inputs["position_ids"],
            )

    def _flat(self, x: Any) -> Any:
        """Of what has a value for each position, (B, T, ...), the tokens' as (1, N, ...)."""
        if not isinstance(x, Tensor) or x.shape[:2] != self._kept.shape:
            return x
        return x.flatten(0, 1).index_select(0, self._places.to(x.device)).unsqueeze(0)

    def padded(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, H) from those of the tokens alone (1, N, H); zero at the padding."""
        rows, length = self._kept.shape
        padded = hidden.new_zeros(rows * length, hidden.size(-1))
        padded = padded.index_copy(0, self._places.to(hidden.device), hidden[0])
        return padded.view(rows, length, -1)

    def predicted(self, labels: Tensor) -> Tensor:
        """Labels (B, T) or (B, T-1), each that of the token after; -100 where there is no token."""
        kept = self._kept[:, : labels.size(1)].to(labels.device, non_blocking=True)
        return labels.masked_fill(~kept, -100)


def embedded(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, embedded if NEFTune adds noise: it scales the noise by the length of a row."""
    embeddings: Any = model.get_input_embeddings()
    noisy = embeddings.training and getattr(embeddings, "neftune_noise_alpha", None) is not None
    if not noisy or inputs.get("input_ids") is None:
        return inputs
    return {**inputs, "input_ids": None, "inputs_embeds": embeddings(inputs["input_ids"])}


def _setting(model: PreTrainedModel) -> tuple[str, torch.dtype | None]:
    """The name of the model's attention, and the dtype of autocast: kernels differ by both."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return model.config.get_text_config()._attn_implementation or "eager", dtype


def _ways(name: str) -> tuple[str, ...]:
    """The ways to try for an attention, the fastest first."""
    if "flash" in name:
        return (FLASH,)
    return ((SEGMENTS,) if name == NAME else ()) + (POSITIONS, MASKS)


@functools.cache
def log_once(message: str) -> None:
    """Log a warning, once a process: asking which process is the main one would settle how many."""
    logger.warning(message)


def _say_dense(model: PreTrainedModel, why: str) -> None:
    log_once(
        f"`padding_free`: the attention of {type(model).__name__} does not run by segments "
        f"({why}). It runs under a dense mask, which is right and hardly faster than a padded "
        "batch."
    )


def _padded_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
