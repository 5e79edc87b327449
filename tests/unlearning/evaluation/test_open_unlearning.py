import zlib

import numpy as np
import pytest
from datasets import Dataset

from llmmix.unlearning.evaluation.items import Item
from llmmix.unlearning.evaluation.open_unlearning import (
    open_unlearning_document,
    open_unlearning_exact_memorization,
    open_unlearning_extraction_strength,
    open_unlearning_min_k,
    open_unlearning_min_k_plus_plus,
    open_unlearning_option_probability,
    open_unlearning_privleak,
    open_unlearning_truth_ratios,
    open_unlearning_truth_value,
)
from llmmix.unlearning.evaluation.passes import measure_items
from llmmix.unlearning.evaluation.scores import AnswerScore
from llmmix.unlearning.evaluation.subject import MeasureOptions, Subject


def score_of(labels, predictions) -> AnswerScore:
    zeros = np.zeros(len(labels))
    return AnswerScore(np.array(labels), zeros, np.array(predictions), zeros, zeros)


def test_definitions_of_open_unlearning():
    # The last token of each is dropped, whatever it is
    for labels, predictions, memorised, strength in (
        ([3, 4, 1, 2, 9], [3, 0, 1, 2, 9], 0.75, 0.5),
        ([2, 3, 9], [2, 3, 0], 1, 1),
        ([4, 4, 3, 9], [1, 1, 1, 9], 0, 1 / 3),
        ([9], [9], None, 0),
    ):
        score = score_of(labels, predictions)
        assert open_unlearning_exact_memorization(score) == memorised
        assert open_unlearning_extraction_strength(score) == pytest.approx(strength)
    wrong = [[1, 2, 3], [1.5, 1, 2], [1, 1, 1]]
    ratios = open_unlearning_truth_ratios([0.5, 2, 1], wrong)
    assert ratios == pytest.approx([0.223130, 1.648721, 1.0], abs=1e-6)
    for definition, value in (("closer_to_1_better", 0.609887), ("true_better", 0.258957)):
        assert open_unlearning_truth_value(ratios, definition) == pytest.approx(value, abs=1e-6)
    for pair, value in (((0.9, 0.5), -80), ((0.5, 0.45), -9.090909), ((0.98, 1.0), 2e8 * 100)):
        assert open_unlearning_privleak(*pair) == pytest.approx(value, rel=1e-6)
    chance = open_unlearning_option_probability(0.5, [1, 2, 3])
    assert chance == pytest.approx(0.523082, abs=1e-6)


def test_min_k_counts_a_share_as_that_framework_does():
    # 0.29 * 100 is 28.999... in floating point, of which it takes 28
    logps = -np.arange(101.0)[::-1]  # the last, -0, is dropped
    score = AnswerScore(np.arange(101), logps, np.arange(101), np.zeros(101), np.full(101, 4.0))
    assert open_unlearning_min_k(score, 0.29) == np.arange(73, 101).mean()
    assert open_unlearning_min_k_plus_plus(score, 0.29) == np.arange(73, 101).mean() / 2
    assert open_unlearning_min_k(score, 0.001) == 100
    assert open_unlearning_min_k(score_of([9], [9]), 0.4) == 0


@pytest.mark.parametrize(
    ("prompt", "answer", "packed"),
    [
        ("Question: Who?\nAnswer:", "Basil Kuwait", " Basil Kuwait"),
        ("Question: Who?\nAnswer: ", "Basil Kuwait", "Basil Kuwait"),
        ([{"role": "user", "content": "Who?"}], "Basil Kuwait", "Basil Kuwait"),
        ("", "7+1 is 8", "+1 is 8"),  # nothing predicts the first token
    ],
    ids=["text", "blank", "chat", "raw"],
)
def test_zlib_packs_the_text_of_the_scored_tokens(model, tokenizer, prompt, answer, packed):
    rows = Dataset.from_dict({"prompt": [prompt], "answer": [answer]})
    options = MeasureOptions(generate=False)
    (item,) = measure_items(Subject(tokenizer, lambda: model), rows, options)
    document = open_unlearning_document({"forget": [item], "holdout": [item]}, tokenizer)
    found = document["mia_zlib"]["forget"]["value_by_index"]["0"]["score"]
    assert found == item.nll / len(zlib.compress(packed.encode()))
    assert item.zlib == item.nll / len(zlib.compress(answer.encode()))


def test_rouge_has_latin_words_whatever_the_other_metrics_take(tokenizer):
    rouge = dict.fromkeys(("rouge1_recall", "rougeL_f1", "rougeL_recall"), 1.0)  # of Unicode's
    items = [Item(0, "q", " Она don't ждёт.\n", generation="Она do n't ждёт .", **rouge)]
    (entry,) = open_unlearning_document({"forget": items}, tokenizer)["forget_Q_A_ROUGE"][
        "value_by_index"
    ].values()
    assert entry["ground_truth"] == entry["generation"] == "Она don't ждёт."
    assert {entry[name] for name in rouge} == {1.0}
    items = [Item(0, "q", "Она", generation="Она", **rouge)]
    document = open_unlearning_document({"forget": items}, tokenizer)
    assert document["forget_Q_A_ROUGE"]["agg_value"] == 0  # it reads a-z and 0-9 alone
