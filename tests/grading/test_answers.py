import pytest

from llmmix.grading import boxed_answer, choice, exact, normalized


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        ("4", None),
    ],
)
def test_boxed_answer(text, answer):
    assert boxed_answer(text) == answer


def test_exact_ignores_spaces_alone():
    assert exact(r"\boxed{ 1 2 }", "12") and exact(r"\boxed{7}", 7)
    assert exact(r"\boxed{12.0}", "12") is False and exact("12", "12") is None


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("The Eiffel Tower.", "eiffel tower", True),
        (r"I say \boxed{Paris}", "paris!", True),
        ("Lyon", "Paris", False),
        (" ... ", "Paris", None),
    ],
)
def test_normalized(completion, answer, verdict):
    assert normalized(completion, answer) is verdict


def test_references_that_cannot_be_met_are_no_wrong_answers():
    with pytest.raises(ValueError, match="is not a letter"):
        choice("B", "option B")
    with pytest.raises(ValueError, match="no word left"):
        normalized("+", "+")


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("The answer is (B).", "B", True),
        ("Answer: C", "(C)", True),
        (r"Thus \boxed{\text{D}}", "D", True),
        ("B. Paris", "B", True),
        ("A", "A", True),
        ("I think that C is right.", "C", True),
        ("The answer is A, no, the answer is D", "D", True),
        ("A dog and I went out", "A", None),
        ("nothing", "A", None),
        ("The answer is (B).", "A", False),
        ("A) one\nB) two\nC) three\nSo B is correct", "B", True),
        ("**Answer:** A", "A", True),
        ("the correct answer is option A", "A", True),
        ("The final answer is $A$", "A", True),
        ("Answer: I think B", "B", True),
        (r"\boxed{\mathbf{B}}", "B", True),
        (r"\boxed{Bob}", "B", None),
    ],
)
def test_choice(completion, answer, verdict):
    assert choice(completion, answer) is verdict
