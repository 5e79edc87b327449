import copy
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from llmmix.head import attach_head
from llmmix.unlearning.evaluation import scores as answer_scores
from llmmix.unlearning.evaluation.metrics import log_prob_moments
from llmmix.unlearning.evaluation.scores import (
    alternative_nlls,
    gradient_norms,
    score_answers,
    score_sequences,
)
from llmmix.unlearning.evaluation.texts import (
    distinct,
    generate_greedily,
    perplexities,
    repetition,
    rouge,
    says,
    unicode_words,
)
from llmmix.unlearning.qa import Encoded, encode_answer

FIELDS = ("labels", "token_logps", "predictions", "means", "variances")


@pytest.fixture
def rows():
    texts = ["1+1=", "What is 23+48?", "a", "12-3=", "6*7="]
    chat = [[{"role": "user", "content": text}] for text in texts]
    answers = ["2", "23+48=\n71, which is what was asked", "b c", "9", "42"]
    return Dataset.from_dict({"prompt": chat, "answer": answers})


def lora(model):
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    config.init_lora_weights = False
    return get_peft_model(copy.deepcopy(model), config)


def assert_equal(scores, others):
    assert len(scores) == len(others)
    for a, b in zip(scores, others, strict=True):
        for field in FIELDS:
            np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_a_plain_forward(model, tokenizer, rows):
    scores = score_answers(model, tokenizer, rows)
    for row, score in zip(rows, scores, strict=True):
        ids, start = encode_answer(tokenizer, row["prompt"], row["answer"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        logps = logits.log_softmax(-1)
        labels = torch.tensor(ids[start:])
        assert score.labels.tolist() == ids[start:] and score.labels[-1] == tokenizer.eos_token_id
        expected = logps.gather(1, labels[:, None])[:, 0]
        np.testing.assert_allclose(score.token_logps, expected, atol=1e-5)
        assert score.nll == pytest.approx(-expected.mean().item(), rel=1e-5)
        assert score.nll_sum == pytest.approx(score.nll * score.tokens)
        assert score.predictions.tolist() == logits.argmax(-1).tolist()
        means, variances = log_prob_moments(logits.numpy())
        np.testing.assert_allclose(score.means, means, rtol=1e-4)
        np.testing.assert_allclose(score.variances, variances, rtol=1e-4)
        bare = score.without_last(tokenizer.eos_token_id)
        assert bare.tokens == score.tokens - 1 and bare.without_last(-1) is bare


def test_batches_and_chunks_change_nothing(model, tokenizer, rows, monkeypatch):
    whole = score_answers(model, tokenizer, rows)
    widths = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert_equal(whole, score_answers(model, tokenizer, rows, token_budget=1))
    assert [shape[0] for shape in widths] == [1] * len(rows)
    assert widths == sorted(widths, key=lambda shape: -shape[1])  # longest first
    widths.clear()
    # Room for the logits of three positions: an answer takes several forwards
    monkeypatch.setattr(answer_scores, "LOGIT_BYTES", 4 * len(tokenizer) * 3)
    monkeypatch.setattr(answer_scores, "CHUNK", len(tokenizer))
    assert_equal(whole, score_answers(model, tokenizer, rows))
    assert len(widths) > len(rows)
    handle.remove()


def test_a_pad_token_that_ends_sequences_does_no_harm(model, tokenizer, rows):
    before = score_answers(model, tokenizer, rows)
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    assert_equal(before, score_answers(model, other, rows))


def test_head_is_handed_scored_positions_alone(model, tokenizer, rows):
    seen = []
    model.lm_head.register_forward_hook(lambda *a: seen.append(a[2].shape))
    scores = score_answers(model, tokenizer, rows, moments=False)
    assert seen == [(1, sum(s.tokens for s in scores), len(tokenizer))]
    assert scores[0].means is None and scores[0].without_last(tokenizer.eos_token_id).means is None


def test_adapters_and_fused_heads_are_scored_as_they_stand(model, tokenizer, rows):
    adapted = lora(model)
    scores = score_answers(adapted, tokenizer, rows)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert_equal(scores, score_answers(merged, tokenizer, rows))
    assert abs(scores[0].nll - score_answers(model, tokenizer, rows)[0].nll) > 1e-3
    attach_head(model)
    assert_equal(score_answers(model, tokenizer, rows), score_answers(model, tokenizer, rows))


def test_the_models_mode_is_put_back(model, tokenizer, rows):
    model.train()
    model.model.layers[0].eval()
    score_answers(model, tokenizer, rows.take(1))
    assert model.training and not model.model.layers[0].training
    assert model.model.layers[1].training
    assert not model.lm_head._forward_pre_hooks


def test_what_exceeds_the_context_is_counted(model, tokenizer, rows, caplog):
    long = Dataset.from_dict(
        {"prompt": ["1+1=", "1+1=", "1 " * 300], "answer": ["2", "1 " * 300, "2"]}
    )
    with caplog.at_level(logging.WARNING):
        scores = score_answers(model, tokenizer, long)
    assert [score is None for score in scores] == [False, True, True]
    assert "2 of 3 answers are not scored" in caplog.text
    assert score_sequences(model, [Encoded([5], 1)]) == [None]
    assert gradient_norms(model, tokenizer, long)[1:] == [None, None]


def test_long_texts_are_scored_in_pieces(model, tokenizer):
    text = "".join(f"{i}+{i}={2 * i} " for i in range(60))
    ids = encode_answer(tokenizer, "", text).ids
    assert 256 < len(ids) < 768
    (score,) = score_answers(
        model, tokenizer, Dataset.from_dict({"prompt": [""], "answer": [text]})
    )
    pieces = [ids[start : start + 256] for start in range(0, len(ids), 256)]
    assert score.labels.tolist() == [token for piece in pieces for token in piece[1:]]
    parts = score_sequences(model, [Encoded(piece, 1) for piece in pieces])
    total = sum(part.nll_sum for part in parts)
    assert score.nll_sum == pytest.approx(total, rel=1e-5) and len(score.means) == score.tokens


def test_alternatives_may_be_ragged_or_missing(model, tokenizer, rows):
    prompts = rows["prompt"][:4]
    given = [["2", "3", "17"], [], None, ["9", " ", "1 " * 300]]
    nlls = alternative_nlls(model, tokenizer, prompts, given)
    assert [len(row) for row in nlls] == [3, 0, 0, 2] and nlls[3][1] is None
    same = score_answers(model, tokenizer, rows)
    assert nlls[0][0] == pytest.approx(same[0].nll, rel=1e-5)
    assert nlls[3][0] == pytest.approx(same[3].nll, rel=1e-5)
    assert alternative_nlls(model, tokenizer, prompts[:1], [[]]) == [[]]


def test_gradient_norms_leave_gradients_as_they_were(model, tokenizer, rows):
    model.train()
    model.lm_head.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    norms = gradient_norms(model, tokenizer, rows)
    assert model.training and not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad and model.model.norm.weight.grad.sum() == 32
    assert model.lm_head.weight.grad is None
    fresh = copy.deepcopy(model).eval().requires_grad_(True)
    for row, norm in zip(rows, norms, strict=True):
        ids, start = encode_answer(tokenizer, row["prompt"], row["answer"])
        labels = torch.tensor([[-100] * start + ids[start:]])
        fresh.zero_grad()
        fresh(torch.tensor([ids]), labels=labels).loss.backward()
        expected = [p.grad.norm().item() for p in fresh.parameters()]
        assert norm == pytest.approx(np.mean(expected), rel=1e-4)
    one = gradient_norms(model, tokenizer, rows.take(1), p=float("inf"))
    assert one[0] < norms[0]
    with pytest.raises(ValueError, match="`p` must be 1, 2 or infinity, got 3"):
        gradient_norms(model, tokenizer, rows, p=3)


def test_gradient_norms_of_an_adapter_are_those_of_the_merged_weights(model, tokenizer, rows):
    adapted = lora(model)
    norms = gradient_norms(adapted, tokenizer, rows)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert norms == pytest.approx(gradient_norms(merged, tokenizer, rows), rel=1e-4)


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


def test_half_precision_is_normalised_in_fp32(checkpoint, tokenizer, rows):
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for score in score_answers(model, tokenizer, rows):
        assert score.token_logps.dtype == np.float32
        rounded = torch.tensor(score.token_logps).bfloat16().float().numpy()
        assert (score.token_logps != rounded).any()
