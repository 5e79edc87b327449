import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from llmmix import data
from llmmix.unlearning.evaluation.document import (
    as_rows,
    evaluate_unlearning,
    read_document,
    write_document,
)
from llmmix.unlearning.evaluation.membership import membership_auc
from llmmix.unlearning.evaluation.scores import score_answers
from llmmix.unlearning.evaluation.texts import rouge, unicode_words
from llmmix.unlearning.evaluation.truth import option_probability, truth_ratio
from tests.dying import dies_at


@pytest.fixture(scope="module")
def sets():
    splits = data.load_splits("builtin:authors")
    return {role: splits[role].take(6) for role in ("forget", "retain", "holdout", "facts")}


@pytest.fixture
def other(checkpoint):
    """Another random model of the same kind: stands for one trained without the forget set."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(1)
    model.lm_head.weight.data += 0.1 * torch.randn_like(model.lm_head.weight)
    return model


FEW = {"max_new_tokens": 6}


def test_metrics_follow_from_the_items(model, tokenizer, sets):
    model.train()
    result = evaluate_unlearning(model, tokenizer, sets, gradient_norms=True, **FEW)
    assert model.training
    metrics, items = result["metrics"], result["items"]
    rows = as_rows(sets["forget"], "forget", tokenizer)
    scores = score_answers(model, tokenizer, rows)
    chances = [np.exp(-score.nll) for score in scores]
    assert metrics["forget_probability"]["value"] == pytest.approx(np.mean(chances), rel=1e-4)
    paraphrased = rows.remove_columns("answer").rename_column("paraphrased_answer", "answer")
    correct = [score.nll for score in score_answers(model, tokenizer, paraphrased)]
    wrong = []
    for place in range(3):
        answers = [texts[place] for texts in rows["perturbed_answer"]]
        other = rows.remove_columns("answer").add_column("answer", answers)
        wrong.append([score.nll for score in score_answers(model, tokenizer, other)])
    expected = truth_ratio(correct, np.transpose(wrong).tolist())
    assert metrics["forget_truth_ratio"]["value"] == pytest.approx(expected.value, rel=1e-4)
    assert metrics["forget_truth_ratio"]["ratios"] == pytest.approx(expected.ratios, rel=1e-4)
    for record, row in zip(items["forget"], rows, strict=True):
        assert (
            record["rougeL_recall"] == rouge(record["generation"], row["answer"])["rougeL_recall"]
        )
    facts = [option_probability(r["nll"], r["wrong_nlls"]) for r in items["facts"]]
    assert metrics["facts_probability"]["value"] == pytest.approx(np.mean(facts))
    auc = membership_auc(*([r["min_k"] for r in items[role]] for role in ("forget", "holdout")))
    assert metrics["mia_min_k"]["value"] == auc.value
    assert metrics["mia_gradnorm"]["value"] is not None
    assert metrics["privacy_leakage"]["reference"] == "chance"
    assert metrics["forget_quality"]["reason"] == "needs --retain_model or --retain_log"
    assert metrics["mia_reference"]["reason"] == "needs --original"
    # The right answer ends in EOS, which says nothing of whether it is memorised
    bare = [score.without_last(tokenizer.eos_token_id) for score in scores]
    found = [np.mean(s.labels == s.predictions) for s in bare]
    assert metrics["forget_exact_memorization"]["value"] == pytest.approx(np.mean(found))


def test_comparison_with_a_retain_model(model, other, tokenizer, sets):
    retained = evaluate_unlearning(other, tokenizer, sets, **FEW)
    given = {"retained": retained, "original": (other, tokenizer), **FEW}
    mine = evaluate_unlearning(
        model, tokenizer, sets, fluency=lambda texts: [1.0] * len(texts), **given
    )
    same = evaluate_unlearning(other, tokenizer, sets, **given)["metrics"]
    assert same["forget_quality"]["value"] == 1 and same["forget_quality"]["statistic"] == 0
    assert same["mia_reference"]["value"] == 0.5  # all differences are zero
    assert same["privacy_leakage"]["value"] == 0
    metrics = mine["metrics"]
    assert 0 < metrics["forget_quality"]["value"] <= 1
    assert metrics["forget_quality"]["n_retain"] == 6
    assert metrics["privacy_leakage"]["reference"] == "the retain model"
    assert metrics["forget_perplexity"]["value"] > 1 and metrics["forget_fluency"]["value"] == 1
    utility = metrics["model_utility"]
    assert len(utility["components"]) == 6 and utility["missing"] == []
    reread = json.loads(json.dumps({k: v for k, v in retained.items() if k != "items"}))
    again = evaluate_unlearning(model, tokenizer, sets, retained=reread, **FEW)
    assert again["metrics"]["forget_quality"] == metrics["forget_quality"]


def test_results_that_are_not_comparable_are_refused(model, tokenizer, sets):
    few = {"forget": sets["forget"].take(2)}
    retained = evaluate_unlearning(model, tokenizer, few, generate=False)

    def compare(other, **given):
        evaluate_unlearning(model, tokenizer, few, retained=other, generate=False, **given)

    compare(retained)
    for changed, message in (
        ({"version": 0}, "another metric version: 0, here"),
        ({"data": {"forget": "x"}}, "another forget set: 'x', here"),
        ({"definitions": {}}, "another definitions"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(retained | changed)
    with pytest.raises(ValueError, match="another definitions"):
        compare(retained, min_k=0.2)
    with pytest.raises(ValueError, match=r"lacks \['data', 'definitions', 'metrics', 'version'\]"):
        compare({"forget_truth_ratio": {}})
    other = {"forget": sets["forget"].select([0, 2])}
    with pytest.raises(ValueError, match="another forget set"):
        evaluate_unlearning(model, tokenizer, other, retained=retained, generate=False)


def test_overlap_is_refused(model, tokenizer, sets):
    mixed = Dataset.from_list([*sets["retain"].take(2), sets["forget"][3]])
    question = sets["forget"][3]["question"]
    for role in ("retain", "holdout", "facts"):
        with pytest.raises(
            ValueError, match=f"1 of 6 questions of `forget` stand in `{role}`"
        ) as e:
            evaluate_unlearning(model, tokenizer, {"forget": sets["forget"], role: mixed})
        assert question[:40] in str(e.value)
    with pytest.raises(ValueError, match="`sets` must hold `forget`"):
        evaluate_unlearning(model, tokenizer, {"retain": mixed})
    texts = Dataset.from_dict({"text": ["1+1=2", "2+2=4"]})
    with pytest.raises(ValueError, match="2 of 2 questions of `forget` stand in `retain`"):
        evaluate_unlearning(model, tokenizer, {"forget": texts, "retain": texts})


def test_plain_text_is_scored_and_not_asked(model, tokenizer):
    texts = Dataset.from_dict({"text": ["1+1=2", "2+2=4", "12-3=9"]})
    metrics = evaluate_unlearning(model, tokenizer, {"forget": texts}, **FEW)["metrics"]
    assert metrics["forget_probability"]["n"] == 3
    assert "no prompts to answer" in metrics["forget_rouge"]["reason"]
    assert metrics["forget_quality"]["reason"] == "needs rows with `perturbed_answer`"
    assert metrics["model_utility"]["reason"] == "needs a retain set or facts"


def test_a_broken_model_is_not_flattered(model, tokenizer, sets):
    good = evaluate_unlearning(model, tokenizer, sets, **FEW)
    model.model.norm.weight.data.fill_(float("nan"))
    broken = evaluate_unlearning(
        model,
        tokenizer,
        sets,
        retained=good,
        generate=False,
        **FEW,
    )["metrics"]
    assert broken["forget_quality"]["value"] is None
    assert "not finite" in broken["forget_quality"]["reason"]
    assert broken["model_utility"]["value"] is None
    assert "retain_probability" in broken["model_utility"]["reason"]
    assert broken["mia_loss"]["value"] is None and "not finite" in broken["mia_loss"]["reason"]
    assert broken["forget_probability"]["dropped"] == 6


def test_references_without_latin_words_are_not_scored_as_forgotten(model, tokenizer):
    rows = Dataset.from_dict({"question": ["1?", "2?"], "answer": ["她出生在卡拉奇", "born"]})
    plain = evaluate_unlearning(model, tokenizer, {"forget": rows}, **FEW)
    assert [r["rougeL_recall"] is None for r in plain["items"]["forget"]] == [True, False]
    assert plain["metrics"]["forget_rouge"]["dropped"] == 1
    other = evaluate_unlearning(
        model, tokenizer, {"forget": rows}, rouge_tokenize=unicode_words, **FEW
    )
    assert other["metrics"]["forget_rouge"]["dropped"] == 0


def test_a_kill_while_a_document_is_written_leaves_the_old_one(tmp_path):
    old = {"items": {"forget": [{"n": 1}]}, "metrics": {"m": 0.5}}
    new = {"items": {"forget": [{"n": n} for n in range(9)]}, "metrics": {"m": 0.25, "o": 1}}
    names = ("items.jsonl", "unlearning.json")
    for folder, document in (("old", old), ("new", new), ("run", old)):
        write_document(tmp_path / folder, document)
    texts = {name: [(tmp_path / f / name).read_text() for f in ("old", "new")] for name in names}
    for byte in range(0, 300, 13):
        died = dies_at(byte, lambda: write_document(tmp_path / "run", new))
        assert all((tmp_path / "run" / name).read_text() in texts[name] for name in names)
        assert died or (tmp_path / "run" / "unlearning.json").read_text() == texts[names[1]][1]
    assert not died


def test_half_a_retain_log_is_refused(tmp_path):
    (tmp_path / "unlearning.json").write_text('{"version": 1, "metr')
    with pytest.raises(ValueError, match="`retain_log`: .* is no whole JSON document"):
        read_document(tmp_path)
