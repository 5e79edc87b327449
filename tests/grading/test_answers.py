import unicodedata

import pytest

from llmmix.grading import boxed_answer, choice, exact, normalized


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\fbox{7}, $\boxed 8$.", "8"),
        (r"\boxed{\boxed{9}}", "9"),
        ("4", None),
    ],
)
def test_boxed_answer(text, answer):
    assert boxed_answer(text) == answer


def test_exact_ignores_spaces_alone():
    assert exact(r"\boxed{ 1 2 }", "12") and exact(r"\boxed{7}", 7)
    assert exact(r"\boxed{12.0}", "12") is False and exact("12", "12") is None


def test_exact_takes_forms_of_one_character_as_the_same():
    for given, answer in (("Zu\u0308rich", "Zürich"), ("−５", "-5"), ("5\u00a0000", "5000")):
        assert exact(rf"\boxed{{{given}}}", answer)
    assert exact(r"\boxed{x2}", "x²") is False
    assert exact(r"<think>\boxed{1}</think>\boxed{2}", "2")


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("The Eiffel Tower.", "eiffel tower", True),
        (r"I say \boxed{Paris}", "paris!", True),
        ("Lyon", "Paris", False),
        (" ... ", "Paris", None),
        (unicodedata.normalize("NFD", "Café Zürich"), "Café Zürich", True),
        ("“Paris”。", "Paris", True),
        ("STRASSE", "Straße", True),
        ("the\u00a0Eiffel\u200b Tower", "Eiffel Tower", True),
        ("<think>Lyon? No.</think> Paris", "Paris", True),
        ("１，０００", "1000", True),
        ("3.14", "31.4", False),
        ("−5", "-5", True),
        ("-5.", "5", False),
        ("No. 5", "no 5", True),
        (".5", "0.5", True),
        ("1.5", "15", False),
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
        ("It is \\boxed{\\langle H\\rangle \\ll \\Delta E}, so\n**Answer: D**", "D", True),
        (r"\boxed{x = 3}. The answer is B.", "B", True),
        (r"\boxed{B}, as \boxed{\frac12} is too small", "B", True),
        (r"$\boxed{\textbf{(C)}\ 3}$", "C", True),
        (r"\boxed{\text{Option }b}", "B", True),
        (r"<think>\boxed{A}</think> The answer is C", "C", True),
        ("<think>The answer is A.</think>B", "B", True),
        ("<answer>D</answer>", "D", True),
        ("**D**", "D", True),
        ("option d", "D", True),
        ("the answer is (d)", "D", True),
        ("Answer: D because it is", "D", True),
        ("the answer is A because", "A", True),
        ("Answer: A dog", "A", None),
        ("the answer is a dog", "A", None),
        (r"Answer: \text{D}", "D", True),
        ('{"answer": "C"}', "C", True),
        ("Answer：Ｄ", "D", True),
        ("答案是D", "D", True),
        ("Options A, B, and C are wrong. So D", "D", True),
        ("Answer: B or C", "C", None),
        ("It is not B", "B", None),
        ("the answer is E=mc^2", "E", None),
        ("(A) 1\n(B) 2\n(C) 3\n\nThe answer is (C) 3", "C", True),
        ("(b)", "B", True),
        ("a", "A", True),
    ],
)
def test_choice(completion, answer, verdict):
    assert choice(completion, answer) is verdict
