"""Numbers and files as the framework OpenUnlearning has them, its definitions where they differ.

For comparing with results published in its form, and for nothing else: what is measured here counts
an answer of no match as memorised by a share of 1/n, drops the last token of an answer whatever it
is, and adds 1e-10 where it divides. `llmmix.forgetting.metrics` has the corrected forms.

    SUITE_EVAL.json      {metric: {"agg_value": x, "value_by_index": {"0": {...}}}}
    SUITE_SUMMARY.json   {metric: x}
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmmix.unlearning.evaluation.metrics import membership_auc, min_k, min_k_plus_plus
from llmmix.unlearning.evaluation.scores import AnswerScore
from llmmix.unlearning.evaluation.texts import ROUGE_SCORES

EPSILON = 1e-10
PREFIXES = {"real_authors": "ra", "world_facts": "wf"}  # of what is known in that framework


def open_unlearning_exact_memorization(score: AnswerScore) -> float | None:
    """Share of tokens that are the most probable ones, the last not counted whatever it is."""
    right = _matches(score)
    return float(right.mean()) if len(right) else None


def open_unlearning_extraction_strength(score: AnswerScore) -> float:
    """1 - k/n, where a wrong last token gives k = n - 1, and no token gives 0."""
    right = _matches(score)
    if not len(right):
        return 0
    wrong = np.flatnonzero(~right)
    k = min(int(wrong[-1]) + 1 if len(wrong) else 0, len(right) - 1)
    return 1 - k / len(right)


def open_unlearning_truth_ratios(
    correct_nlls: Sequence[float], wrong_nlls: Sequence[Sequence[float]]
) -> np.ndarray:
    """P_wrong / (P_correct + 1e-10), with the geometric mean of the wrong ones."""
    wrong = np.exp(-np.array([np.mean(nlls) for nlls in wrong_nlls]))
    return wrong / (np.exp(-np.asarray(correct_nlls)) + EPSILON)


def open_unlearning_truth_value(ratios: np.ndarray, definition: str) -> float:
    """Mean of min(s, 1 / (s + 1e-10)) for `closer_to_1_better`, of max(0, 1 - s) otherwise."""
    if definition == "closer_to_1_better":
        return float(np.minimum(ratios, 1 / (ratios + EPSILON)).mean())
    return float(np.maximum(0, 1 - ratios).mean())


def open_unlearning_privleak(auc: float, reference_auc: float = 0.5) -> float:
    """100 ((1 - A) - (1 - A_ref)) / ((1 - A_ref) + 1e-10), however small the divisor."""
    return ((1 - auc) - (1 - reference_auc)) / ((1 - reference_auc) + EPSILON) * 100


def open_unlearning_document(
    items: Mapping[str, list[dict]],
    scores: Mapping[str, Sequence[AnswerScore | None]],
    retain_logs: Mapping | None = None,
    k: float = 0.4,
) -> dict[str, dict]:
    """All metrics that the sets allow, as SUITE_EVAL.json holds them.

    Args:
        items: Records of each set, as `llmmix.forgetting.items.measure_items` gives them.
        scores: The scores that they come from.
        retain_logs: Such a document of the retain model.
        k: Share of tokens of the Min-K attacks.
    """
    document: dict[str, dict] = {}
    for role, records in items.items():
        if role != "holdout":
            document |= _set_document(PREFIXES.get(role, role), role, records)
    forget = scores["forget"]
    for name, of in (
        ("exact_memorization", open_unlearning_exact_memorization),
        ("extraction_strength", open_unlearning_extraction_strength),
    ):
        document[name] = _entry([None if s is None else of(s) for s in forget], "score")
    if "holdout" in scores:
        document |= _attacks(items, scores, k)
        reference = (retain_logs or {}).get("mia_min_k", {}).get("agg_value")
        auc = document["mia_min_k"]["agg_value"]
        if auc is not None:
            value = open_unlearning_privleak(auc, 0.5 if reference is None else reference)
            document["privleak"] = {"agg_value": value}
    document["forget_quality"] = {"agg_value": _quality(document, retain_logs)}
    kept = [PREFIXES.get(role, role) for role in items if role not in ("forget", "holdout")]
    document["model_utility"] = {"agg_value": _utility(document, kept)}
    return document


def write_open_unlearning(folder: str | Path, document: Mapping, suite: str = "TOFU") -> None:
    """Write SUITE_EVAL.json and SUITE_SUMMARY.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = {name: entry["agg_value"] for name, entry in document.items()}
    for name, content in (("EVAL", document), ("SUMMARY", summary)):
        text = json.dumps(_without_nan(content), indent=4)
        (folder / f"{suite}_{name}.json").write_text(text)


def _matches(score: AnswerScore) -> np.ndarray:
    return (score.labels == score.predictions)[:-1]


def _entry(values: Sequence[float | None], key: str) -> dict:
    known = [value for value in values if value is not None]
    by_index = {str(index): {key: value} for index, value in enumerate(values)}
    return {"agg_value": float(np.mean(known)) if known else None, "value_by_index": by_index}


def _probabilities(nlls: Sequence) -> dict:
    """Of one answer an item, or of several, which are averaged first."""
    values, by_index = [], {}
    for index, nll in enumerate(nlls):
        if nll is None or nll == []:
            by_index[str(index)] = None
            continue
        prob = np.exp(-np.asarray(nll))
        by_index[str(index)] = {"prob": prob.tolist(), "avg_loss": nll}
        values.append(prob.mean())
    return {"agg_value": float(np.mean(values)) if values else None, "value_by_index": by_index}


def _set_document(prefix: str, role: str, records: list[dict]) -> dict[str, dict]:
    document = {f"{prefix}_Q_A_Prob": _probabilities([r["nll"] for r in records])}
    said = [r for r in records if r["generation"] is not None]
    if said:
        names = {"input": "question", "ground_truth": "answer", "generation": "generation"}
        by_index = {
            str(r["row"]): {n: r[n] or 0.0 for n in ROUGE_SCORES}
            | {n: r[o] for n, o in names.items()}
            for r in said
        }
        value = float(np.mean([given["rougeL_recall"] for given in by_index.values()]))
        document[f"{prefix}_Q_A_ROUGE"] = {"agg_value": value, "value_by_index": by_index}
    asked = [r for r in records if r["wrong_nlls"] and r["correct_nll"] is not None]
    if not asked:
        return document
    if role in ("forget", "retain"):
        document[f"{prefix}_Q_A_PARA_Prob"] = _probabilities([r["correct_nll"] for r in records])
    document[f"{prefix}_Q_A_PERT_Prob"] = _probabilities([r["wrong_nlls"] for r in records])
    # Of authors and facts the answer itself is the right one, whatever paraphrase there is
    right = "correct_nll" if role in ("forget", "retain") else "nll"
    columns = [r[right] for r in asked], [r["wrong_nlls"] for r in asked]
    ratios = open_unlearning_truth_ratios(*columns)
    named, definition = f"{prefix}_Truth_Ratio", "true_better"
    if role == "forget":
        named, definition = "forget_truth_ratio", "closer_to_1_better"
    document[named] = {
        "agg_value": open_unlearning_truth_value(ratios, definition),
        "value_by_index": {
            str(r["row"]): {"score": float(s)} for r, s in zip(asked, ratios, strict=True)
        },
    }
    if role not in ("forget", "retain"):
        known = [r for r in asked if r["nll"] is not None]
        chances = {str(r["row"]): {"prob": _among_options(r)} for r in known}
        value = float(np.mean([c["prob"] for c in chances.values()])) if chances else None
        normalised = {"agg_value": value, "value_by_index": chances}
        document[f"{prefix}_Q_A_Prob_normalised"] = normalised
    return document


def _among_options(record: dict) -> float:
    right, wrong = math.exp(-record["nll"]), np.exp(-np.array(record["wrong_nlls"])).sum()
    return float(right / (right + wrong + EPSILON))


def _attacks(items: Mapping, scores: Mapping, k: float) -> dict[str, dict]:
    def least(score: AnswerScore) -> float:
        return min_k(score.token_logps[:-1], k) or 0.0

    def least_standardised(score: AnswerScore) -> float:
        parts = (score.token_logps, score.means, score.variances)
        return min_k_plus_plus(*(part[:-1] for part in parts), k) or 0.0

    columns = {"mia_min_k": least, "mia_min_k_plus_plus": least_standardised}
    document = {}
    for name in ("mia_loss", "mia_zlib", *columns):
        sides = {}
        for role in ("forget", "holdout"):
            if name in columns:
                values = [None if s is None else columns[name](s) for s in scores[role]]
            else:
                values = [r["nll" if name == "mia_loss" else "zlib"] for r in items[role]]
            sides[role] = _entry(values, "score")
        known = [
            [v["score"] for v in side["value_by_index"].values() if v["score"] is not None]
            for side in sides.values()
        ]
        auc = membership_auc(*known, resamples=1).value
        document[name] = sides | {"auc": auc, "agg_value": auc}
    return document


def _quality(document: Mapping, retain_logs: Mapping | None) -> float | None:
    """The p of the Kolmogorov-Smirnov test between the truth ratios of the two documents."""
    from scipy.stats import ks_2samp

    sides = [
        [
            v["score"]
            for v in (given or {}).get("forget_truth_ratio", {}).get("value_by_index", {}).values()
        ]
        for given in (document, retain_logs)
    ]
    return float(ks_2samp(*sides).pvalue) if all(sides) else None


def _utility(document: Mapping, prefixes: Sequence[str]) -> float | None:
    from scipy.stats import hmean

    values = []
    for prefix in prefixes:
        raw = document.get(f"{prefix}_Q_A_Prob")
        chances = document.get(f"{prefix}_Q_A_Prob_normalised", raw)
        others = (document.get(f"{prefix}_{name}") for name in ("Q_A_ROUGE", "Truth_Ratio"))
        values += [entry["agg_value"] for entry in (chances, *others) if entry]
    return float(hmean(values)) if values and None not in values else None


def _without_nan(content):
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
