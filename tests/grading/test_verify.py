import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from llmmix.grading import Verifier, judge
from llmmix.sampling import Completion
from tests.grading.judges import raises

JUDGES = "tests.grading.judges"


@pytest.fixture(scope="module")
def math_verifier():
    with Verifier("math", timeout=20) as verifier:
        yield verifier


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
        # small and large numbers, and how they are written
        (r"\boxed{0.0000001}", "0.0000002", "wrong"),
        (r"\boxed{\frac{1}{2^{99}}}", r"\frac{1}{2^{98}}", "wrong"),
        (r"\boxed{\{10^{-7}, 1\}}", r"\{2\cdot 10^{-7}, 1\}", "wrong"),
        (r"\boxed{[0, 0.0000001]}", "[0, 0.0000002]", "wrong"),
        (
            r"\boxed{\begin{pmatrix}1&10^{-8}\end{pmatrix}}",
            r"\begin{pmatrix}1&2\cdot 10^{-8}\end{pmatrix}",
            "wrong",
        ),
        (r"\boxed{0.333333}", r"\frac{1}{3}", "right"),
        (r"\boxed{0.33}", r"\frac{1}{3}", "wrong"),
        (r"\boxed{1e-7}", "0.0000001", "right"),
        ("So we get 1e-7", "2e-7", "wrong"),
        (r"\boxed{2e-1}", "-1+2e", "right"),
        (r"\boxed{6.02\times 10^{23}}", "6.02e23", "right"),
        (r"\boxed{6.02\times 10^{23}}", "6.03e23", "wrong"),
        (r"\boxed{123456789012345678901}", "123456789012345678902", "wrong"),
        (r"\boxed{0.001}", "10^−3", "right"),
        (r"\boxed{10}", "10^−3", "wrong"),
        ("The answer is −3", "-3", "right"),
        (r"\boxed{４２}", "42", "right"),
        (r"\boxed{5.}", "5", "right"),
        (r"\boxed{1\,000}", "1000", "right"),
        (r"\boxed{1, 2}", "12", "wrong"),
        (r"\boxed{1 1/2}", r"\frac{3}{2}", "right"),
        (r"\boxed{-1\tfrac12}", "-1.5", "right"),
        (r"\boxed{2½}", "2.5", "right"),
        (r"\boxed{x²+1}", "x^2+1", "right"),
        (r"\boxed{2}", "2·3", "wrong"),
        (r"\boxed{90°}", r"90^\circ", "right"),
        (r"\boxed{50\%}", "0.5", "right"),
        (r"\boxed{5\text{ cm}}", "5", "right"),
        (r"\boxed{€5}", "5", "right"),
        (r"\boxed{[0,1]}", "(0,1)", "wrong"),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", "right"),
        (r"\boxed{(1,2)}", "(2,1)", "wrong"),
        # what is said last
        (r"<think>\boxed{5}</think> The answer is 6.", "6", "right"),
        ("<answer>42</answer>", "42", "right"),
        (r"\boxed{5} or \boxed{6}", "5", "wrong"),
        (r"\boxed{ }", "5", "unparsable"),
        ("", "5", "unparsable"),
    ],
)
def test_math(math_verifier, completion, answer, verdict):
    assert math_verifier(completion, answer) == verdict


def test_a_boxed_formula_hides_no_letter_from_a_verifier_of_choices():
    with Verifier("choice") as verifier:
        assert verifier(r"\boxed{x^2}, so the answer is D.", "D") == "right"
        assert verifier(r"\boxed{x^2}, so the answer is C.", "D") == "wrong"


def test_a_hostile_expression_neither_hangs_nor_kills():
    with Verifier("math", timeout=20) as verifier:
        assert verifier(r"\boxed{7}", "7.0") == "right"
        (worker,) = verifier._idle
        worker.timeout = 1
        completion, answer = r"\boxed{9^{9^{9^{9^{9}}}}!}", "3^{7^{8^{9}}}+1"
        verdict = verifier(completion, answer)
        assert verdict in ("failed", "wrong")  # a later release may see through it
        if verdict == "failed":
            assert "no verdict within 1 s" in verifier.why(completion, answer)
        worker.timeout = 20
        assert verifier(r"\boxed{8}", "8.0") == "right"


@pytest.mark.parametrize(
    ("function", "completion", "message"),
    [
        ("raises", "x", "KeyError: 'oh'"),
        ("hangs", "hang", "no verdict within 1 s"),
        ("dies", "die", "it crashed"),
        ("eats", "x", "MemoryError"),
    ],
)
def test_a_failure_is_counted_and_the_next_answer_is_judged(function, completion, message):
    with Verifier(f"{JUDGES}:{function}", timeout=1 if function == "hangs" else 20) as verifier:
        assert verifier(completion, "1") == "failed"
        assert message in verifier.why(completion, "1")
        if function in ("hangs", "dies"):
            verifier._idle[0].timeout = 20
            assert verifier("1", "1") == "right"


@pytest.mark.parametrize(
    ("how", "message"), [("hang", "no verdict within 1 s"), ("die", "it crashed")]
)
def test_what_a_judged_answer_started_ends_with_it(tmp_path, how, message, monkeypatch):
    started = tmp_path / "child"
    completion = f"{how} {started}"
    timer = threading.Timer

    def after_the_start(seconds, end):
        def wait():  # on a busy machine the child may be late
            while not (started.exists() and started.read_text()):
                time.sleep(0.01)
            end()

        return timer(seconds, wait)

    monkeypatch.setattr(threading, "Timer", after_the_start)
    with Verifier(f"{JUDGES}:forks", timeout=1 if how == "hang" else 20) as verifier:
        assert verifier(completion, "1") == "failed" and message in verifier.why(completion, "1")
        child = Path("/proc") / started.read_text()
        while child.exists() and ") Z " not in (child / "stat").read_text():  # the kill is sent
            time.sleep(0.01)
        verifier._idle[0].timeout = 20
        assert verifier("1", "1") == "right"


def test_a_worker_killed_between_two_questions_is_replaced():
    with Verifier(f"{JUDGES}:dies", timeout=20) as verifier:
        assert verifier("1", "1") == "right"
        (worker,) = verifier._idle
        worker.process.poll = lambda: None  # as it was seen just before
        os.killpg(worker.process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
        assert verifier("2", "1") == "failed" and "crashed" in verifier.why("2", "1")
        assert verifier("3", "1") == "wrong"


def test_a_worker_starts_without_torch_and_without_the_asking_program():
    with Verifier(f"{JUDGES}:modules", timeout=20) as verifier:
        for name in ("torch", "transformers", "numpy", "pytest"):
            assert name in sys.modules and verifier(name, "1") == "right"


def test_your_own_function_in_this_process_or_another():
    with Verifier(lambda completion, answer: completion == answer) as verifier:
        assert [verifier("1", "1"), verifier("2", "1")] == ["right", "wrong"]
    with Verifier(raises) as verifier:
        assert verifier("1", "1") == "failed" and verifier.name.endswith(":raises")
    with Verifier(lambda *_: "maybe") as verifier:
        assert verifier("1", "1") == "failed" and "returns a bool" in verifier.why("1", "1")
    with Verifier(f"{JUDGES}:dies", workers=2) as verifier:
        futures = [verifier.submit(str(i), "3") for i in range(6)]
        assert [f.result() for f in futures] == ["right" if i == 3 else "wrong" for i in range(6)]


def test_one_answer_is_judged_once(math_verifier):
    with Verifier(f"{JUDGES}:counts") as verifier:
        assert {verifier("a", "1") for _ in range(5)} == {"right"}
        assert verifier("b", "1") == "wrong"
    # of a boxed answer, whatever is said around it
    texts = [rf"{word}: \boxed{{77}}" for word in ("so", "thus", "hence")]
    assert len({id(math_verifier.submit(text, "78")) for text in texts}) == 1


def test_judging_left_half_way_gives_up_the_rest(tmp_path):
    completions = [Completion(0, i, str(tmp_path / str(i)), 1, True) for i in range(50)]
    with Verifier(f"{JUDGES}:waits", timeout=60) as verifier:
        judged = judge(iter(completions), {0: "1"}, verifier)
        next(judged)
        judged.close()
        (tmp_path / "go").touch()
        verifier._pool.shutdown()
        begun = {path.name for path in tmp_path.iterdir()} - {"go"}
        assert begun <= {"0", "1"}


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


@pytest.mark.parametrize("name", ["exact", "normalized", "choice"])
def test_time_grows_with_the_text_and_not_faster(name):
    """A hundred thousand repeats: a square of them would take longer than the time limit."""
    repeats = ["\n", " \t\n", "answer ", "answer (A :* ", "(A", "A.)\n", "{", "**\n", "1,"]
    with Verifier(name, timeout=30) as verifier:
        for text in repeats:
            for before, after in (("", ""), ("\\boxed{\\text", "}"), ("answer A", "x")):
                completion = before + text * 100_000 + after
                assert verifier(completion, "B") != "failed", verifier.why(completion, "B")


def test_every_name_is_judged_in_a_process_that_may_be_killed():
    for name, completion in (("exact", r"\boxed{4}"), ("normalized", "The 4."), ("choice", "(B)")):
        with Verifier(name, timeout=20) as verifier:
            assert verifier(completion, "4" if name != "choice" else "B") == "right"
            (worker,) = verifier._idle
            os.kill(worker.process.pid, signal.SIGSTOP)  # as if it never came to an end
            worker.timeout = 1
            assert verifier("x", "B") == "failed"
            assert "no verdict within 1 s" in verifier.why("x", "B")


def test_an_error_that_quotes_the_completion_prints_no_control_characters():
    def quotes(completion, answer):
        raise ValueError(completion)

    with Verifier(quotes) as verifier:
        text = "\x1b]0;mine\x07\x1b[2J\u202e\udc80 é"
        assert verifier(text, "1") == "failed"
        assert verifier.why(text, "1") == (r"ValueError: \x1b]0;mine\x07\x1b[2J\u202e\udc80 é")


@pytest.mark.parametrize("name", ["math", "exact", "normalized", "choice"])
def test_hostile_answers_end_in_a_verdict(name):
    hostile = [
        "\\boxed{" * 20_000,
        "\\boxed{" + "{" * 50_000 + "}" * 50_001,
        "\\boxed{\\frac" + "{1}{" * 3_000 + "}" * 3_001,
        "\\boxed{10^{10^{10}}}",
        "\\boxed{1e999999999}",
        "\\boxed{__import__('os').system('touch owned')}",
        "\x00\x01\x1b[31m\\boxed{\x00}",
        "\ud800\\boxed{\udfff}",
        "\u202e\\boxed{\u0664\u0662}",
        '["right", null]\n["right", null]',
    ]
    with Verifier(name, timeout=1) as verifier:
        for completion in hostile:
            assert verifier(completion, "B" if name == "choice" else "42") != "right" or (
                "\u0664\u0662" in completion  # 42 in Arabic digits is 42
            )
        for worker in verifier._idle:
            worker.timeout = 20
        right = r"\boxed{B}" if name == "choice" else r"\boxed{42}"
        assert verifier(right, "B" if name == "choice" else "42") == "right"
    assert not Path("owned").exists()


def test_a_callable_is_interrupted_when_its_time_is_up():
    def stubborn(completion, answer):
        while completion == "hang":
            try:
                time.sleep(60)
            except Exception:  # it goes on whatever happens
                pass
        return True

    with Verifier(stubborn, timeout=0.2) as verifier:
        assert verifier("hang", "1") == "failed"
        assert verifier.why("hang", "1") == "no verdict within 0.2 s"
        assert verifier("on", "1") == "right"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
