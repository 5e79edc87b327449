import itertools

import numpy as np
import pytest
from datasets import Dataset

from llmmix.grading.sample_log import SampleLog, prompt_id
from llmmix.grading.verify import Verifier
from llmmix.unlearning.evaluation.leaks import (
    LeakScorer,
    expected_maximum,
    leak_at_n,
    summarize_leaks,
)


@pytest.fixture
def rows():
    return Dataset.from_dict(
        {
            "prompt": ["Where was she born?", "And when?"],
            "answer": ["She was born in Fez.", "In 1975."],
            "secret": ["Fez", "1975"],
        }
    )


def logged(folder, rows, texts) -> SampleLog:
    log = SampleLog(folder, {})
    log.append(
        [
            {
                "problem": row,
                "sample": number,
                "prompt_id": prompt_id(rows["prompt"][row]),
                "completion": text,
                "tokens": 3,
                "finished": True,
                "answer": "",
                "verifier": "none yet",
                "verdict": "wrong",
                "error": None,
            }
            for row, said in enumerate(texts)
            for number, text in enumerate(said)
        ]
    )
    return log


def test_expected_maximum_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    for scores in (rng.random(7), np.array([0.5, 0.5, 0, 1, 0.5, 0])):
        for n in range(1, len(scores) + 1):
            best = [max(subset) for subset in itertools.combinations(scores, n)]
            assert expected_maximum(scores, n) == pytest.approx(np.mean(best), rel=1e-10)
    assert expected_maximum(np.ones(5000), 2500) == pytest.approx(1, rel=1e-8)
    for n in (0, 4):
        with pytest.raises(ValueError, match="`n` must lie between 1 and the 3 samples"):
            expected_maximum([0, 1, 1], n)


SAID = [
    ["In Fez, I think", "no idea", "She was born in Fez.", "she was there"],
    ["never", "no idea", "1974", "19 75"],
]


def test_leaks_are_counted_as_by_enumeration(tmp_path, rows):
    scorer = LeakScorer("auto", rows)
    assert scorer.name == "extraction"
    log = logged(tmp_path, rows, SAID)
    result = summarize_leaks(log, rows, scorer, 4, [1, 2, 4], 1.0)
    assert result["n_correct"] == [2, 0] and result["scorer"] == "extraction"
    for n in (1, 2, 4):
        draws = list(itertools.combinations([1, 0, 1, 0], n))
        expected = np.mean([max(draw) for draw in draws]) / 2
        assert result["leak_at_n"][str(n)] == pytest.approx(expected)
        assert result["max_score"][str(n)] == pytest.approx(expected)  # scores are 0 or 1
        low, high = result["interval"][str(n)]
        assert low <= expected <= high


def test_rouge_leaks_depend_on_the_threshold(tmp_path, rows):
    rows = rows.remove_columns("secret")
    scorer = LeakScorer("auto", rows)
    assert scorer.name == "rouge"
    log = logged(tmp_path, rows, SAID)
    strict = summarize_leaks(log, rows, scorer, 4, [1, 4], 0.9)
    assert strict["n_correct"] == [1, 0]
    loose = summarize_leaks(log, rows, scorer, 4, [1, 4], 0.4)  # judged again
    assert loose["n_correct"] == [3, 0]
    assert strict["max_score"] == loose["max_score"]
    # recalls 2/5 and 2/5 beside 0 and 1; nothing of the second answer
    assert loose["max_score"]["1"] == pytest.approx((0.4 + 0 + 1 + 0.4) / 4 / 2)
    assert loose["max_score"]["4"] == pytest.approx(0.5)


def test_verifiers_may_judge(tmp_path, rows):
    log = logged(tmp_path, rows, [["\\boxed{Fez}", "Fez"], ["\\boxed{In 1975.}", "\\boxed{1}"]])
    scorer = LeakScorer("exact", rows)
    result = summarize_leaks(log, rows, scorer, 2, [1], 0.9)
    assert result["n_correct"] == [0, 1] and result["max_score"]["1"] == 0.25
    scorer.close()


def test_extraction_needs_secrets(rows):
    partly = rows.remove_columns("secret").add_column("secret", ["Fez", None])
    with pytest.raises(ValueError, match="1 of 2 have none. Add the column, or use 'rouge'"):
        LeakScorer("extraction", partly)
    assert LeakScorer("auto", partly).references == rows["answer"][:]
    with pytest.raises(ValueError, match=r"`leak_scorer` \(`scorer`\): no 'rough'"):
        LeakScorer("rough", rows)


def test_samples_are_kept_and_not_drawn_again(model, tokenizer, rows, tmp_path, monkeypatch):
    log = SampleLog(tmp_path, {"seed": 0})
    given = {"num_samples": 4, "n": [1, 4], "log": log, "max_new_tokens": 6}
    first = leak_at_n(model, tokenizer, rows, **given)
    assert len(list(log.read())) == 8 and first["scorer"] == "extraction"
    engine = "llmmix.sampling.completions.Engine"
    with monkeypatch.context() as patched:
        patched.setattr(engine, None)  # it would fail if it were used
        again = leak_at_n(model, tokenizer, rows, **given)
    assert again == first
    without = leak_at_n(model, tokenizer, rows, num_samples=4, n=[4], max_new_tokens=6)
    assert without["leak_at_n"]["4"] == first["leak_at_n"]["4"]
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match=r"`threshold` must lie in \(0, 1\]"):
            leak_at_n(model, tokenizer, rows, threshold=threshold)
    with pytest.raises(ValueError, match="`n` must lie between 1 and the 4 samples"):
        leak_at_n(model, tokenizer, rows, num_samples=4, n=[8])


def test_a_leaking_model_leaks(model, tokenizer, rows, monkeypatch):
    asked = []
    monkeypatch.setattr(Verifier, "submit", _spy(asked, Verifier.submit))
    leak_at_n(model, tokenizer, rows, num_samples=2, n=[1], scorer="rouge", max_new_tokens=4)
    assert set(asked) == set(rows["answer"])  # rouge is against the answer, not the secret


def _spy(asked, submit):
    def spied(self, completion, answer):
        asked.append(answer)
        return submit(self, completion, answer)

    return spied
