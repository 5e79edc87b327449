import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from llmmix.grading import pass_at_n
from llmmix.grading.evaluation import evaluate


def test_evaluate_counts_what_the_verifier_says(model, checkpoint, math_rows):
    loaded = model, AutoTokenizer.from_pretrained(checkpoint)
    seen = []

    def verify(completion, answer):
        seen.append(answer)
        return len(seen) % 2 == 0

    rows = math_rows.select(range(3))
    result = evaluate(
        *loaded, rows, num_samples=4, n=[4, 2, 1], verifier=verify, max_new_tokens=8, seed=1
    )
    assert sum(result["n_correct"]) == 6 and result["verdicts"]["wrong"] == 6
    assert sorted(seen) == sorted(a for a in rows["answer"] for _ in range(4))
    assert list(result["pass_at_n"]) == ["1", "2", "4"]
    for n, value in result["pass_at_n"].items():
        assert value == pytest.approx(pass_at_n(4, result["n_correct"], int(n)).mean())
        low, high = result["interval"][n]
        assert low <= value <= high
    assert result["estimator"] == "unbiased" and result["problems"] == {"1": 3, "2": 3, "4": 3}
    with pytest.raises(ValueError, match="`n` must lie between 1 and the 4 samples"):
        evaluate(*loaded, rows, num_samples=4, n=[8])
    blank = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", " "]})
    with pytest.raises(ValueError, match=r"Row 1 has no `answer` \(1 such rows\)"):
        evaluate(*loaded, blank, num_samples=4, n=[1])
