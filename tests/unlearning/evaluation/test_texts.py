import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmmix.unlearning.evaluation.scores import score_answers
from llmmix.unlearning.evaluation.texts import (
    distinct,
    generate_greedily,
    perplexities,
    repetition,
    rouge,
    says,
    unicode_words,
)


def test_greedy_answers_are_those_of_generate(model, tokenizer, rows):
    prompts = [*rows["prompt"], "1+1=", "", "1 " * 300]
    texts = generate_greedily(model, tokenizer, prompts, max_new_tokens=8)
    assert texts[-2:] == [None, None]
    for prompt, text in zip(prompts[:-2], texts, strict=False):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        assert text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    whole = texts[0]
    (cut,) = generate_greedily(
        model, tokenizer, prompts[:1], max_new_tokens=8, stop=[whole[3:5], "\x00\x00"]
    )
    assert cut == whole[: whole.find(whole[3:5])].strip() and len(cut) < len(whole)


def test_greedy_answers_to_equal_prompts_are_equal(tied_checkpoint, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    assert len(set(generate_greedily(model, tokenizer, ["1+1="] * 8, max_new_tokens=20))) == 1


def test_rouge_vectors():
    said, wanted = "The author was born in Karachi.", "The writer was born in Lahore, Pakistan."
    for pair, expected in (
        ((wanted, said), None),
        ((said, wanted), (0.571429, 0.615385, 0.571429)),
    ):
        scores = tuple(rouge(*pair).values())
        assert scores == pytest.approx(expected or (0.666667, 0.615385, 0.666667), abs=1e-6)
    scores = rouge("hina ameen is the author", "Hina Ameen")
    assert scores["rougeL_recall"] == 1 and scores["rougeL_f1"] == pytest.approx(0.571429, abs=1e-6)
    for pair in (("", "a"), ("a", "")):
        assert set(rouge(*pair).values()) == {0}
    assert rouge("runs", "running")["rougeL_recall"] == 1  # stems


def test_other_scripts_need_other_words():
    for text in ("Она родилась в Карачи", "她出生在卡拉奇", "उसका जन्म कराची में हुआ"):
        assert rouge(text, text)["rougeL_recall"] == 0
        assert rouge(text, text, unicode_words)["rougeL_recall"] == 1
    assert unicode_words("她 born, Café-Bar!") == ["她", "born", "café", "bar"]
    assert unicode_words("कराची") == ["कराची"]
    assert rouge("она ждёт", "она ушла", unicode_words)["rouge1_recall"] == 0.5


def test_secrets_are_found_word_for_word():
    assert says("She was born in KARACHI, in 1975.", "Karachi")
    assert says("it is “The Amber—Garden”", "the amber garden")
    assert says("她出生在卡拉奇。", "卡拉奇")
    for text in ("", "Fezzan", "the garden of amber"):
        assert not says(text, "Fez") and not says(text, "amber garden")
    assert not says("anything", "!")


def test_repetition_and_distinct():
    assert repetition("a b c d e") == 0 and repetition("a b c") is None
    assert repetition("a a a a a a") == pytest.approx(2 / 3)
    assert distinct(["a b", "a b", "c"]) == 0.5 and distinct(["", "a"]) is None


def test_perplexity_is_of_the_text_alone(model, tokenizer, rows):
    texts = ["2", None, " ", "9", "42"]
    found = perplexities(model, tokenizer, rows["prompt"][:], texts)
    assert found[1:3] == [None, None]
    score = score_answers(model, tokenizer, rows, include_eos=False)
    assert found[0] == pytest.approx(np.exp(score[0].nll), rel=1e-4)
    assert perplexities(model, tokenizer, rows["prompt"][:], [None] * 5) == [None] * 5
