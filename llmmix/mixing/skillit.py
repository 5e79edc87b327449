"""Skill-It: more of the sources that help the targets whose losses are high.

    w_t ~ w_0 exp(eta S L),     L the sum of the last `window` losses, and 1 at first

    symbol  name                        symbol  name
    m, n    names, targets              S       graph (m, n), row = SOURCE
    w_0     the sampler's weights       L       the signal `losses` (n,)

Where it is weak: the graph costs a run on each source beforehand and does not change afterwards;
without a graph a domain is assumed to help only itself. High losses attract weight whether or not
they can fall. Losses are summed, so the tilt grows with `window` and with the level of the losses.

Source: Chen et al., "Skill-it! A Data-Driven Skills Framework" (arXiv:2307.14430). Recipe:
recipes/aioli.py.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmmix.mixing.callback import MixtureCallback
from llmmix.mixing.checks import Weights, require, require_same, require_whole
from llmmix.mixing.controllers import Observation, OnlineController
from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.weights import log_normalize, log_of

# Influence of each source on each target: by name, or (m, n) in the order of the domains
Graph = Mapping[str, Mapping[str, float]] | Sequence[Sequence[float]] | np.ndarray


def skillit_graph(
    start_losses: Sequence[float] | np.ndarray, end_losses: Sequence[Sequence[float]] | np.ndarray
) -> np.ndarray:
    """Skill-It's graph of relative drops, S_ij = (start_j - end_ij) / start_j, row = SOURCE.

    Run i trains on source i alone, and all runs begin at the same checkpoint. A negative entry is
    harm. Aioli's matrix A has row = TARGET (A is S transposed, times the losses): where m = n the
    shapes do not show a mix-up. Use validation losses, or the graph will have seen the test set.

    Args:
        start_losses: (n,) positive losses of the targets before any run.
        end_losses: (m, n) losses of the targets after each run.

    Returns:
        (m, n).

    Raises:
        ValueError: The shapes do not fit, a start loss is not positive, or a loss is not finite.
    """
    start, end = (np.asarray(x, dtype=np.float64) for x in (start_losses, end_losses))
    shaped = start.ndim == 1 and end.ndim == 2 and end.shape[1:] == start.shape
    require(shaped, "end_losses", f"be (sources, {start.shape} targets)", end.shape)
    require((start > 0).all() and np.isfinite(start).all(), "start_losses", "be positive", start)
    require(np.isfinite(end).all(), "end_losses", "be finite", end)
    return (start - end) / start


def influence_graph(graph: Graph | None, names: list[str], targets: list[str]) -> np.ndarray:
    """(m, n) a graph as an array, row = SOURCE.

    Args:
        graph: `{source: {target: influence}}`, an array in the order of `names` and `targets`, or
            None for the identity.
        names: Names of the m sources.
        targets: Names of the n targets; for the identity they must be the sources.

    Raises:
        ValueError: `graph` has other names or another shape, or a value that is not finite, or
            there is no target.
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
    """Options of `SkillIt`. Losses are summed: the tilt grows until `window` measurements are in.

    Raises:
        ValueError: An option is out of its range.
    """

    eta: float = field(
        default=0.2, metadata={"help": "Size eta of the tilt towards sources that help."}
    )
    window: int = field(
        default=3, metadata={"help": "Number of measurements whose losses are summed."}
    )
    update_steps: int | None = field(
        default=None, metadata={"help": "Steps between updates. Default: a tenth of the run."}
    )
    graph: Graph | None = field(
        default=None,
        metadata={
            "help": "Influence of sources on targets, {source: {target: influence}} or an (m, n) "
            "array. Default: each domain helps only itself."
        },
    )

    def __post_init__(self) -> None:
        require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        require_whole("window", self.window)
        require_whole("update_steps", 1 if self.update_steps is None else self.update_steps)


class SkillIt(OnlineController):
    """Tilts the first weights towards sources that help the targets whose losses are high.

    Args:
        config: Options of the method.
        names: Names of the m domains.
        targets: Names of the n targets, at least one.
        weights: (m,) first weights w_0, which every update tilts.
    """

    method = "SkillIt"
    measure = "losses"
    config: SkillItConfig
    arrays = (*OnlineController.arrays, "losses")

    def __init__(
        self, config: SkillItConfig, names: list[str], targets: list[str], weights: Weights
    ):
        super().__init__(config, names, targets, weights)
        self.graph = influence_graph(config.graph, self.names, self.targets)
        self._first = log_of(self.weights)
        self.losses = np.zeros((config.window, len(self.targets)))
        self._tilt(np.ones(len(self.targets)))

    def _tilt(self, losses: np.ndarray) -> None:
        gains = self.config.eta * (self.graph @ losses)
        self.weights = np.exp(log_normalize(self._first + gains))

    def steps_to_update(self, step: int, total_steps: int) -> int:
        """Steps to the next multiple of `update_steps`, by default of a tenth of the run."""
        every = self.config.update_steps or max(1, total_steps // 10)
        return every - step % every

    def observe(self, observation: Observation) -> None:
        """Tilt by the last losses; skip the measurement if one is not finite."""
        losses = self.read(observation, "losses", len(self.targets))
        if not np.isfinite(losses).all():
            self.skipped += 1
            return
        self.losses = np.vstack([self.losses[1:], losses])  # rows not yet measured are zeros
        self._tilt(self.losses.sum(0))


class SkillItCallback(MixtureCallback):
    """Moves a sampler's weights by Skill-It while a trainer runs.

    Args:
        sampler: Sampler of the trainer's rows; its weights are w_0.
        config: Options of Skill-It.
        options: Keyword arguments of `MixtureCallback`.
    """

    method = "shares moved by Skill-It"
    paper = (
        "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models",
        "2307.14430",
    )

    def __init__(
        self, sampler: MixtureSampler, config: SkillItConfig | None = None, **options: Any
    ):
        config = SkillItConfig() if config is None else config
        super().__init__(sampler, functools.partial(SkillIt, config), **options)
