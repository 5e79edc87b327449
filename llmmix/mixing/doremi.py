"""DoReMi: more of the domains where a proxy's loss exceeds the loss of a reference model.

    w_t ~ w_(t-1) exp(eta lambda),      then (1 - c) w_t + c / m

    symbol   name               symbol   name
    m        names              lambda   the signal `excess` (m,)
    c        smoothing          eta      eta

The final model is trained on the average of these weights over the proxy's run
(llmmix/mixing/proxies.py).

Where it is weak: it lowers the worst excess over the reference, not the mean loss, so the weight of
a domain that only the reference could learn grows without end. It depends on the reference, which
must be trained on similar rows first; with the model that the proxy starts from there is hardly any
excess. At eta = 1 and with few rows a batch, the weights follow the noise of the batch, and only
smoothing bounds them. Each update costs a forward pass of the proxy and one of the reference.

Source: Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining"
(arXiv:2305.10429). Recipe: recipes/aioli.py.
"""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer

from llmmix.mixing.checks import Weights, require, require_whole
from llmmix.mixing.controllers import Observation
from llmmix.mixing.proxies import AveragedController, ProxyCallback
from llmmix.mixing.sampler import MixtureSampler
from llmmix.models import load_checkpoint, named_checkpoints


@dataclass
class DoReMiConfig:
    """Options of `DoReMi`; the defaults are those of the paper.

    Raises:
        ValueError: An option is out of its range.
    """

    eta: float = field(default=1.0, metadata={"help": "Size eta of an update."})
    smoothing: float = field(
        default=1e-3,
        metadata={
            "help": "Share c of the mixture that is spread evenly at each update; the paper's "
            "(default of its release: 1e-4)."
        },
    )
    interval: int = field(default=1, metadata={"help": "Steps between updates."})

    def __post_init__(self) -> None:
        require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        require(0 <= self.smoothing < 1, "smoothing", "lie in [0, 1)", self.smoothing)
        require_whole("interval", self.interval)


class DoReMi(AveragedController):
    """Raises a proxy's weight of each domain where its loss exceeds the reference's.

    The final model is trained on `average`. The paper draws domains evenly and weighs their losses;
    here they are drawn by the weights and their losses count alike, which is the same gradient in
    expectation if rows of all domains are equally long. A domain that is absent from the batch, or
    whose excess is not finite, keeps its last lambda. The first lambda is 0, where the release has
    ln(vocabulary), which is not known here.

    Args:
        config: Options of the method.
        names: Names of the m domains.
        targets: Not used.
        weights: (m,) first weights.

    Attributes:
        average: (m,) mean of the weights over the steps.
    """

    method = "DoReMi"
    measure = "excess"
    config: DoReMiConfig
    arrays = (*AveragedController.arrays, "excess")

    def __init__(
        self, config: DoReMiConfig, names: list[str], targets: list[str], weights: Weights
    ):
        super().__init__(config, names, targets, weights)
        self.excess = np.zeros(len(self.names))

    def observe(self, observation: Observation) -> None:
        """Raise the weights by the excess; keep them if no domain's excess is known."""
        excess = self.read(observation, "excess", len(self.names))
        known = np.isfinite(excess)
        self.skipped += bool(np.isinf(excess).any() or not known.any())
        self.excess = np.where(known, excess, self.excess)
        gains = self.config.eta * self.excess if known.any() else None
        self.update(gains, observation.steps)


class DoReMiCallback(ProxyCallback):
    """Moves a sampler's weights by DoReMi while a trainer runs a proxy.

    Args:
        sampler: Sampler of the trainer's rows; its weights are the first ones.
        config: Options of DoReMi.
        reference: Model with the proxy's vocabulary, whose losses are compared with the proxy's. A
            model is frozen, put in eval mode and moved to the trainer's device; a checkpoint
            (safetensors) is loaded in the proxy's precision.
        options: Keyword arguments of `MixtureCallback`.

    Attributes:
        average: Mean of the weights over the steps, by domain; printed when training ends.

    Raises:
        TypeError: `reference` is neither a model nor the name of a checkpoint.
    """

    method = "shares moved by DoReMi, for a proxy"
    paper = (
        "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining",
        "2305.10429",
    )

    def __init__(
        self,
        sampler: MixtureSampler,
        config: DoReMiConfig | None = None,
        *,
        reference: nn.Module | str | Path,
        **options: Any,
    ):
        if not isinstance(reference, nn.Module | str | Path):
            raise TypeError(
                "`reference` must be a model or the name of a checkpoint, got "
                f"{type(reference).__name__}."
            )
        config = DoReMiConfig() if config is None else config
        super().__init__(sampler, functools.partial(DoReMi, config), **options)
        self._reference = reference

    def bind(self, trainer: Trainer) -> None:
        """Bind the trainer, and compare its losses with the reference's.

        Raises:
            ValueError: The reference has another vocabulary, has fewer positions than `max_length`,
                is spread over processes, or shares weights with the model that is trained.
        """
        reference = _load(self._reference, trainer)
        _check_reference(reference, trainer)
        super().bind(trainer)
        if self.signals is not None:  # always so, with a controller
            self.signals.reference = reference.requires_grad_(False).eval().to(trainer.args.device)


def _load(reference: nn.Module | str | Path, trainer: Trainer) -> nn.Module:
    if isinstance(reference, nn.Module):
        return reference
    trained: Any = trainer.model
    (checkpoint,) = named_checkpoints([str(reference)], argument="reference")
    return load_checkpoint(checkpoint, dtype=trained.dtype)


def _check_reference(reference: nn.Module, trainer: Trainer) -> None:
    model: Any = trainer.model
    trained = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in trained for parameter in reference.parameters()):
        raise ValueError(
            "`reference` shares weights with the model that is trained: freezing one would freeze "
            "the other, and there would be no excess. Give a copy made beforehand, or the name of "
            "its checkpoint."
        )
    if any(hasattr(parameter, "ds_id") for parameter in reference.parameters()):
        raise ValueError(
            "`reference` is spread over processes by DeepSpeed ZeRO-3: load it before the training "
            "arguments are made, and pass the model."
        )
    config: Any = reference.config
    theirs, ours = config.get_text_config(), model.config.get_text_config()
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(
            f"`reference` has a vocabulary of {theirs.vocab_size} tokens, and the model that is "
            f"trained one of {ours.vocab_size}: their losses cannot be compared. Give a reference "
            "with the same tokenizer."
        )
    positions = getattr(theirs, "max_position_embeddings", None)
    length = getattr(trainer.args, "max_length", None)
    own = getattr(ours, "max_position_embeddings", None)
    enough = own is None or positions is None or positions >= own  # the trained model's limit holds
    if positions is not None and length is not None and positions < length and not enough:
        raise ValueError(
            f"`reference` has {positions} positions, and a row may have `max_length={length}` "
            f"tokens. Set `max_length` to {positions} at most, or give a reference with more."
        )
