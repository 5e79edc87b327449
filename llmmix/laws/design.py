"""Which mixtures to run next, so that a law learns where the best mixture lies.

    w_r   ~ how often candidate r is among the best under the laws that the runs leave open
    g_r   = f_r - sum_r w_r f_r                    f the objective, sum_i u_i L_i
    c*    = argmax_c sum_r w_r Cov(g_r, f_c)^2 / (Var f_c + s^2),    s^2 = sum_i u_i^2 noise_i^2

Laws drawn from what the runs leave open (`Law.draws`) disagree about which mixture is best, and
a run teaches most where it settles that. A run at c lowers the variance of what the mixtures that
may be best differ by, summed with their weights w, by the amount above, if objective and draws
are Gaussian. What all of them share, such as a floor, decides nothing, so g has it taken off. The
covariance is then conditioned on a run there, whatever its loss, and the next one is picked: a
batch is spread out by itself. Runs' noise is taken to be independent between targets.

Weak where the law is: draws of a wrong form disagree about the wrong things, and of a domain that
no run varied they say nothing. Those keep their share, and a note says so.
"""

from dataclasses import dataclass

import numpy as np

from llmmix.laws.inputs import canonical_order
from llmmix.laws.law import Law
from llmmix.laws.objective import Objective, Shares, law_bounds, prior_shares
from llmmix.laws.optimum import best_runs
from llmmix.laws.simplex import nearest_run, project

DRAWS = 400  # laws
CANDIDATES = 2000
BEST = 0.005  # share of the candidates that count as best under a law
APART = 0.02  # share moved by which a run must differ from others
CONCENTRATIONS = (3.0, 10.0, 30.0, 100.0)  # of Dirichlet draws, in all
CLOSER = (30.0, 100.0, 300.0)  # and of those about single mixtures
DECIMALS = (4, 6, 9)  # the fewest that the bounds allow


@dataclass(frozen=True)
class Design:
    """Mixtures to run next, in the order in which they were picked.

    Args:
        mixtures: (count, k), four decimals where the bounds allow, of sum 1.
        expected: (count,) the objective there, as the law has it.
        std: (count,) its standard deviation before any of these runs, without a run's noise.
        nearest: (count,) share that would have to be moved to get to the nearest finished run.
        before: Standard deviation of the objective where the optimum may lie, about its level.
        after: (count,) what it falls to with the first of these runs, the first two, and so on.
        notes: What to mind.
    """

    mixtures: np.ndarray
    expected: np.ndarray
    std: np.ndarray
    nearest: np.ndarray
    before: float
    after: np.ndarray
    notes: tuple[str, ...]


def next_mixtures(
    law: Law,
    count: int,
    *,
    objective: Objective = None,
    lower: Shares = None,
    upper: Shares = None,
    prior: Shares = None,
    apart: float = APART,
    draws: int = DRAWS,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> Design:
    """The mixtures whose runs would tell most about where the objective is smallest.

    Args:
        law: A fitted law.
        count: Number of runs to plan, done side by side.
        objective: As `Law.propose` takes it, as are the bounds and the prior.
        lower: Smallest shares.
        upper: Largest shares.
        prior: Mixture about which candidates are drawn, beside the runs' mean.
        apart: Share by which each must differ from all runs and from each other.
        draws: Number of laws that are drawn and asked.
        candidates: Number of mixtures looked at.
        seed: Seed of candidates and laws.

    Raises:
        ValueError: `count` is below 1, the bounds leave fewer mixtures than that, or all laws that
            the runs leave open agree on what is best.
    """
    if not (isinstance(count, int | np.integer) and count >= 1):
        raise ValueError(f"`count` must be a whole number from 1, got {count!r}.")
    if draws < 2 or candidates < count:
        raise ValueError(
            f"`draws` must be 2 or more and `candidates` at least `count`, got {draws} and "
            f"{candidates}."
        )
    u = law.target_weights(objective)
    found = law.propose(objective, lower=lower, upper=upper, prior=prior, seed=seed)
    centre = prior_shares(prior, law.inputs_)
    centres = np.vstack([centre, law.mixtures_.mean(0), found.mixture, best_runs(law.inputs_, u)])
    low, high = law_bounds(law.inputs_, lower=lower, upper=upper)
    # Drawn and picked in an order of the domains that does not depend on how they came
    order = canonical_order(law.mixtures_, law.losses_)[1]
    back = np.argsort(order)
    inside = _Simplex(low[order], high[order], law.inputs_.fixed[order])
    pool = inside.use(_drawn(centres[:, order], candidates, np.random.default_rng(seed)))
    pool = pool[[nearest_run(p, law.mixtures_[:, order])[1] >= apart for p in pool]]
    if len(pool) < count:
        raise ValueError(_too_few(len(pool), count, apart))
    values = law.draws(pool[:, back], draws, seed) @ u
    noise = float((u**2) @ law.noise_**2)
    picked, before, after = _greedy(values, noise, pool, count, apart)
    mixtures = pool[picked][:, back]
    return Design(
        mixtures=mixtures,
        expected=np.reshape(law.predict(mixtures), (count, -1)) @ u,
        std=values.std(0)[picked],
        nearest=np.array([nearest_run(p, law.mixtures_)[1] for p in mixtures]),
        before=before,
        after=after,
        notes=tuple(_notes(law, inside.decimals)),
    )


def _drawn(centres: np.ndarray, candidates: int, rng: np.random.Generator) -> np.ndarray:
    """Mixtures about the centres (c, k), of which the first two are drawn about widely."""
    mean = centres[:2].mean(0)
    parts = [centres]
    wide = [(c, a) for c in centres[:2] for a in CONCENTRATIONS]
    close = [(0.95 * c + 0.05 * mean, a) for c in centres[2:] for a in CLOSER]
    for pairs, share in ((wide, 0.5), (close, 0.3)):
        each = int(np.ceil(share * candidates / len(pairs)))
        # A concentration of 0 is no Dirichlet: what has no share anywhere gets next to none
        parts += [rng.dirichlet(np.maximum(a * c, 1e-3), each) for c, a in pairs]
    ends = rng.integers(len(centres), size=(2, int(np.ceil(0.2 * candidates))))
    t = rng.uniform(size=(ends.shape[1], 1))
    return np.vstack([*parts, t * centres[ends[0]] + (1 - t) * centres[ends[1]]])


class _Simplex:
    """Mixtures within bounds, rounded for use.

    Shares that no run varied, and those whose bounds leave no round number, stay to the digit; the
    share with the most room takes what they leave of a unit.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, fixed: np.ndarray):
        self.low, self.high = low, high
        self.decimals: int | None = None
        for decimals in DECIMALS:
            unit = 10.0**-decimals
            least = np.ceil(low / unit - 1e-6) * unit
            most = np.floor(high / unit + 1e-6) * unit
            held = fixed | (least > most + unit / 2)
            least[held] = most[held] = project(low, low, high)[held]
            if least.sum() <= 1 + 1e-12 and most.sum() >= 1 - 1e-12 and not held.all():
                self.decimals, self.least, self.most, self.held = decimals, least, most, held
                break

    def use(self, p: np.ndarray) -> np.ndarray:
        """Distinct mixtures near p (n, k), in its order."""
        p = project(p, self.low, self.high)
        if self.decimals is not None:
            scale = 10**self.decimals
            p = np.array([self._rounded(q, scale) for q in project(p, self.least, self.most)])
        p = p[((p >= self.low - 1e-9) & (p <= self.high + 1e-9)).all(1)]
        return p[np.sort(np.unique(p, axis=0, return_index=True)[1])]

    def _rounded(self, p: np.ndarray, scale: int) -> np.ndarray:
        """Largest remainders, of those that are not held, in units of 1 / scale."""
        free = ~self.held
        units = p[free] * scale
        whole = np.floor(units + 1e-6)
        total = (1 - p[self.held].sum()) * scale
        missing = int(round(np.floor(total + 1e-6) - whole.sum()))
        whole[np.argsort(whole - units, kind="stable")[:missing]] += 1
        rounded = p.copy()
        rounded[free] = whole / scale
        rest = total - whole.sum()
        if rest > 1e-6:
            rounded[np.argmax(np.where(free, self.high - rounded, -1))] += rest / scale
        return rounded


def _greedy(
    values: np.ndarray, noise: float, pool: np.ndarray, count: int, apart: float
) -> tuple[list[int], float, np.ndarray]:
    """Candidates one after the other, each of which lowers the variance of the best ones most.

    Args:
        values: (draws, n) objective of each candidate under each law.
        noise: Variance of a run's objective.
        pool: (n, k) candidates.
        count: Number to pick.
        apart: Share by which they differ.

    Returns:
        Their indices, the standard deviation before and those after each.
    """
    top = max(1, round(BEST * values.shape[1]))
    best = np.argpartition(values, top - 1, axis=1)[:, :top]
    weights = np.bincount(best.ravel(), minlength=values.shape[1]) / best.size
    region = np.flatnonzero(weights)
    w = weights[region]
    away = values - values.mean(0)
    contrast = away[:, region] - (away[:, region] @ w)[:, None]
    # between the region's contrasts and all candidates, and between all candidates
    cross = contrast.T @ away / (len(values) - 1)
    full = away.T @ away / (len(values) - 1)
    variance = float(w @ (contrast**2).sum(0) / (len(values) - 1))
    if not variance > 1e-18 * max(1.0, float(np.square(values).mean())):
        raise ValueError(
            "`law`: the laws that the runs leave open agree on what is best for `objective`: no "
            "run would teach them more. Take another objective or law, or `best_mixture`."
        )
    picked: list[int] = []
    after: list[float] = []
    open_ = np.ones(len(pool), bool)
    before = np.sqrt(variance)
    for _ in range(count):
        if not open_.any():
            raise ValueError(_too_few(len(picked), count, apart))
        gain = (w @ cross**2) / np.maximum(full.diagonal() + noise, 1e-300)
        c = int(np.argmax(np.where(open_, gain, -np.inf)))
        share = full[c] / max(full[c, c] + noise, 1e-300)
        variance = max(variance - float(gain[c]), 0.0)
        cross, full = cross - np.outer(cross[:, c], share), full - np.outer(full[:, c], share)
        picked.append(c)
        after.append(np.sqrt(variance))
        open_ &= np.abs(pool - pool[c]).sum(1) / 2 >= apart
    return picked, float(before), np.array(after)


def _too_few(found: int, count: int, apart: float) -> str:
    return (
        f"`count` is {count}, and within the bounds {found} candidates differ by {apart:g} from "
        "all runs and each other: plan fewer, widen `lower` and `upper`, or lower `apart`."
    )


def _notes(law: Law, decimals: int | None):
    """What to mind, in words."""
    shares = law.mixtures_[0]
    for name in law.unidentified_:
        share = shares[law.domains_.index(name)]
        if share < 1e-9:
            yield f"No run has {name}, so the law cannot say what it does: add a run with {name}."
        else:
            yield (
                f"All runs have {share:.4g} of {name}, and so do these: add one with another share."
            )
    if decimals != DECIMALS[0]:
        shown = "are not rounded" if decimals is None else f"have {decimals} decimals"
        yield f"The bounds leave no shares of {DECIMALS[0]} decimals: these {shown}."
