"""Which mixtures to run next, so that the runs tell most about where the best mixture lies.

    w_r   ~ how often candidate r is among the best under laws drawn from the posterior
    g_r   = f_r - sum_r w_r f_r                    f the objective, sum_i u_i L_i
    c*    = argmax_c sum_r w_r Cov(g_r, f_c)^2 / (Var f_c + s^2),    s^2 = sum_i u_i^2 noise_i^2

The laws that fit the runs (`Law.draws` samples them) disagree about which mixture is best, and a
run is most useful where it settles that. If objective and draws are Gaussian, a run at c lowers the
variance of the differences between mixtures that may be best, summed with their weights w, by the
amount above. What these mixtures have in common, such as a floor, does not matter, so g leaves it
out. The covariance is then conditioned on a run at c, which does not need its loss, and the next
mixture is picked, so that a batch spreads out. Noise is taken to be independent between targets.

Where it is weak: draws of a law of the wrong form disagree about the wrong things. Domains that no
run varied keep their share, and a note says so.
"""

from dataclasses import dataclass

import numpy as np

from llmmix.laws.inputs import canonical_order
from llmmix.laws.law import Law
from llmmix.laws.objective import Objective, Shares, law_bounds, prior_shares
from llmmix.laws.optimum import best_runs
from llmmix.laws.simplex import nearest_run, project

DRAWS = 400  # laws drawn
CANDIDATES = 2000
BEST = 0.005  # fraction of the candidates that count as best under a law
APART = 0.02  # distance, as a share moved, that a run must keep from others
CONCENTRATIONS = (3.0, 10.0, 30.0, 100.0)  # of the wide Dirichlet draws
CLOSER = (30.0, 100.0, 300.0)  # of the Dirichlet draws around single mixtures
DECIMALS = (4, 6, 9)  # numbers of decimals to try


@dataclass(frozen=True)
class Design:
    """Mixtures to run next, in the order in which they were picked.

    Args:
        mixtures: (count, k) mixtures, rounded to four decimals where the bounds allow it.
        expected: (count,) objective there, as the law predicts it.
        std: (count,) its standard deviation before any of these runs, without the noise of a run.
        nearest: (count,) distance to the nearest finished run, as a share moved.
        before: Standard deviation of the differences in objective between mixtures that may be
            best.
        after: (count,) the same after the first of these runs, after the first two, and so on.
        notes: What to keep in mind, a sentence each.
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
        count: Number of runs to plan, which are to be done together.
        objective: As `Law.propose` takes it; so are `lower`, `upper` and `prior`.
        lower: Smallest shares.
        upper: Largest shares.
        prior: Mixture around which candidates are drawn, besides the mean of the runs.
        apart: Smallest distance to all runs and between the mixtures, as a share moved.
        draws: Number of laws that are drawn.
        candidates: Number of candidate mixtures.
        seed: Seed of candidates and laws.

    Raises:
        ValueError: `count` is below 1, the bounds leave fewer mixtures than `count`, or all laws
            drawn agree on which mixture is best.
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
    """Mixtures around the centres (c, k), with the widest draws around the first two."""
    mean = centres[:2].mean(0)
    parts = [centres]
    wide = [(c, a) for c in centres[:2] for a in CONCENTRATIONS]
    close = [(0.95 * c + 0.05 * mean, a) for c in centres[2:] for a in CLOSER]
    for pairs, share in ((wide, 0.5), (close, 0.3)):
        each = int(np.ceil(share * candidates / len(pairs)))
        # Concentrations must be positive: a domain without a share gets next to none
        parts += [rng.dirichlet(np.maximum(a * c, 1e-3), each) for c, a in pairs]
    ends = rng.integers(len(centres), size=(2, int(np.ceil(0.2 * candidates))))
    t = rng.uniform(size=(ends.shape[1], 1))
    return np.vstack([*parts, t * centres[ends[0]] + (1 - t) * centres[ends[1]]])


class _Simplex:
    """The simplex within bounds, on which mixtures are rounded to few decimals.

    Shares that no run varied, and those whose bounds leave no round number, keep all digits; the
    share with the most room takes up the remainder.
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
        """The distinct rounded mixtures nearest to p (n, k), in the order of p."""
        p = project(p, self.low, self.high)
        if self.decimals is not None:
            scale = 10**self.decimals
            p = np.array([self._rounded(q, scale) for q in project(p, self.least, self.most)])
        p = p[((p >= self.low - 1e-9) & (p <= self.high + 1e-9)).all(1)]
        return p[np.sort(np.unique(p, axis=0, return_index=True)[1])]

    def _rounded(self, p: np.ndarray, scale: int) -> np.ndarray:
        """Round to multiples of 1 / scale by the largest remainders; held shares stay."""
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
    """Pick candidates one after the other, each the one that lowers the variance most.

    Args:
        values: (draws, n) objective of each candidate under each law.
        noise: Variance of a run's objective.
        pool: (n, k) candidates.
        count: Number of candidates to pick.
        apart: Smallest distance between them, as a share moved.

    Returns:
        Indices of the picked candidates, the standard deviation before, and after each of them.
    """
    top = max(1, round(BEST * values.shape[1]))
    best = np.argpartition(values, top - 1, axis=1)[:, :top]
    weights = np.bincount(best.ravel(), minlength=values.shape[1]) / best.size
    region = np.flatnonzero(weights)
    w = weights[region]
    away = values - values.mean(0)
    contrast = away[:, region] - (away[:, region] @ w)[:, None]
    # Covariances: between the region's contrasts and all candidates, and between all candidates
    cross = contrast.T @ away / (len(values) - 1)
    full = away.T @ away / (len(values) - 1)
    variance = float(w @ (contrast**2).sum(0) / (len(values) - 1))
    if not variance > 1e-18 * max(1.0, float(np.square(values).mean())):
        raise ValueError(
            "`law`: all laws that fit the runs agree on what is best for `objective`, so no run "
            "would tell more. Use another objective or law, or `best_mixture`."
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
    """What to keep in mind, a sentence each."""
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
