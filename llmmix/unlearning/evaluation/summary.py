"""The metrics of unlearning, from the items of each set; nothing here runs a model.

A metric is an entry of a document: a `value` (None with a `reason`), a `direction`, and what else
belongs to it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from llmmix.grading.estimators import bootstrap_interval
from llmmix.unlearning.evaluation.items import Item
from llmmix.unlearning.evaluation.membership import membership_auc, privacy_leakage
from llmmix.unlearning.evaluation.texts import distinct
from llmmix.unlearning.evaluation.truth import forget_quality, option_probability, truth_ratio
from llmmix.unlearning.evaluation.utility import model_utility
from llmmix.unlearning.evaluation.vectors import Numbers, mean_of

Metric: TypeAlias = dict[str, Any]
Fluency: TypeAlias = Callable[[list[str]], Sequence[float]]

APART = ("forget", "holdout")  # sets that are no part of the model utility
DIRECTIONS = ("lower", "higher", "retained")  # better values; retained: near the retain model's
ATTACKS = {  # the field of an item that each membership attack goes by
    "mia_loss": "nll",
    "mia_zlib": "zlib",
    "mia_min_k": "min_k",
    "mia_min_k_plus_plus": "min_k_plus_plus",
    "mia_gradnorm": "gradient_norm",
    "mia_reference": "reference_nll",
}
RESAMPLES = 2000


def metric(direction: str, value: float | None = None, **rest: Any) -> Metric:
    """The entry of one metric in a document.

    Args:
        direction: One of `DIRECTIONS`.
        value: The number; None where there is none.
        **rest: Further entries, such as `n`, `interval`, and `reason` without a value.
    """
    return {"value": value, "direction": direction, **rest}


def summarize(
    items: Mapping[str, list[Item]],
    data: Mapping[str, str],
    retained: dict[str, Any] | None = None,
    fluency: Fluency | None = None,
) -> dict[str, Metric]:
    """All metrics that the sets allow.

    Args:
        items: Items of each set, as the passes have filled them in.
        data: Digest of each set's rows.
        retained: The document of the model trained without the forget set.
        fluency: Scores texts, higher for more fluent ones.
    """
    metrics: dict[str, Metric] = {}
    for role, given in items.items():
        metrics |= set_metrics(role, given)
        metrics |= fluency_metrics(role, given, fluency)
    metrics["forget_quality"] = quality_metric(metrics["forget_truth_ratio"], retained)
    metrics["model_utility"] = utility_metric(metrics, [r for r in items if r not in APART])
    return metrics | membership_metrics(items, data, retained)


def set_metrics(role: str, items: Sequence[Item]) -> dict[str, Metric]:
    """Likelihood, answers and truth ratios of one set, by `ROLE_metric`."""
    better = {"forget": "lower", "holdout": "retained"}.get(role, "higher")
    chances, named = [item.probability for item in items], "probability"
    if role not in (*APART, "retain") and any(item.wrong_nlls for item in items):
        chances, named = list(map(_among_options, items)), "probability among the options"
    too_long = "no answer fits the context, or the model's likelihoods are not finite"
    silent = "no prompts to answer, or no words in the references: see `rouge_tokenize`"
    likely = _mean(better, chances, too_long) | {"kind": named}
    said = _mean(better, [item.rougeL_recall for item in items], silent)
    metrics = {f"{role}_probability": likely, f"{role}_rouge": said, **_truth(role, items)}
    if role in APART:
        exact = [item.exact_memorization for item in items]
        strength = [item.extraction_strength for item in items]
        metrics[f"{role}_exact_memorization"] = _mean(better, exact, too_long)
        metrics[f"{role}_extraction_strength"] = _mean(better, strength, too_long)
        secrets = [item.secret_said for item in items]
        if any(told is not None for told in secrets):
            metrics[f"{role}_secret_said"] = _mean(better, secrets, silent)
    return metrics


def _among_options(item: Item) -> float | None:
    known = item.nll is not None and item.wrong_nlls
    return option_probability(item.nll, item.wrong_nlls) if known else None


def _mean(direction: str, numbers: Numbers, reason: str) -> Metric:
    """Mean over the items that have a number, with an interval over items."""
    values = np.asarray(numbers, dtype=float)  # None is NaN
    value, dropped = mean_of(values)
    if value is None:
        return metric(direction, reason=reason, n=0, dropped=dropped)
    kept = values[np.isfinite(values)]
    low, high = bootstrap_interval(kept, resamples=RESAMPLES)
    bounds = [float(low), float(high)] if len(kept) > 1 else None
    return metric(direction, value, interval=bounds, n=len(kept), dropped=dropped)


def _truth(role: str, items: Sequence[Item]) -> dict[str, Metric]:
    """Truth ratios of the items that have wrong answers to compare with."""
    definition = "closer_to_1_better" if role in APART else "true_better"
    direction = "retained" if role in APART else "higher"
    asked = [item for item in items if item.wrong_nlls and item.correct_nll is not None]
    name, chance_name = f"{role}_truth_ratio", f"{role}_prob_mean"
    if not asked:
        reason = "needs rows with `perturbed_answer`"
        missing = (metric(direction, reason=reason) for _ in range(2))
        return dict(zip((name, chance_name), missing, strict=True))
    nlls = [item.correct_nll for item in asked], [item.wrong_nlls for item in asked]
    wanted, chance = truth_ratio(*nlls, definition), truth_ratio(*nlls, "prob_mean")
    broken = "the model's likelihoods are not finite"
    without = {"without": len(items) - len(asked)}
    ratio = _mean(direction, wanted.scores, broken) | {"definition": definition} | without
    return {
        name: ratio | {"ratios": wanted.ratios.tolist()},
        chance_name: _mean(direction, chance.scores, broken) | without,
    }


def fluency_metrics(
    role: str, items: Sequence[Item], fluency: Fluency | None = None
) -> dict[str, Metric]:
    """Repetition and emptiness of the answers, their perplexity and their fluency."""
    texts = [item.generation for item in items]
    said = [text for text in texts if text]
    if role == "holdout" or all(text is None for text in texts):
        return {}
    silent = "no answer is long enough"
    metrics = {
        f"{role}_repetition": _mean("lower", [item.repetition for item in items], silent),
        f"{role}_empty": _mean("lower", [t is not None and not t for t in texts], silent),
    }
    share = distinct(said)
    if share is not None:
        metrics[f"{role}_distinct"] = metric("higher", share, n=len(said))
    if "perplexity" in items[0].under_original:
        found = [item.perplexity for item in items if item.perplexity is not None]
        log_mean, dropped = mean_of(np.log(found)) if found else (None, 0)
        value = None if log_mean is None else float(np.exp(log_mean))
        metrics[f"{role}_perplexity"] = metric("lower", value, n=len(found), dropped=dropped)
    if fluency is not None and said:
        metrics[f"{role}_fluency"] = _mean("higher", list(fluency(said)), silent)
    return metrics


def quality_metric(truth: Metric, retained: dict[str, Any] | None) -> Metric:
    """Forget quality, from the truth ratios of the forget set and those of the retain model.

    Args:
        truth: The metric `forget_truth_ratio`.
        retained: The document of the model trained without the forget set.
    """
    if "ratios" not in truth:
        return metric("higher", reason=truth["reason"])
    if retained is None:
        return metric("higher", reason="needs --retain_model or --retain_log")
    theirs = retained["metrics"]["forget_truth_ratio"].get("ratios")
    if not theirs:
        return metric("higher", reason="the retain model has no truth ratios on this set")
    test = asdict(forget_quality(truth["ratios"], theirs))
    reason = test.pop("reason")
    return metric("higher", test.pop("p_value"), **test, **({"reason": reason} if reason else {}))


def utility_metric(metrics: Mapping[str, Metric], roles: Sequence[str]) -> Metric:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio, where a set has them.

    Args:
        metrics: What `set_metrics` returned for each set.
        roles: Sets of what should be kept.
    """
    if not roles:
        return metric("higher", reason="needs a retain set or facts")
    names = [f"{role}_{part}" for role in roles for part in ("probability", "rouge", "truth_ratio")]
    components = {n: metrics[n]["value"] for n in names if metrics[n]["value"] is not None}
    # A model that has broken down has undefined numbers: leaving them out would flatter it
    undefined = [n for n in names if n not in components and metrics[n].get("dropped")]
    # ROUGE is missing for another cause, where nothing is asked or no word is known
    if broken := [n for n in undefined if not n.endswith("_rouge")]:
        return metric("higher", reason=f"{', '.join(broken)}: {metrics[broken[0]]['reason']}")
    missing = [name for name in names if name not in components]
    if not components:
        return metric("higher", reason=metrics[names[0]]["reason"])
    utility = model_utility(components)
    rest = {"components": components, "collapsed": list(utility.collapsed), "missing": missing}
    return metric("higher", utility.value, least=utility.least, **rest)


def membership_metrics(
    items: Mapping[str, Sequence[Item]], data: Mapping[str, str], retained: dict[str, Any] | None
) -> dict[str, Metric]:
    """AUC of each attack against the holdout set, and the privacy leakage that Min-K's gives.

    Arguments are those of `summarize`.
    """
    metrics = {name: _attack(items, field) for name, field in ATTACKS.items()}
    auc = metrics["mia_min_k"]["value"]
    if auc is None:
        reason = metrics["mia_min_k"]["reason"]
        return metrics | {"privacy_leakage": metric("retained", reason=reason)}
    reference = None
    if retained is not None and retained["data"].get("holdout") == data["holdout"]:
        reference = retained["metrics"]["mia_min_k"]["value"]
    reference_auc = 0.5 if reference is None else reference
    value = privacy_leakage(auc, reference_auc)
    broken = {"reason": "the retain model's AUC is 1"} if math.isnan(value) else {}
    leakage = metric(
        "retained",
        None if broken else value,
        reference_auc=reference_auc,
        reference="chance" if reference is None else "the retain model",
        **broken,
    )
    return metrics | {"privacy_leakage": leakage}


def _attack(items: Mapping[str, Sequence[Item]], field: str) -> Metric:
    if "holdout" not in items:
        return metric("retained", reason="needs a holdout set")
    forget, holdout = ([getattr(item, field) for item in items[role]] for role in APART)
    if all(value is None for value in forget):
        needs = {"reference_nll": "needs --original", "gradient_norm": "needs --gradient_norms"}
        return metric("retained", reason=needs.get(field, "no item was scored"))
    sides = ([value for value in side if value is not None] for side in (forget, holdout))
    found = asdict(membership_auc(*sides))
    reason = found.pop("reason")
    found["interval"] = None if found["interval"] is None else list(found["interval"])
    return metric("retained", **found) | ({"reason": reason} if reason else {})
