"""DoReMi and DoGE: the average of the weights that a small proxy is trained on is the answer.

    DoReMi   w_t ~ w_(t-1) exp(eta lambda),     then (1 - c) w_t + c / m     arXiv:2305.10429
    DoGE     w_t ~ w_(t-1) exp(score / mu),     then the same                arXiv:2310.15393
             score_j = lr sum_i <g_j, g_i> / (mean |g| + 1e-6), within [lr dw_min, lr dw_max]

    symbol   name                               symbol   name
    m        names                              lambda   the signal `excess` (m,)
    c        smoothing                          <>, |g|  the signal `gradients`

Both suppose that what is right for the proxy is right for the final model, and that the average
over a run is worth more than where it ends; the papers show it for pretraining from scratch.

DoReMi goes for the worst excess over the reference, not for the mean loss: a domain that only the
reference could learn draws weight without end. All rests on the reference, which is to be trained
on like rows first; with the model that the proxy starts from there is next to no excess. At eta = 1
and with few rows a batch the weights follow its noise, and smoothing alone bounds them. Each update
costs a forward of the proxy and one of the reference.

DoGE's targets are the domains themselves. A domain's gradient is also compared with itself, on the
same few rows, so that noise raises a score as use does. With the published bound of 0 a domain that
harms is no worse off than a useless one; scores scale with the learning rate, and weights freeze as
it decays. The release clips each gradient first; here, where norms exceed `dw_max`, all scores sit
at the bound and nothing moves: raise it. Each update costs m backward passes and holds m gradients.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.controllers import Observation
from llmmix.mixing.online import (
    OnlineController,
    log_normalize,
    log_of,
    option,
    require,
    require_whole,
)
from llmmix.mixing.sampler import MixtureSampler
from llmmix.models import resolve_checkpoint


def reweigh(log_weights: np.ndarray, gains: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """The step of DoReMi and DoGE in logs: w ~ w exp(gains), then (1 - c) w + c / m, (m,)."""
    log_weights = log_normalize(log_weights + gains)
    if smoothing == 0:
        return log_weights
    return np.logaddexp(
        log_weights + math.log1p(-smoothing), math.log(smoothing / len(log_weights))
    )


def doge_scores(products, norms, learning_rate: float, dw_min=0.0, dw_max=5.0) -> np.ndarray:
    """DoGE's score_j = lr sum_i <g_j, g_i> / (mean |g| + 1e-6), within [lr dw_min, lr dw_max].

    With the published bound of 0 below, a domain that harms the targets scores as one that is
    useless. The bounds shrink with the rate: as it decays the weights freeze.

    Args:
        products: (m, n) inner products of the domains' gradients with the targets'.
        norms: (m,) of the domains' gradients.
        learning_rate: Of the step.
        dw_min: Lower bound, in learning rates.
        dw_max: Upper bound.

    Returns:
        (m,).
    """
    scores = learning_rate * products.sum(1) / (norms.mean() + 1e-6)
    return np.clip(scores, learning_rate * dw_min, learning_rate * dw_max)


class _Averaged(OnlineController):
    """Whose answer is the mean of the weights over the steps, `average` (m,), not the last ones."""

    last_counts = True
    kept = (*OnlineController.kept, "log_weights", "average", "averaged_steps")

    def __init__(self, config, names: list[str], targets: list[str], weights):
        super().__init__(config, names, targets, weights)
        self.log_weights, self.average = log_of(self.weights), self.weights.copy()
        self.averaged_steps = 0

    def update(self, gains: np.ndarray | None, steps: int) -> None:
        """Take a step, or keep the weights if there are no gains; average in either case."""
        if gains is not None:
            self.log_weights = reweigh(self.log_weights, gains, self.config.smoothing)
            self.weights = np.exp(self.log_weights)
        self.averaged_steps += steps
        self.average = self.average + (self.weights - self.average) * (steps / self.averaged_steps)

    def record(self) -> dict:
        """The average so far, and how many observations were not finite."""
        return {"average": self.average.tolist(), **super().record()}


@dataclass
class DoReMiConfig:
    """Of `DoReMi`; the paper's values."""

    eta: float = option(1.0, "eta, the size of a step by the excess loss.")
    smoothing: float = option(1e-3, "c, the share spread evenly at each step; the release: 1e-4.")
    interval: int = option(1, "Steps between updates.")

    def __post_init__(self):
        require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        require(0 <= self.smoothing < 1, "smoothing", "lie in [0, 1)", self.smoothing)
        require_whole("interval", self.interval)


class DoReMi(_Averaged):
    """A proxy's weights rise where its loss exceeds a reference's.

    `average` is what the final model is trained on. The paper draws domains evenly and weighs their
    losses; here they are drawn by the weights and weigh the same, which is the same gradient in
    expectation where rows of all domains are equally long. A domain that is absent from the batch,
    or whose excess is not finite, keeps its last lambda; before its first that is 0, for the
    release's ln(vocabulary) is not known here.

    Args:
        config: Its options.
        names: Of the m domains.
        targets: Not needed.
        weights: (m,) the first ones.
    """

    measure = "excess"
    kept = (*_Averaged.kept, "excess")

    def __init__(self, config: DoReMiConfig, names: list[str], targets: list[str], weights):
        super().__init__(config, names, targets, weights)
        self.excess = np.zeros(len(self.names))

    def observe(self, observation: Observation) -> None:
        """Raise the weights by the excess; they stand if it is known of no domain."""
        excess = self.read(observation, "excess", len(self.names))
        known = np.isfinite(excess)
        self.skipped += bool(np.isinf(excess).any() or not known.any())
        self.excess = np.where(known, excess, self.excess)
        gains = self.config.eta * self.excess if known.any() else None
        self.update(gains, observation.steps)


@dataclass
class DoGEConfig:
    """Of `DoGE`; the defaults of its release."""

    mu: float = option(0.05, "mu, temperature of a step; smaller is spikier (its scripts: 0.01).")
    smoothing: float = option(0.0, "c, the share spread evenly at each step.")
    dw_min: float = option(0.0, "Lower bound of a score, in learning rates.")
    dw_max: float = option(5.0, "Upper bound of a score, in learning rates.")
    max_grad_norm: float = option(1.0, "Norm that each gradient is clipped to; the release: 5.")
    interval: int = option(1, "Steps between updates.")

    def __post_init__(self):
        require(0 < self.mu < math.inf, "mu", "be positive", self.mu)
        require(0 <= self.smoothing < 1, "smoothing", "lie in [0, 1)", self.smoothing)
        require(self.dw_min < self.dw_max, "dw_max", f"exceed dw_min={self.dw_min}", self.dw_max)
        require_whole("interval", self.interval)


class DoGE(_Averaged):
    """A proxy's weights rise where a domain's gradient agrees with the targets'.

    `average` is what the final model is trained on. The learning rate of a score is the mean over
    the steps since the last update.

    Args:
        config: Its options.
        names: Of the m domains.
        targets: Not needed: what the gradients are compared with is the measurement's choice.
        weights: (m,) the first ones.
    """

    measure = "gradients"

    def observe(self, observation: Observation) -> None:
        """Raise the weights by the scores; they stand if a signal is not finite or all are zero."""
        products = np.asarray(observation.signal["products"], dtype=np.float64)
        products = self.read(observation, "products", len(self.names), *products.shape[-1:])
        norms = self.read(observation, "norms", len(self.names))
        rate = observation.learning_rate / observation.steps
        finite = np.isfinite(products).all() and np.isfinite(norms).all() and math.isfinite(rate)
        self.skipped += not finite
        gains = None
        if finite and products.any():
            config = self.config
            # As if each gradient had been clipped before
            kept = np.minimum(1.0, config.max_grad_norm / np.maximum(norms, 1e-12))
            if products.shape[1] == len(kept):
                products = products * kept[None]
            products, norms = products * kept[:, None], norms * kept
            gains = doge_scores(products, norms, rate, config.dw_min, config.dw_max) / config.mu
        self.update(gains, observation.steps)


class _ProxyCallback(MixtureCallback):
    """Says the average of the weights when training ends."""

    measures_losses = False

    @property
    def average(self) -> dict[str, float]:
        """The mean of the weights over the steps so far, by domain: the method's answer."""
        return dict(zip(self.sampler.names, self.controller.average.tolist(), strict=True))

    def on_train_end(self, args, state, control, **kwargs):
        """Say the answer, after what every mixture says."""
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            shares = ", ".join(f"{name} {share:.4f}" for name, share in self.average.items())
            print(f"Average of the weights, to train the final model on: {shares}.", flush=True)


class DoReMiCallback(_ProxyCallback):
    """Moves a sampler's weights by DoReMi while a trainer runs a proxy.

    Args:
        sampler: Of the trainer's rows; its weights are the first ones.
        config: Of DoReMi.
        reference: What the proxy's losses are compared with: a model of the same tokens, which is
            frozen, put in eval mode and moved to the trainer's device, or the checkpoint of one
            (safetensors), loaded in the precision of the proxy.
        options: As those of `MixtureCallback`.

    Attributes:
        average: The answer, by domain; printed when training ends.

    Raises:
        TypeError: `reference` is neither.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        config: DoReMiConfig | None = None,
        *,
        reference: nn.Module | str | Path,
        **options,
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
        """Take over a trainer's rows, and have its losses compared with the reference's.

        Raises:
            ValueError: A reference of another vocabulary, with fewer positions than a row may have,
                or that is the model to be trained.
        """
        reference = _load(self._reference, trainer)
        _check_reference(reference, trainer)
        super().bind(trainer)
        self.signals.reference = reference.requires_grad_(False).eval().to(trainer.args.device)


def _load(reference: nn.Module | str | Path, trainer: Trainer) -> nn.Module:
    if isinstance(reference, nn.Module):
        return reference
    return AutoModelForCausalLM.from_pretrained(
        resolve_checkpoint(str(reference)), dtype=trainer.model.dtype, use_safetensors=True
    )


def _check_reference(reference: nn.Module, trainer: Trainer) -> None:
    trained = {id(parameter) for parameter in trainer.model.parameters()}
    if any(id(parameter) in trained for parameter in reference.parameters()):
        raise ValueError(
            "`reference` shares weights with the model that is trained: it would be frozen with it "
            "and there would be no excess. Give a copy made before, or the name of its checkpoint."
        )
    if any(hasattr(parameter, "ds_id") for parameter in reference.parameters()):
        raise ValueError(
            "`reference` is spread over processes by DeepSpeed ZeRO-3: load it before the training "
            "arguments are made, and give the model."
        )
    theirs, ours = (model.config.get_text_config() for model in (reference, trainer.model))
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(
            f"`reference` has a vocabulary of {theirs.vocab_size} tokens, and the model that is "
            f"trained one of {ours.vocab_size}: their losses do not compare. Give a reference of "
            "the same tokenizer."
        )
    positions = getattr(theirs, "max_position_embeddings", None)
    length = getattr(trainer.args, "max_length", None)
    own = getattr(ours, "max_position_embeddings", None)
    enough = own is None or positions is None or positions >= own  # the model's own limit holds too
    if positions is not None and length is not None and positions < length and not enough:
        raise ValueError(
            f"`reference` has {positions} positions, and a row may have `max_length={length}` "
            f"tokens. Set `max_length` to {positions} at most, or give a reference with more."
        )


class DoGECallback(_ProxyCallback):
    """Moves a sampler's weights by DoGE while a trainer runs a proxy.

    The targets are the domains themselves: gradients are of training rows, as many of each domain
    as a step has, drawn anew for each update. Parameters must be whole on every process.

    Args:
        sampler: Of the trainer's rows; its weights are the first ones.
        config: Of DoGE.
        options: As those of `MixtureCallback`.

    Attributes:
        average: The answer, by domain; printed when training ends.
    """

    def __init__(self, sampler: MixtureSampler, config: DoGEConfig | None = None, **options):
        config = DoGEConfig() if config is None else config
        super().__init__(sampler, functools.partial(DoGE, config), **options)
