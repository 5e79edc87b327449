import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from llmmix.grading import SampleLog, Verifier, pass_at_n
from llmmix.grading.evaluation import evaluate, judge_again
from llmmix.grading.problems import encode_prompts, problem_ids
from llmmix.grading.sample_log import prompt_id


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


def test_a_rows_tools_and_template_options_reach_the_model(model, checkpoint, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = (
        "{{ '/no_think ' if enable_thinking is defined and not enable_thinking }}"
        "{{ 'TOOLS ' if tools }}" + tokenizer.chat_template
    )
    asked = {"prompt": [{"role": "user", "content": "q?"}], "answer": "a"}
    thinking = Dataset.from_list([asked])
    rows = Dataset.from_list(
        [asked | {"chat_template_kwargs": {"enable_thinking": False}, "tools": '[{"name": "f"}]'}]
    )
    seen = []

    def drawn(model, tokenizer, prompts, *_, **__):
        seen.extend(prompts)
        return iter(())

    monkeypatch.setattr("llmmix.sampling.sample", drawn)
    evaluate(model, tokenizer, rows, num_samples=1, n=[1], verifier="exact", max_new_tokens=2)
    assert tokenizer.decode(seen[0]).startswith("/no_think TOOLS <|im_start|>user")
    assert problem_ids(rows) != problem_ids(thinking)  # so that their samples are not mixed


def test_prompts_that_cannot_be_sampled_are_refused_before_any_is(model, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": "q?"}]
    with pytest.raises(ValueError, match=r"Row 1 has no `prompt` \(1 such rows\)"):
        encode_prompts(tokenizer, Dataset.from_dict({"prompt": ["a", None]}))
    tokenizer.chat_template = None
    rows = Dataset.from_list([{"prompt": chat, "answer": "a"}])
    with pytest.raises(ValueError, match="`prompt` of row 0: The prompt is chat messages, and the"):
        evaluate(model, tokenizer, rows, num_samples=1, n=[1], verifier="exact")
    long = Dataset.from_dict({"prompt": ["1" * 600], "answer": ["1"]})
    with pytest.raises(ValueError, match="None of the 1 prompts leaves room for max_new_tokens=8"):
        evaluate(model, tokenizer, long, num_samples=1, n=[1], verifier="exact", max_new_tokens=8)


def test_samples_judged_by_earlier_rules_are_judged_again_and_once(tmp_path, monkeypatch):
    rows = Dataset.from_dict({"prompt": ["q"], "answer": ["D"]})
    log = SampleLog(tmp_path, {})
    old = {"problem": 0, "sample": 0, "prompt_id": prompt_id("q"), "tokens": 9, "finished": True}
    old |= {"completion": r"\boxed{x^2}. Answer: D", "answer": "D", "verifier": "choice"}
    log.append([old | {"verdict": "unparsable"}])
    with Verifier("choice") as verifier:
        judge_again(log, rows, verifier)
        (record,) = log.read()
        assert record["verdict"] == "right" and record["rules"] == verifier.rules
        monkeypatch.setattr(verifier, "submit", None)  # it would fail if it were asked
        judge_again(log, rows, verifier)
        verifier.rules = "of another version"
        with pytest.raises(TypeError):
            judge_again(log, rows, verifier)
