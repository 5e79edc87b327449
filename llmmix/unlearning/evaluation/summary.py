"""The metrics of unlearning, from the records of each set; nothing here runs a model.

An entry has a `value` (None with a `reason`), a `direction`, and what else belongs to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from llmmix.grading.estimators import bootstrap_interval
from llmmix.unlearning.evaluation.metrics import (
    forget_quality,
    mean_of,
    membership_auc,
    model_utility,
    option_probability,
    privacy_leakage,
    truth_ratio,
)
from llmmix.unlearning.evaluation.texts import distinct

APART = ("forget", "holdout")  # sets that are no part of the model utility
DIRECTIONS = ("lower", "higher", "retained")  # which values are better; the last: the nearer
ATTACKS = {  # the field of a record that each membership attack goes by
    "mia_loss": "nll",
    "mia_zlib": "zlib",
    "mia_min_k": "min_k",
    "mia_min_k_plus_plus": "min_k_plus_plus",
    "mia_gradnorm": "gradient_norm",
    "mia_reference": "reference_nll",
}
RESAMPLES = 2000


def metric(direction: str, value: float | None = None, **rest) -> dict:
    """An entry of `metrics`."""
    return {"value": value, "direction": direction, **rest}


def _mean(direction: str, values: Sequence, reason: str) -> dict:
    """Mean over the items that have a number, with an interval over items."""
    values = np.array([math.nan if value is None else value for value in values], dtype=float)
    value, dropped = mean_of(values)
    if value is None:
        return metric(direction, reason=reason, n=0, dropped=dropped)
    kept = values[np.isfinite(values)]
    low, high = bootstrap_interval(kept, resamples=RESAMPLES)
    bounds = [float(low), float(high)] if len(kept) > 1 else None
    return metric(direction, value, interval=bounds, n=len(kept), dropped=dropped)


def set_metrics(role: str, records: list[dict]) -> dict[str, dict]:
    """Likelihood, answers and truth ratios of one set, by `ROLE_metric`."""
    better = {"forget": "lower", "holdout": "retained"}.get(role, "higher")
    column = {name: [record[name] for record in records] for name in records[0]}
    chances = column["probability"]
    named = "probability"
    if role not in (*APART, "retain") and any(column["wrong_nlls"]):
        named = "probability among the options"
        chances = [
            option_probability(record["nll"], record["wrong_nlls"])
            if record["nll"] is not None and record["wrong_nlls"]
            else None
            for record in records
        ]
    too_long = "no answer fits the context, or the model's likelihoods are not finite"
    silent = "no prompts to answer, or no words in the references: see `rouge_tokenize`"
    metrics = {
        f"{role}_probability": _mean(better, chances, too_long) | {"kind": named},
        f"{role}_rouge": _mean(better, column["rougeL_recall"], silent),
        **_truth(role, records),
    }
    if role in APART:
        for name in ("exact_memorization", "extraction_strength"):
            metrics[f"{role}_{name}"] = _mean(better, column[name], too_long)
        if any(said is not None for said in column["secret_said"]):
            metrics[f"{role}_secret_said"] = _mean(better, column["secret_said"], silent)
    return metrics


def _truth(role: str, records: list[dict]) -> dict[str, dict]:
    """Truth ratios of the rows that have wrong answers to compare with."""
    definition = "closer_to_1_better" if role in APART else "true_better"
    direction = "retained" if role in APART else "higher"
    asked = [r for r in records if r["wrong_nlls"] and r["correct_nll"] is not None]
    name = f"{role}_truth_ratio"
    if not asked:
        reason = "needs rows with `perturbed_answer`"
        return {
            name: metric(direction, reason=reason),
            f"{role}_prob_mean": metric(direction, reason=reason),
        }
    nlls = [r["correct_nll"] for r in asked], [r["wrong_nlls"] for r in asked]
    wanted, chance = truth_ratio(*nlls, definition), truth_ratio(*nlls, "prob_mean")
    broken = "the model's likelihoods are not finite"
    without = {"without": len(records) - len(asked)}
    ratio = _mean(direction, wanted.scores, broken) | {"definition": definition} | without
    return {
        name: ratio | {"ratios": wanted.ratios.tolist()},
        f"{role}_prob_mean": _mean(direction, chance.scores, broken) | without,
    }


def fluency_metrics(
    role: str, records: list[dict], fluency: Callable[[list[str]], Sequence[float]] | None = None
) -> dict[str, dict]:
    """Repetition and emptiness of the answers, and how fluent others find them."""
    texts = [record["generation"] for record in records]
    said = [text for text in texts if text]
    if role == "holdout" or all(text is None for text in texts):
        return {}
    silent = "no answer is long enough"
    metrics = {
        f"{role}_repetition": _mean("lower", [r["repetition"] for r in records], silent),
        f"{role}_empty": _mean("lower", [t is not None and not t for t in texts], silent),
    }
    value = distinct(said)
    if value is not None:
        metrics[f"{role}_distinct"] = metric("higher", value, n=len(said))
    if "perplexity" in records[0]:
        found = [r["perplexity"] for r in records if r["perplexity"] is not None]
        value, dropped = mean_of(np.log(found)) if found else (None, 0)
        value = None if value is None else float(np.exp(value))
        metrics[f"{role}_perplexity"] = metric("lower", value, n=len(found), dropped=dropped)
    if fluency is not None and said:
        metrics[f"{role}_fluency"] = _mean("higher", list(fluency(said)), silent)
    return metrics


def quality_metric(truth: dict, retained: dict | None) -> dict:
    """Forget quality, from the truth ratios of the forget set and those of the retain model."""
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


def utility_metric(metrics: dict[str, dict], roles: list[str]) -> dict:
    """Harmonic mean over sets of probability, ROUGE-L recall and truth ratio, where they are."""
    if not roles:
        return metric("higher", reason="needs a retain set or facts")
    names = [f"{role}_{part}" for role in roles for part in ("probability", "rouge", "truth_ratio")]
    components = {n: metrics[n]["value"] for n in names if metrics[n]["value"] is not None}
    # Where a model has broken down its numbers are undefined: leaving them out would flatter it
    undefined = [n for n in names if n not in components and metrics[n].get("dropped")]
    # ROUGE is absent, and not broken, where nothing is asked or no word is known
    if broken := [n for n in undefined if not n.endswith("_rouge")]:
        return metric("higher", reason=f"{', '.join(broken)}: {metrics[broken[0]]['reason']}")
    missing = [name for name in names if name not in components]
    if not components:
        return metric("higher", reason=metrics[names[0]]["reason"])
    utility = model_utility(components)
    rest = {"components": components, "collapsed": list(utility.collapsed), "missing": missing}
    return metric("higher", utility.value, least=utility.least, **rest)


def membership_metrics(items: dict, data: dict, retained: dict | None) -> dict[str, dict]:
    """AUC of each attack against the holdout set, and the privacy leakage that Min-K's gives."""
    metrics: dict[str, dict] = {}
    for name, field in ATTACKS.items():
        if "holdout" not in items:
            metrics[name] = metric("retained", reason="needs a holdout set")
        elif all(record.get(field) is None for record in items["forget"]):
            needs = {"reference_nll": "needs --original", "gradient_norm": "needs --gradient_norms"}
            metrics[name] = metric("retained", reason=needs.get(field, "no item was scored"))
        else:
            sides = ([r[field] for r in items[role] if r[field] is not None] for role in APART)
            found = asdict(membership_auc(*sides))
            reason = found.pop("reason")
            found["interval"] = None if found["interval"] is None else list(found["interval"])
            metrics[name] = metric("retained", **found) | ({"reason": reason} if reason else {})
    auc = metrics["mia_min_k"]["value"]
    if auc is None:
        metrics["privacy_leakage"] = metric("retained", reason=metrics["mia_min_k"]["reason"])
        return metrics
    known = retained is not None and retained["data"].get("holdout") == data["holdout"]
    reference = retained["metrics"]["mia_min_k"]["value"] if known else None
    value = privacy_leakage(auc, 0.5 if reference is None else reference)
    broken = {"reason": "the retain model's AUC is 1"} if math.isnan(value) else {}
    metrics["privacy_leakage"] = metric(
        "retained",
        None if broken else value,
        reference_auc=0.5 if reference is None else reference,
        reference="chance" if reference is None else "the retain model",
        **broken,
    )
    return metrics
