"""Skill-It, mixtures that stay, and what Skill-It, DoReMi, DoGE and the bandits share.

    Skill-It   w_t ~ w_0 exp(eta S L),  L the sum of the last `window` losses, or 1 at first

    symbol  name                        symbol  name
    m, n    names, targets              S       graph (m, n), row = SOURCE
    w_0     the sampler's weights       L       the signal `losses` (n,)

Weak where: the graph costs a run a source beforehand and stays as it was then, and without one a
domain is taken to help itself alone; high losses draw weight whether or not they can fall; and
since losses are summed, the tilt grows with `window` and with the level of the losses.

Weights are kept as logarithms and normalised at each update: the published EXP3 plugin multiplies
plain ones, which overflow within a thousand updates. What is not finite teaches nothing: it is
counted in `skipped`, and the last value stands. Source of Skill-It: Chen et al., arXiv:2307.14430.
DoReMi and DoGE: llmmix/mixing/proxies.py. Bandits: llmmix/mixing/bandit.py. Simulated runs:
tests/test_online.py; under a trainer: tests/test_online_callbacks.py.
"""

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.controllers import Observation, Segment, check_weights
from llmmix.mixing.sampler import MixtureSampler

logger = logging.getLogger(__name__)


def stratified(m: int) -> np.ndarray:
    """The same share for each of `m` domains."""
    require(m >= 1, "m", "be at least 1", m)
    return np.full(m, 1 / m)


def proportional(sizes, alpha: float = 1.0) -> np.ndarray:
    """Shares w_j ~ size_j ** alpha, (m,), of domains of (m,) rows or tokens; none of an empty one.

    Raises:
        ValueError: A size or `alpha` is negative or not finite, or all sizes are zero.
    """
    sizes = check_weights(sizes, [str(j) for j in range(len(sizes))], "sizes")
    require(0 <= alpha < math.inf, "alpha", "be finite and not negative", alpha)
    return np.exp(log_normalize(np.where(sizes > 0, alpha * log_of(sizes + (sizes == 0)), -np.inf)))


def log_of(weights: np.ndarray) -> np.ndarray:
    """Logarithms: what has no share has minus infinity, and keeps it."""
    with np.errstate(divide="ignore"):
        return np.log(weights)


def log_normalize(logs: np.ndarray) -> np.ndarray:
    """Logarithms of weights that sum to one."""
    with np.errstate(over="ignore"):  # apart by more than a number holds: -inf, a share of zero
        logs = logs - logs.max()
    return logs - np.log(np.exp(logs).sum())


def require(met, name: str, wanted: str, given) -> None:
    """Refuse an argument that does not meet what is wanted, with a `ValueError`."""
    if not met:
        raise ValueError(f"`{name}` must {wanted}, got {given}.")


def require_same(names: list[str], targets: list[str], what: str) -> None:
    """Refuse targets that are not the domains, in any order."""
    same = sorted(names) == sorted(targets)
    require(same, "targets", f"be the domains {names} where {what}", targets)


def option(default, text: str, **metadata):
    """A field of a config with its help."""
    return field(default=default, metadata={"help": text, **metadata})


def require_whole(name: str, value) -> None:
    """Refuse what is no whole number from 1."""
    require(isinstance(value, int) and value >= 1, name, "be a whole number from 1", value)


class OnlineController:
    """What all share: plans of one segment, and a state of named arrays and numbers."""

    measure: str
    last_counts = False  # whether a measurement is of use when no step follows it
    kept = ("weights", "skipped")

    def __init__(self, config, names: list[str], targets: list[str], weights):
        self.config, self.names, self.targets = config, list(names), list(targets)
        self.weights = check_weights(weights, self.names)
        self.skipped = 0
        if len(self.names) == 1:
            text = "%s has nothing to mix: %r is the only domain, and is all it will train on."
            logger.warning(text, type(self).__name__, self.names[0])

    def steps_to_update(self, step: int, total_steps: int) -> int:
        """Counted from the start of training."""
        return self.config.interval - step % self.config.interval

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """The steps to the next update: one segment, or none at the end."""
        left = max(0, total_steps - step)
        steps = min(left, self.steps_to_update(step, total_steps))
        measure = self.measure if steps < left or self.last_counts else None
        if len(self.names) == 1:
            steps, measure = left, None
        return [Segment(self.weights.copy(), steps, measure)] if steps else []

    def read(self, observation: Observation, name: str, *shape: int) -> np.ndarray:
        """A part of what was measured, which must have a shape."""
        values = np.asarray(observation.signal[name], dtype=np.float64)
        require(values.shape == shape, f"signal[{name!r}]", f"be of shape {shape}", values.shape)
        return values

    def record(self) -> dict:
        """How many observations were not finite, in part or whole."""
        return {"skipped": self.skipped}

    def state_dict(self) -> dict:
        """All that decides the plans to come; minus infinity, which JSON lacks, as None."""
        state = {"names": list(self.names), "targets": list(self.targets)}
        for name in self.kept:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = np.where(np.isfinite(value), value, None).tolist()
            state[name] = value
        return state

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: It is another method's, or of other domains, targets or sizes.
        """
        own, kind = self.state_dict(), type(self).__name__
        way = "; resume with the method, domains and options that the run began with"
        require(state.keys() == own.keys(), "state", f"be of {kind}, {list(own)}{way}", [*state])
        for name in ("names", "targets"):
            wanted = f"be {own[name]}{way}"
            require(state[name] == own[name], f"state[{name!r}]", wanted, state[name])
        loaded = {name: state[name] for name in self.kept}
        for name, value in loaded.items():
            if isinstance(getattr(self, name), np.ndarray):
                array = np.array(value, dtype=np.float64)  # of None it makes NaN
                loaded[name] = np.where(np.isnan(array), -np.inf, array)
                shape = getattr(self, name).shape
                wanted = f"be of shape {shape}{way}"
                require(array.shape == shape, f"state[{name!r}]", wanted, array.shape)
        vars(self).update(loaded)


class Fixed(OnlineController):
    """Weights (m,) that stay: `stratified`, `proportional` or one's own; it has no config."""

    kept = ("weights",)

    def __init__(self, weights):
        self.names, self.targets = [str(j) for j in range(len(weights))], []
        self.weights = check_weights(weights, self.names)

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """All that is left."""
        left = total_steps - step
        return [Segment(self.weights.copy(), left)] if left > 0 else []

    def observe(self, observation: Observation) -> None:
        """Nothing is measured."""

    def record(self) -> dict:
        """Nothing."""
        return {}


def skillit_graph(start_losses, end_losses) -> np.ndarray:
    """Skill-It's graph of relative drops, S_ij = (start_j - end_ij) / start_j, row = SOURCE.

    Run i trains on source i alone; all begin at one checkpoint. Aioli's matrix A has row = TARGET
    (A is S transposed, times the losses), and where m = n nothing but care tells the two apart.
    What harms is negative. Take validation losses: with test losses the graph has seen the test.

    Args:
        start_losses: (n,) of the targets before any run, positive.
        end_losses: (m, n) after each run.

    Returns:
        (m, n).

    Raises:
        ValueError: Other shapes, a start that is not positive, or a loss that is not finite.
    """
    start, end = (np.asarray(x, dtype=np.float64) for x in (start_losses, end_losses))
    shaped = start.ndim == 1 and end.ndim == 2 and end.shape[1:] == start.shape
    require(shaped, "end_losses", f"be (sources, {start.shape} targets)", end.shape)
    require((start > 0).all() and np.isfinite(start).all(), "start_losses", "be positive", start)
    require(np.isfinite(end).all(), "end_losses", "be finite", end)
    return (start - end) / start


def influence_graph(graph, names: list[str], targets: list[str]) -> np.ndarray:
    """A graph by its named axes, (m, n), row = SOURCE.

    Args:
        graph: `{source: {target: influence}}`, an array in the order of `names` and `targets`, or
            None for the identity.
        names: Of the m sources.
        targets: Of the n targets; for the identity the same names.

    Raises:
        ValueError: Other names, another shape, a value that is not finite, or no target.
    """
    require(len(targets) > 0, "targets", "name at least one, whose loss is measured", targets)
    if graph is None:
        require_same(names, targets, "graph=None")
        return np.array([[float(name == target) for target in targets] for name in names])
    if isinstance(graph, Mapping):
        way = "map each source to its influence on each target; its %s must be %s"
        require(set(graph) == set(names), "graph", way % ("sources", names), list(graph))
        for row in graph.values():
            require(set(row) == set(targets), "graph", way % ("targets", targets), list(row))
        graph = [[graph[name][target] for target in targets] for name in names]
    values = np.array(graph, dtype=np.float64)
    shape = (len(names), len(targets))
    require(values.shape == shape, "graph", f"be (sources, targets) = {shape}", values.shape)
    require(np.isfinite(values).all(), "graph", "be finite", values.tolist())
    return values


@dataclass
class SkillItConfig:
    """Of `SkillIt`. The losses are summed: the tilt grows with `window` and until it is full."""

    eta: float = option(0.2, "eta, the size of the tilt by the losses (nats).")
    window: int = option(3, "How many measurements are summed.")
    update_steps: int | None = option(None, "Steps between updates; a tenth of all by default.")
    graph: dict | None = option(
        None, "{source: {target: influence}}, or (m, n); by default each domain helps itself."
    )

    def __post_init__(self):
        require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        require_whole("window", self.window)
        require_whole("update_steps", 1 if self.update_steps is None else self.update_steps)


class SkillIt(OnlineController):
    """Tilts the first weights towards sources that help the targets whose losses are high.

    Args:
        config: Its options.
        names: Of the m domains.
        targets: Of the n targets, at least one.
        weights: (m,) the first ones, w_0, which every update tilts anew.
    """

    measure = "losses"
    kept = (*OnlineController.kept, "losses")

    def __init__(self, config: SkillItConfig, names: list[str], targets: list[str], weights):
        super().__init__(config, names, targets, weights)
        self.graph = influence_graph(config.graph, self.names, self.targets)
        self._first = log_of(self.weights)
        self.losses = np.zeros((config.window, len(self.targets)))
        self._tilt(np.ones(len(self.targets)))

    def _tilt(self, losses: np.ndarray) -> None:
        gains = self.config.eta * (self.graph @ losses)
        self.weights = np.exp(log_normalize(self._first + gains))

    def steps_to_update(self, step: int, total_steps: int) -> int:
        """Counted from the start of training."""
        every = self.config.update_steps or max(1, total_steps // 10)
        return every - step % every

    def observe(self, observation: Observation) -> None:
        """Tilt by the last losses; all of them stand if one is not finite."""
        losses = self.read(observation, "losses", len(self.targets))
        if not np.isfinite(losses).all():
            self.skipped += 1
            return
        self.losses = np.vstack([self.losses[1:], losses])  # rows not yet measured are zeros
        self._tilt(self.losses.sum(0))


class SkillItCallback(MixtureCallback):
    """Moves a sampler's weights by Skill-It while a trainer runs.

    Args:
        sampler: Of the trainer's rows; its weights are w_0.
        config: Of Skill-It.
        options: As those of `MixtureCallback`.
    """

    def __init__(self, sampler: MixtureSampler, config: SkillItConfig | None = None, **options):
        config = SkillItConfig() if config is None else config
        super().__init__(sampler, functools.partial(SkillIt, config), **options)
