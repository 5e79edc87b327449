"""Skill-It, DoReMi, DoGE and bandits (ODM, EXP3): mixtures that move by what training measures.

    Skill-It  w_t ~ w_0 exp(eta S L), L the sum of the last `window` losses, or 1   arXiv:2307.14430
    DoReMi    w_t ~ w_(t-1) exp(eta lambda), then (1 - c) w_t + c / m               arXiv:2305.10429
    DoGE      w_t ~ w_(t-1) exp(score / mu), then as DoReMi                         arXiv:2310.15393
    ODM       R <- a R + (1 - a) r / pi,  E_t = min(1 / m, sqrt(ln m / (m t)))      arXiv:2312.02406
              pi = (1 - m E_t) softmax(E_(t-1) R) + E_t
    EXP3      w <- w exp(eta r / (m pi)),  pi = (1 - gamma) w / sum w + gamma / m

    symbol  name                                     symbol  name
    m, n    names, targets                           c       smoothing
    S       graph (m, n), row = SOURCE               a       decay
    lambda  the signal `excess`                      r       the signal `train` or `losses`

Weights are kept as logarithms and normalised at each update: the published EXP3 plugin multiplies
plain ones, which overflow within a thousand updates. What is not finite teaches nothing: it is
counted in `skipped`, and the last value stands. Simulated runs: tests/test_online.py.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmmix.mixing.control import Observation, Segment, check_weights

logger = logging.getLogger(__name__)


def stratified(m: int) -> np.ndarray:
    """The same share for each of `m` domains."""
    _require(m >= 1, "m", "be at least 1", m)
    return np.full(m, 1 / m)


def proportional(sizes, alpha: float = 1.0) -> np.ndarray:
    """Shares w_j ~ size_j ** alpha, (m,), of domains of (m,) rows or tokens; none of an empty one.

    Raises:
        ValueError: A size or `alpha` is negative or not finite, or all sizes are zero.
    """
    sizes = check_weights(sizes, [str(j) for j in range(len(sizes))], "sizes")
    _require(0 <= alpha < math.inf, "alpha", "be finite and not negative", alpha)
    return np.exp(_log_normalize(np.where(sizes > 0, alpha * _log(sizes + (sizes == 0)), -np.inf)))


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
    _require(shaped, "end_losses", f"be (sources, {start.shape} targets)", end.shape)
    _require((start > 0).all() and np.isfinite(start).all(), "start_losses", "be positive", start)
    _require(np.isfinite(end).all(), "end_losses", "be finite", end)
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
    _require(len(targets) > 0, "targets", "name at least one, whose loss is measured", targets)
    if graph is None:
        _require_same(names, targets, "graph=None")
        return np.array([[float(name == target) for target in targets] for name in names])
    if isinstance(graph, Mapping):
        way = "map each source to its influence on each target; its %s must be %s"
        _require(set(graph) == set(names), "graph", way % ("sources", names), list(graph))
        for row in graph.values():
            _require(set(row) == set(targets), "graph", way % ("targets", targets), list(row))
        graph = [[graph[name][target] for target in targets] for name in names]
    values = np.array(graph, dtype=np.float64)
    shape = (len(names), len(targets))
    _require(values.shape == shape, "graph", f"be (sources, targets) = {shape}", values.shape)
    _require(np.isfinite(values).all(), "graph", "be finite", values.tolist())
    return values


def reweigh(log_weights: np.ndarray, gains: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """The step of DoReMi and DoGE in logs: w ~ w exp(gains), then (1 - c) w + c / m, (m,)."""
    log_weights = _log_normalize(log_weights + gains)
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


def exploration(step: int, m: int) -> float:
    """ODM's E_t = min(1 / m, sqrt(ln m / (m t))) after t = `step` steps, warm-up among them."""
    return min(1 / m, math.sqrt(math.log(m) / (m * step)))


def explore(scores: np.ndarray, share: float) -> np.ndarray:
    """A bandit's pi = (1 - share) softmax(scores) + share / m, (m,)."""
    return (1 - share) * np.exp(_log_normalize(scores)) + share / len(scores)


def _log(weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # what has no share has -inf, and keeps it
        return np.log(weights)


def _log_normalize(logs: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # apart by more than a number holds: -inf, a share of zero
        logs = logs - logs.max()
    return logs - np.log(np.exp(logs).sum())


def _require(met, name: str, wanted: str, given) -> None:
    if not met:
        raise ValueError(f"`{name}` must {wanted}, got {given}.")


def _require_same(names: list[str], targets: list[str], what: str) -> None:
    same = sorted(names) == sorted(targets)
    _require(same, "targets", f"be the domains {names} where {what}", targets)


def _option(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


def _require_whole(name: str, value) -> None:
    _require(isinstance(value, int) and value >= 1, name, "be a whole number from 1", value)


class _Online:
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
        values = np.asarray(observation.signal[name], dtype=np.float64)
        _require(values.shape == shape, f"signal[{name!r}]", f"be of shape {shape}", values.shape)
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
        _require(state.keys() == own.keys(), "state", f"be of {kind}, {list(own)}{way}", [*state])
        for name in ("names", "targets"):
            wanted = f"be {own[name]}{way}"
            _require(state[name] == own[name], f"state[{name!r}]", wanted, state[name])
        loaded = {name: state[name] for name in self.kept}
        for name, value in loaded.items():
            if isinstance(getattr(self, name), np.ndarray):
                array = np.array(value, dtype=np.float64)  # of None it makes NaN
                loaded[name] = np.where(np.isnan(array), -np.inf, array)
                shape = getattr(self, name).shape
                wanted = f"be of shape {shape}{way}"
                _require(array.shape == shape, f"state[{name!r}]", wanted, array.shape)
        vars(self).update(loaded)


@dataclass
class SkillItConfig:
    """Of `SkillIt`. The losses are summed: the tilt grows with `window` and until it is full."""

    eta: float = _option(0.2, "eta, the size of the tilt by the losses (nats).")
    window: int = _option(3, "How many measurements are summed.")
    update_steps: int | None = _option(None, "Steps between updates; a tenth of all by default.")
    graph: dict | None = _option(
        None, "{source: {target: influence}}, or (m, n); by default each domain helps itself."
    )

    def __post_init__(self):
        _require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        _require_whole("window", self.window)
        _require_whole("update_steps", 1 if self.update_steps is None else self.update_steps)


class SkillIt(_Online):
    """Tilts the first weights towards sources that help the targets whose losses are high.

    Args:
        config: Its options.
        names: Of the m domains.
        targets: Of the n targets, at least one.
        weights: (m,) the first ones, w_0, which every update tilts anew.
    """

    measure = "losses"
    kept = (*_Online.kept, "losses")

    def __init__(self, config: SkillItConfig, names: list[str], targets: list[str], weights):
        super().__init__(config, names, targets, weights)
        self.graph = influence_graph(config.graph, self.names, self.targets)
        self._first = _log(self.weights)
        self.losses = np.zeros((config.window, len(self.targets)))
        self._tilt(np.ones(len(self.targets)))

    def _tilt(self, losses: np.ndarray) -> None:
        gains = self.config.eta * (self.graph @ losses)
        self.weights = np.exp(_log_normalize(self._first + gains))

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


class _Averaged(_Online):
    """Whose answer is the mean of the weights over the steps, `average` (m,), not the last ones."""

    last_counts = True
    kept = (*_Online.kept, "log_weights", "average", "averaged_steps")

    def __init__(self, config, names: list[str], targets: list[str], weights):
        super().__init__(config, names, targets, weights)
        self.log_weights, self.average = _log(self.weights), self.weights.copy()
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

    eta: float = _option(1.0, "eta, the size of a step by the excess loss.")
    smoothing: float = _option(1e-3, "c, the share spread evenly at each step; the release: 1e-4.")
    interval: int = _option(1, "Steps between updates.")

    def __post_init__(self):
        _require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        _require(0 <= self.smoothing < 1, "smoothing", "lie in [0, 1)", self.smoothing)
        _require_whole("interval", self.interval)


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

    mu: float = _option(0.05, "mu, temperature of a step; smaller is spikier (its scripts: 0.01).")
    smoothing: float = _option(0.0, "c, the share spread evenly at each step.")
    dw_min: float = _option(0.0, "Lower bound of a score, in learning rates.")
    dw_max: float = _option(5.0, "Upper bound of a score, in learning rates.")
    interval: int = _option(1, "Steps between updates.")

    def __post_init__(self):
        _require(0 < self.mu < math.inf, "mu", "be positive", self.mu)
        _require(0 <= self.smoothing < 1, "smoothing", "lie in [0, 1)", self.smoothing)
        _require(self.dw_min < self.dw_max, "dw_max", f"exceed dw_min={self.dw_min}", self.dw_max)
        _require_whole("interval", self.interval)


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
            gains = doge_scores(products, norms, rate, config.dw_min, config.dw_max) / config.mu
        self.update(gains, observation.steps)


@dataclass
class BanditConfig:
    """Of `Bandit`. The published plugin is `exp3` on `losses` with `full_information` False."""

    update: str = _option("odm", "The rule, odm or exp3.", choices=["odm", "exp3"])
    reward: str = _option(
        "train", "Loss of a domain in the batch, or on validation.", choices=["train", "losses"]
    )
    full_information: bool | None = _option(
        None, "Whether rewards are not divided by pi; by default where all are seen, in losses."
    )
    interval: int | None = _option(
        None, "Steps between updates; by default 1, or a hundredth of all for losses."
    )
    warmup_share: float = _option(0.01, "Share of the steps on the first weights.")
    decay: float = _option(0.9, "odm: a, what a running reward keeps of its past.")
    eta: float = _option(0.3, "exp3: the size of a step.")
    gamma: float = _option(0.1, "exp3: the share spread evenly.")

    def __post_init__(self):
        _require(self.update in ("odm", "exp3"), "update", "be 'odm' or 'exp3'", self.update)
        known = self.reward in ("train", "losses")
        _require(known, "reward", "be 'train' or 'losses'", self.reward)
        _require_whole("interval", 1 if self.interval is None else self.interval)
        _require(0 <= self.warmup_share < 1, "warmup_share", "lie in [0, 1)", self.warmup_share)
        _require(0 <= self.decay < 1, "decay", "lie in [0, 1)", self.decay)
        _require(0 < self.eta < math.inf, "eta", "be positive", self.eta)
        _require(0 < self.gamma <= 1, "gamma", "lie in (0, 1]", self.gamma)


class Bandit(_Online):
    """Draws more of the domains whose losses are high, as arms of a bandit.

    ODM draws one domain a batch and rewards that; here a batch holds several, and each that it
    holds is rewarded by its mean loss. Where all are always seen and rewards are divided by pi,
    EXP3 settles where pi is proportional to them (3, 2.5, 2 -> .4, .333, .267), not on the best
    arm. ODM multiplies R by its exploration rate: as that decays its weights return to even ones.

    Args:
        config: Its options.
        names: Of the m domains, each of which is an arm, whatever its first weight.
        targets: The domains, in any order, for `reward="losses"`; else not needed.
        weights: (m,) the first ones, for the warm-up.
    """

    kept = (*_Online.kept, "scores", "rate")

    def __init__(self, config: BanditConfig, names: list[str], targets: list[str], weights):
        super().__init__(config, names, targets, weights)
        self.measure, m = config.reward, len(self.names)
        if self.measure == "losses":
            _require_same(self.names, self.targets, "reward='losses'")
        # R of odm, ln w of exp3
        self.scores = np.zeros(m) if config.update == "odm" else _log(self.weights)
        self.rate = 1 / m  # E_(t-1)

    def steps_to_update(self, step: int, total_steps: int) -> int:
        """All of the warm-up; then counted from its end."""
        warmup = round(self.config.warmup_share * total_steps)
        seldom = max(1, total_steps // 100) if self.measure == "losses" else 1
        every = self.config.interval or seldom
        return warmup - step if step < warmup else every - (step - warmup) % every

    def observe(self, observation: Observation) -> None:
        """Reward the arms that were seen; one whose reward is not finite keeps what it has."""
        rewards = self.read(observation, self.measure, len(self.names))
        broken = np.isinf(rewards)
        if self.measure == "losses":
            rewards = rewards[[self.targets.index(name) for name in self.names]]
            broken = ~np.isfinite(rewards)  # nothing is absent from a validation set
        m, config = len(self.names), self.config
        full = config.full_information
        full = self.measure == "losses" if full is None else full
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            rewards = rewards / (1 if full else self.weights)
            if config.update == "exp3":
                rewards = rewards * config.eta / m
        seen = np.isfinite(rewards)
        self.skipped += bool(broken.any() or not seen.any())
        if not seen.any():
            return
        if config.update == "exp3":
            self.scores = _log_normalize(self.scores + np.where(seen, rewards, 0.0))
            self.weights = explore(self.scores, config.gamma)
            return
        a = config.decay
        self.scores = np.where(seen, a * self.scores + (1 - a) * rewards, self.scores)
        last, self.rate = self.rate, exploration(observation.step, m)
        self.weights = explore(last * self.scores, m * self.rate)


class Fixed(_Online):
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
