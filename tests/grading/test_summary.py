import pytest

from llmmix.grading.summary import summarize


def record(problem, sample, verdict, completion="", verifier="math"):
    fields = {"problem": problem, "sample": sample, "verdict": verdict, "completion": completion}
    return fields | {"tokens": 2, "finished": sample % 2 == 0, "verifier": verifier}


def test_failed_verifications_are_never_counted_as_wrong():
    records = [record(0, s, "right" if s < 2 else "failed") for s in range(4)]
    records += [record(1, s, "wrong" if s else "unparsable") for s in range(4)]
    result = summarize(records, 3, 4, [1, 2, 4], left_out=[2])
    assert result["n_judged"] == [2, 4, 0] and result["n_correct"] == [2, 0, 0]
    # pass@4 of the first problem cannot be known from two judged samples
    assert result["problems"] == {"1": 2, "2": 2, "4": 1}
    assert result["pass_at_n"] == {"1": 0.5, "2": 0.5, "4": 0.0}
    assert result["interval"]["4"] is None
    assert result["verdicts"] == {"right": 2, "wrong": 3, "unparsable": 1, "failed": 2}
    assert result["cut"] == 4 and result["left_out"] == [2]


def test_majority_votes_go_by_answer():
    said = [("7", "right"), ("7", "right"), ("8", "wrong"), ("9", "wrong"), ("", "unparsable")]
    records = [
        record(0, s, verdict, rf"so \boxed{{{answer}}}") for s, (answer, verdict) in enumerate(said)
    ]
    result = summarize(records, 1, 5, [1, 5], maj=True)
    assert result["maj_at_n"] == pytest.approx({"1": 0.4, "5": 1.0}, abs=0.03)
