"""The best mixture of a fitted law, under the objective and bounds that a user asks for.

    min_p  sum_i u_i L_i(p) + closeness KL(p | prior),   lower <= p <= upper,   sum p = 1

The request is read in llmmix/laws/objective.py; llmmix/laws/search.py has the searches.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from llmmix.laws.accuracy import weighted
from llmmix.laws.inputs import Inputs, canonical_order
from llmmix.laws.objective import Objective, Shares, law_bounds, prior_shares, target_weights
from llmmix.laws.search import Found, minimize_mixture, sample_mixture

TINY = 1e-12  # shares below it count as this in a KL divergence, which stays finite


class MixtureProposer:
    """Base class that proposes mixtures, for a law with losses of mixtures and perhaps slopes."""

    smooth: bool  # whether `_slopes` is defined
    inputs_: Inputs

    def _losses(self, X: np.ndarray) -> np.ndarray:
        """(n, m) losses of mixtures (n, k)."""
        raise NotImplementedError

    def _slopes(self, X: np.ndarray) -> np.ndarray:
        """(n, m, k) slopes of the losses in the shares."""
        raise NotImplementedError

    def best_mixture(self, objective: Objective = None, **options: Any) -> np.ndarray:
        """(k,) the mixture at which the law is best; takes the arguments of `propose`."""
        return self.propose(objective, **options).mixture

    def propose(
        self,
        objective: Objective = None,
        *,
        prior: Shares = None,
        closeness: float = 0.0,
        method: str = "auto",
        seed: int = 0,
        **limits: Any,
    ) -> Found:
        """The mixture at which the law is best, and how it was found.

        Args:
            objective: None for the mean over targets, a target's name, or weights of the targets (m
                numbers, or by name).
            prior: Mixture to stay close to, (k,) or by name. Default: the mean of the runs.
            closeness: Nats of loss that a KL divergence of 1 from the prior is worth.
            method: "gradient"; "sample" as RegMix does (the mean of the best 128 of 100,000
                Dirichlet draws around the prior); or "auto", gradient where the law has one.
            seed: Seed of the draws.
            **limits: lower, upper, available, tokens and max_epochs, as `objective.bounds_of` takes
                them. Domains that no run varied keep their share, whatever the bounds.

        Raises:
            ValueError: A name or method is unknown, the weights are not valid, or no mixture meets
                the bounds.
        """
        weights = self.target_weights(objective)
        low, high = law_bounds(self.inputs_, **limits)
        if closeness < 0 or not np.isfinite(closeness):
            raise ValueError(f"`closeness` must be 0 or more, got {closeness}.")
        anchor = prior_shares(prior, self.inputs_)
        slopes = self._slopes if self._method(method) == "gradient" else None
        request = weights, low, high, anchor, closeness
        return search_law(self._losses, slopes, self.inputs_, *request, seed)

    def target_weights(self, objective: Objective = None) -> np.ndarray:
        """(m,) weights of sum 1 that an objective gives the targets.

        Raises:
            ValueError: A name is unknown, or the weights are negative or all zero.
        """
        self._check_fitted()
        return target_weights(objective, self.inputs_.targets)

    def _method(self, method: str) -> str:
        if method == "auto":
            return "gradient" if self.smooth else "sample"
        if method not in ("gradient", "sample") or (method == "gradient" and not self.smooth):
            raise ValueError(
                f"`search` (`method`) must be auto, gradient or sample, got {method!r} for "
                f"{type(self).__name__}{'' if self.smooth else ', which has no gradient'}."
            )
        return method

    def _check_fitted(self) -> None:
        if not hasattr(self, "_fitted"):
            raise ValueError(f"{type(self).__name__} is not fitted: call `fit` first.")


def best_runs(inputs: Inputs, weights: np.ndarray, count: int = 5) -> np.ndarray:
    """(count, k) mixtures of the runs with the smallest objective, the best first.

    Args:
        inputs: The runs, of which one without a loss that has a weight comes last.
        weights: (m,) weights of the targets.
        count: Number of runs; fewer are returned where there are fewer.
    """
    objective = weighted(np.nan_to_num(inputs.losses, nan=np.inf), weights)
    return inputs.mixtures[np.argsort(objective, kind="stable")[:count]]


def search_law(
    losses: Callable[[np.ndarray], np.ndarray],
    slopes: Callable[[np.ndarray], np.ndarray] | None,
    inputs: Inputs,
    weights: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    prior: np.ndarray,
    closeness: float,
    seed: int,
) -> Found:
    """The mixture within bounds at which a law's objective is smallest.

    Args:
        losses: Maps mixtures (n, k) to losses (n, m).
        slopes: Maps mixtures (n, k) to slopes (n, m, k), for a gradient search. None: sample, as
            RegMix does.
        inputs: The runs behind the law; the best of them are starts of a gradient search.
        weights: (m,) weights of the targets.
        low: (k,) smallest shares.
        high: (k,) largest shares.
        prior: (k,) mixture to stay close to, around which samples are drawn.
        closeness: Nats of loss that a KL divergence of 1 from the prior is worth.
        seed: Seed of the draws.
    """
    anchor = np.log(np.maximum(prior, TINY))

    def value(p: np.ndarray) -> np.ndarray:
        found = losses(p) @ weights
        if closeness:
            found = found + closeness * (p * (np.log(np.maximum(p, TINY)) - anchor)).sum(1)
        return found

    if slopes is None:
        # Drawn in an order of the domains that does not depend on how they came
        order = canonical_order(inputs.mixtures, inputs.losses)[1]
        back = np.argsort(order)
        bounds = low[order], high[order], prior[order]
        found = sample_mixture(lambda p: value(p[:, back]), *bounds, seed=seed)
        at = tuple(sorted(order[list(found.at_bounds)].tolist()))
        return replace(found, mixture=found.mixture[back], at_bounds=at)

    def slope(p: np.ndarray) -> np.ndarray:
        found = np.einsum("nmk,m->nk", slopes(p), weights)
        if closeness:
            found = found + closeness * (np.log(np.maximum(p, TINY)) - anchor + 1)
        return found

    starts = np.vstack([prior, np.full(len(prior), 1 / len(prior)), best_runs(inputs, weights)])
    return minimize_mixture(value, slope, low, high, starts)
