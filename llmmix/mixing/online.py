"""Skill-It, DoReMi, DoGE and bandits (ODM, EXP3): mixtures that move by what training measures.

    Skill-It  w_t ~ w_0 exp(eta * S @ sum of the last `window` losses); before any, S @ 1 (2307.14430)
    DoReMi    w_t ~ w_(t-1) exp(eta * lambda), then (1 - c) w_t + c / m             (2305.10429)
    DoGE      w_t ~ w_(t-1) exp(score / mu), then as DoReMi                         (2310.15393)
    ODM       R_j <- a R_j + (1 - a) r_j / pi_j,  E_t = min(1/m, sqrt(ln m / (m t)))
              pi = (1 - m E_t) softmax(E_(t-1) R) + E_t                             (2312.02406)
    EXP3      w_j <- w_j exp(eta r_j / (m pi_j)),  pi = (1 - gamma) w / sum w + gamma / m

    symbol    name                                  symbol   name
    m, n      names, targets                        mu       mu
    S         graph, (m, n), row = SOURCE           c        smoothing
    lambda    `excess` of an observation            a        decay
    score     doge_scores of `products`, `norms`    r        `train` or `losses`, by `reward`

Weights are kept as logarithms and normalised at each update: published code multiplies plain ones,
which overflow within a thousand updates or, once zero, stay so. Simulated runs: tests/test_online.py.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmmix.mixing.control import Observation, Segment, check_weights

logger = logging.getLogger(__name__)


def stratified(m: int) -> np.ndarray:
    """The same share for each of `m` domains, (m,)."""
    _check_count("m", m)
    return np.full(m, 1 / m)


def proportional(sizes, alpha: float = 1.0) -> np.ndarray:
    """Shares w_j ~ size_j ** alpha: 1 by size, 0.5 a temperature; an empty domain has none.

    Args:
        sizes: (m,) rows or tokens of the domains.
        alpha: Exponent, not negative; 0 is the same share for each that is not empty.

    Returns:
        (m,) on the simplex.

    Raises:
        ValueError: A size or `alpha` is negative or not finite, or all is empty.
    """
    sizes = check_weights(sizes, [str(j) for j in range(len(sizes))], "sizes")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"`alpha` must be finite and not negative, got {alpha}.")
    full = sizes > 0
    weights = np.zeros(len(sizes))
    weights[full] = _softmax(alpha * np.log(sizes[full]))
    return weights


def skillit_graph(start_losses, end_losses) -> np.ndarray:
    """Skill-It's graph from one-source runs: S_ij = (start_j - end_ij) / start_j, row = SOURCE.

    Run i trains on source i alone, and all begin at one checkpoint. The mixing matrix A of Aioli
    has row = TARGET: A is S transposed, times the losses. Where m = n nothing but care tells them
    apart. A source that harms a target has a negative entry. Measure on validation rows, never on
    those of the test.

    Args:
        start_losses: (n,) of the targets before any run, positive.
        end_losses: (m, n) after each run.

    Returns:
        (m, n).

    Raises:
        ValueError: Other shapes, a start that is not positive, or a loss that is not finite.
    """
    start, end = (np.asarray(x, dtype=np.float64) for x in (start_losses, end_losses))
    if start.ndim != 1 or end.ndim != 2 or end.shape[1] != len(start):
        raise ValueError(
            "`end_losses` must be (sources, targets) and `start_losses` (targets,), got "
            f"{end.shape} and {start.shape}."
        )
    if not (np.isfinite(end).all() and np.isfinite(start).all() and (start > 0).all()):
        raise ValueError(f"`start_losses` must be positive and all finite, got {start} and {end}.")
    return (start - end) / start


def influence_graph(graph, names: list[str], targets: list[str]) -> np.ndarray:
    """An influence graph by its named axes, (m, n), row = SOURCE.

    Args:
        graph: `{source: {target: influence}}`, or an array in the order of `names` and `targets`,
            or None for the identity, where the targets are the domains.
        names: Of the m domains.
        targets: Of the n targets.

    Raises:
        ValueError: Other names or another shape, no finite numbers, or None with other targets.
    """
    if graph is None:
        _check_same_names("graph=None", names, targets)
        return np.array([[float(name == target) for target in targets] for name in names])
    if isinstance(graph, Mapping):
        for what, given, wanted in [
            ("sources", graph, names),
            *((f"targets of source {name!r}", graph[name], targets) for name in graph),
        ]:
            if set(given) != set(wanted):
                raise ValueError(
                    f"`graph` must have the {what} {sorted(wanted)}, got {sorted(given)}; it maps "
                    "each source to its influence on each target, not the other way round."
                )
        graph = [[graph[name][target] for target in targets] for name in names]
    values = np.array(graph, dtype=np.float64)
    if values.shape != (len(names), len(targets)) or not np.isfinite(values).all():
        raise ValueError(
            f"`graph` must be finite, with a row for each of the sources {names} and a column for "
            f"each of the targets {targets}, got {values.tolist()}."
        )
    return values


def reweigh(log_weights: np.ndarray, gains: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """The step of DoReMi and DoGE in logs: w ~ w exp(gain), then (1 - c) w + c / m, (m,)."""
    log_weights = _log_normalize(log_weights + gains)
    if smoothing == 0:
        return log_weights
    uniform = math.log(smoothing / len(log_weights))
    return np.logaddexp(log_weights + math.log1p(-smoothing), uniform)


def doge_scores(products, norms, learning_rate: float, dw_min=0.0, dw_max=5.0) -> np.ndarray:
    """DoGE's score_j = lr * sum_i <g_j, g_i> / (mean |g| + 1e-6), within [lr dw_min, lr dw_max].

    The lower bound of 0 makes a domain that harms the targets equal to one that is useless, and
    bounds that shrink with the rate freeze the weights as it decays.

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


def explore(scores: np.ndarray, share: float) -> np.ndarray:
    """A bandit's pi = (1 - share) softmax(scores) + share / m, (m,)."""
    return (1 - share) * _softmax(scores) + share / len(scores)


def exploration_share(step: int, m: int) -> float:
    """ODM's m E_t = min(1, sqrt(m ln m / t)) after t = `step` steps, warm-up among them."""
    return min(1.0, math.sqrt(m * math.log(m) / step))


def _log(weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # of no share: minus infinity, which stays
        return np.log(weights)


def _log_normalize(logs: np.ndarray) -> np.ndarray:
    shifted = logs - logs.max()
    return shifted - np.log(np.exp(shifted).sum())


def _softmax(logs: np.ndarray) -> np.ndarray:
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def _check_same_names(what: str, names: list[str], targets: list[str]) -> None:
    if sorted(names) != sorted(targets):
        raise ValueError(
            f"`{what}` needs a target for each domain and no other, got the domains {names} and "
            f"the targets {targets}."
        )


def _check_count(name: str, value: int) -> None:
    if value < 1 or value != int(value):
        raise ValueError(f"`{name}` must be a whole number from 1, got {value}.")


def _check_range(config, name: str, low: float, high: float, ends: str = "()") -> None:
    value = getattr(config, name)
    above = low <= value if ends[0] == "[" else low < value
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below):
        raise ValueError(
            f"`{name}` of {type(config).__name__} must lie in {ends[0]}{low:g}, {high:g}{ends[1]}, "
            f"got {value}."
        )


def _option(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


class _Online:
    """What all share: a plan of one segment, whatever the step, and a state of named arrays."""

    measure: str
    last_counts = False  # whether a measurement after which nothing is trained is of use
    kept = ("weights", "skipped")

    def __init__(self, config, names: list[str], targets: list[str], weights):
        self.config, self.names, self.targets = config, list(names), list(targets)
        self.weights = check_weights(weights, self.names)
        self.skipped = 0
        if len(self.names) == 1:
            logger.warning(
                "%s has one domain, %r, and nothing to mix: it trains on that and measures nothing.",
                *(type(self).__name__, self.names[0]),
            )

    def interval(self, step: int, total_steps: int) -> int:
        """Steps from `step` to the next update."""
        return self.config.interval - step % self.config.interval

    def plan(self, step: int, total_steps: int) -> list[Segment]:
        """The steps to the next update; none if none is left."""
        left = total_steps - step
        if left <= 0:
            return []
        if len(self.names) == 1:
            return [Segment(self.weights.copy(), left)]
        steps = min(self.interval(step, total_steps), left)
        measures = steps < left or self.last_counts
        return [Segment(self.weights.copy(), steps, self.measure if measures else None)]

    def read(self, observation: Observation, name: str, *shape: int) -> np.ndarray:
        """A signal of the observation as float64.

        Raises:
            ValueError: It has another shape.
        """
        values = np.asarray(observation.signal[name], dtype=np.float64)
        if values.shape != shape:
            raise ValueError(f"`signal[{name!r}]` must be of shape {shape}, got {values.shape}.")
        return values

    def state_dict(self) -> dict:
        """The arrays and counts that decide the plans to come; -inf, which JSON lacks, as None."""
        state = {"names": self.names, "targets": self.targets}
        for name in self.kept:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = np.where(np.isfinite(value), value, None).tolist()
            state[name] = value
        return state
