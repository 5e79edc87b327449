import json

import pytest
from transformers import LlamaForCausalLM

from llmmix import data
from llmmix.unlearning.evaluation.document import as_rows
from llmmix.unlearning.evaluation.passes import (
    answer_items,
    ask_original,
    measure_items,
    score_items,
)
from llmmix.unlearning.evaluation.subject import MeasureOptions, Subject

GENERATED = (
    *("generation", "rouge1_recall", "rougeL_f1", "rougeL_recall"),
    *("secret_said", "repetition"),
)
OPTIONS = MeasureOptions(max_new_tokens=6)


@pytest.fixture
def asked(tokenizer):
    rows = data.load_splits("builtin:authors")["forget"].take(3)
    return as_rows(rows, "forget", tokenizer)


def test_each_pass_fills_in_its_own_part(model, tokenizer, asked):
    subject = Subject(tokenizer, lambda: model)
    scored = score_items(subject, asked, OPTIONS)
    answered = answer_items(subject, asked, scored, OPTIONS)
    for before, after in zip(scored, answered, strict=True):
        before, after = before.record(), after.record()
        assert all(before[name] is None for name in GENERATED)
        assert after["generation"] is not None and after["rougeL_recall"] is not None
        assert after["secret_said"] in (False, True)
        for name in set(before) - set(GENERATED):
            assert before[name] == after[name]
        assert json.loads(json.dumps(after)) == after
    assert answered == measure_items(subject, asked, OPTIONS)


def test_the_original_model_adds_what_it_was_asked(checkpoint, model, tokenizer, asked):
    subject = Subject(tokenizer, lambda: model)
    items = measure_items(subject, asked, OPTIONS)
    original = Subject(tokenizer, lambda: LlamaForCausalLM.from_pretrained(checkpoint))
    with_reference = ask_original(original, asked, items, OPTIONS)
    without = ask_original(original, asked, items, OPTIONS, reference=False)
    names = list(items[0].record())
    assert [list(item.record()) for item in with_reference] == [
        [*names, "perplexity", "reference_nll"] for _ in items
    ]
    assert [list(item.record()) for item in without] == [[*names, "perplexity"] for _ in items]
    # It is the same model here
    assert [item.reference_nll for item in with_reference] == pytest.approx([0, 0, 0], abs=1e-6)


def test_what_is_kept_loads_no_model(model, tokenizer, asked):
    kept = {}

    def keep(kind, data, options, compute):
        key = json.dumps([kind, data, options])
        kept[key] = json.loads(json.dumps(kept.get(key) or compute()))
        return kept[key]

    first = measure_items(Subject(tokenizer, lambda: model, keep), asked, OPTIONS)
    again = measure_items(Subject(tokenizer, lambda: None, keep), asked, OPTIONS)
    assert again == first and {json.loads(key)[0] for key in kept} == {
        "scores",
        "alternatives",
        "generations",
    }
