import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from llmmix.grading.verify import Verifier, boxed_answer, choice, exact, judge, normalized


@pytest.fixture(scope="module")
def math_verifier():
    with Verifier("math", timeout=20) as verifier:
        yield verifier


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


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        (r"so \boxed{(3,\pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", "right"),
        ("The answer is 42.", "42", "right"),
        (r"$6*7 = 42$", "42", "right"),
        (r"\boxed{1,000}", "1000", "right"),
        (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", "right"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", "right"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", "right"),
        (r"\boxed{43}", "42", "wrong"),
        ("6 apples cost 12 dollars", "6", "wrong"),
        ("no number here", "5", "unparsable"),
        # the question said again, and no answer
        ("To evaluate $(1+2i)6-3i$, I make a table. " + "And so on. " * 30, "6+9i", "unparsable"),
        (r"\boxed{ }", "5", "unparsable"),
        ("", "5", "unparsable"),
    ],
)
def test_math(math_verifier, completion, answer, verdict):
    assert math_verifier(completion, answer) == verdict


def test_a_hostile_expression_neither_hangs_nor_kills():
    with Verifier("math", timeout=3) as verifier:
        assert verifier(r"\boxed{7}", "7.0") == "right"
        started = time.monotonic()
        verdict = verifier(r"\boxed{9^{9^{9^{9^{9}}}}!}", "3^{7^{8^{9}}}+1")
        assert time.monotonic() - started < 10
        assert verdict in ("failed", "wrong")  # a later release may see through it
        assert verifier(r"\boxed{8}", "8.0") == "right"


def raises(completion, answer):
    raise KeyError("oh")


def hangs(completion, answer):
    time.sleep(60 if completion == "hang" else 0)
    return True


def dies(completion, answer):
    print("this is no verdict")
    return os._exit(3) if completion == "die" else answer == completion


def eats(completion, answer):
    return len(bytearray(5 * 2**30)) > 0  # which the machine has, and the process may not take


def forks(completion, answer):
    if completion == "hang":
        subprocess.run(["sleep", "60"])
    return sys.stdin.read() == ""  # not the next question


@pytest.mark.parametrize(
    ("function", "completion", "message"),
    [
        ("raises", "x", "KeyError: 'oh'"),
        ("hangs", "hang", "no verdict within 1 s"),
        ("forks", "hang", "no verdict within 1 s"),
        ("dies", "die", "it crashed"),
        ("eats", "x", "MemoryError"),
    ],
)
def test_a_failure_is_counted_and_the_next_answer_is_judged(function, completion, message):
    with Verifier(f"{__name__}:{function}", timeout=1) as verifier:
        assert verifier(completion, "1") == "failed"
        assert message in verifier.why(completion, "1")
        if function in ("hangs", "forks", "dies"):
            assert verifier("1", "1") == "right"


def test_a_worker_killed_between_two_questions_is_replaced():
    with Verifier(f"{__name__}:dies") as verifier:
        assert verifier("1", "1") == "right"
        worker = verifier._idle[0]
        worker.process.poll = lambda: None  # as it was seen just before
        os.killpg(worker.process.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert verifier("2", "1") == "failed" and "crashed" in verifier.why("2", "1")
        assert verifier("3", "1") == "wrong"


def test_your_own_function_in_this_process_or_another():
    with Verifier(lambda completion, answer: completion == answer) as verifier:
        assert [verifier("1", "1"), verifier("2", "1")] == ["right", "wrong"]
    with Verifier(raises) as verifier:
        assert verifier("1", "1") == "failed" and verifier.name.endswith(":raises")
    with Verifier(lambda *_: "maybe") as verifier:
        assert verifier("1", "1") == "failed" and "returns a bool" in verifier.why("1", "1")
    with Verifier(f"{__name__}:dies", workers=2) as verifier:
        futures = [verifier.submit(str(i), "3") for i in range(6)]
        assert [f.result() for f in futures] == ["right" if i == 3 else "wrong" for i in range(6)]


CALLS = 0


def counts(completion, answer):
    global CALLS
    CALLS += 1
    return CALLS == 1


def test_one_answer_is_judged_once(math_verifier):
    with Verifier(f"{__name__}:counts") as verifier:
        assert {verifier("a", "1") for _ in range(5)} == {"right"}
        assert verifier("b", "1") == "wrong"
    # of a boxed answer, whatever is said around it
    texts = [rf"{word}: \boxed{{77}}" for word in ("so", "thus", "hence")]
    assert len({id(math_verifier.submit(text, "78")) for text in texts}) == 1


def test_judging_left_half_way_gives_up_the_rest():
    completions = [SimpleNamespace(prompt=0, text=str(i)) for i in range(50)]
    with Verifier(f"{__name__}:slow", timeout=20) as verifier:
        judged = judge(iter(completions), {0: "1"}, verifier)
        next(judged)
        started = time.monotonic()
        judged.close()
        verifier._pool.shutdown()
        assert time.monotonic() - started < 5


def slow(completion, answer):
    time.sleep(0.3)
    return True


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "no 'maths'; there are math, exact"),
        ("nowhere:f", "ModuleNotFoundError"),
        ("os:nothing", "AttributeError"),
    ],
)
def test_unknown_verifiers_are_refused_at_once(name, message):
    with pytest.raises(ValueError, match=message):
        Verifier(name)
