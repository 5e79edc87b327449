import re

import pytest

from llmmix import builtin
from llmmix.grading import boxed_answer


@pytest.fixture(scope="module")
def math():
    return builtin.dataset("builtin:math")


def test_solutions_are_right_line_by_line(math):
    for row in math["train"]:
        solution = row["completion"][0]["content"]
        lines = solution.replace("\\boxed{", "").replace("}", "").split("\n")
        for line in lines:
            left, right = line.rsplit("=", 1)
            assert re.fullmatch(r"-?\d+[-+*/]\d+", left), line
            assert eval(left) == int(right), line
        assert boxed_answer(solution) == row["answer"] == lines[-1].rsplit("=", 1)[1]


def test_equations_hold(math):
    for row in math["train"].filter(lambda row: row["level"] == 4):
        a, b, c = re.fullmatch(r"Solve (\d+)x\+(\d+)=(\d+)\.", row["prompt"][0]["content"]).groups()
        assert int(a) * int(row["answer"]) + int(b) == int(c)


def test_train_and_test_are_disjoint_and_without_repeats(math):
    questions = [[row["prompt"][0]["content"] for row in math[split]] for split in math]
    assert not set(questions[0]) & set(questions[1])
    assert all(len(set(q)) == len(q) for q in questions)
    assert [len(math[split]) for split in math] == [4000, 1000]


def test_pretraining_text_holds_no_test_problem(math):
    text = set(builtin.pretraining_text())
    for row in math["test"].filter(lambda row: row["level"] == 1):
        fact = row["completion"][0]["content"].replace("\\boxed{", "").replace("}", "")
        assert fact not in text


def test_preferences_are_right_against_wrong():
    for row in builtin.dataset("builtin:preferences")["test"]:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert boxed_answer(chosen) != boxed_answer(rejected)
        assert chosen.split("\\boxed")[0] == rejected.split("\\boxed")[0]


def test_levels_are_selected_and_the_data_are_the_same_each_time(math):
    one = builtin.dataset("builtin:math", "1")["train"]
    assert set(one["level"]) == {1} and len(one) == 1000
    assert one[:3] == builtin.dataset("builtin:math", "1")["train"][:3]
    assert one[0] == math["train"][0]
    # fixed for good: a change of these rows is a change of the built-in
    assert one[0]["prompt"][0]["content"] == "What is 4+4?"


@pytest.mark.parametrize("levels", ["5", "one", "", "1,9"])
def test_bad_levels_are_refused(levels):
    with pytest.raises(ValueError, match="`dataset_config` of a built-in names levels"):
        builtin.dataset("builtin:math", levels)


def test_unknown_names_are_refused():
    there = "no built-in 'builtin:maths'; there are builtin:math, .*builtin:domains"
    with pytest.raises(ValueError, match=there):
        builtin.dataset("builtin:maths")
    with pytest.raises(ValueError, match="there is builtin:tiny"):
        builtin.tiny_checkpoint("builtin:small")


def test_tokenizer_takes_a_digit_a_token_and_round_trips(tokenizer):
    text = "Ünïcode, 12345+678= \\boxed{13023}\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isdigit()] == list("1234567813023")
    again = builtin.train_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()


def test_chat_template_marks_what_the_assistant_said(tokenizer):
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == "4<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert out["input_ids"][: len(prompt)] == prompt


def test_tiny_checkpoint_is_built_once_and_loads(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path))
    monkeypatch.setattr("llmmix.builtin.tiny.TINY_STEPS", 2)
    folder = builtin.tiny_checkpoint()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert builtin.tiny_checkpoint() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 0.8e6 < model.num_parameters() < 1.2e6
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    from llmmix.files import built_once

    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path))

    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        built_once("thing", fail)
    folder = built_once("thing", lambda folder: (folder / "whole").write_text(""))
    assert [path.name for path in folder.iterdir()] == ["whole"]
