import copy
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from llmmix.head import attach_head
from llmmix.rows.prompts import Encoded, encode_answer, options_of
from llmmix.unlearning.evaluation import scores as answer_scores
from llmmix.unlearning.evaluation.gradients import gradient_norms
from llmmix.unlearning.evaluation.membership import log_prob_moments
from llmmix.unlearning.evaluation.scores import (
    alternative_nlls,
    score_answers,
    score_sequences,
)
from llmmix.unlearning.rows import ForgetRows
from tests.checkpoint import LONG_ROPE

FIELDS = ("labels", "token_logps", "predictions", "means", "variances")


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


def test_adapters_and_fused_heads_are_scored_as_they_stand(model, adapted, tokenizer, rows):
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


def test_half_precision_is_normalised_in_fp32(checkpoint, tokenizer, rows):
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for score in score_answers(model, tokenizer, rows):
        assert score.token_logps.dtype == np.float32
        rounded = torch.tensor(score.token_logps).bfloat16().float().numpy()
        assert (score.token_logps != rounded).any()


def test_a_row_beyond_the_rope_switch_changes_no_score_of_a_shorter_one(tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            rope_parameters=dict(LONG_ROPE),
            initializer_range=0.3,
        )
    )
    rows = {"prompt": ["What is 2+3?", "What is 2+3?"], "answer": ["5", "5 " * 20]}
    beside = score_answers(model, tokenizer, Dataset.from_dict(rows))
    for row, score in enumerate(beside):
        one = Dataset.from_dict({name: values[row : row + 1] for name, values in rows.items()})
        (alone,) = score_answers(model, tokenizer, one)
        assert score.token_logps == pytest.approx(alone.token_logps, abs=1e-5)


def test_a_rows_template_options_are_scored(model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ '/no_think ' if off }}{{ 'TOOLS ' if tools }}" + (
        tokenizer.chat_template
    )
    asked = {"chat_template_kwargs": {"off": True}, "tools": '[{"name": "f"}]'}
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4", **asked}]
    )
    options = {"off": True, "tools": [{"name": "f"}]}
    encoded = encode_answer(tokenizer, rows[0]["prompt"], "4", options=options)
    assert tokenizer.decode(encoded.ids).startswith("/no_think TOOLS ")
    (expected,) = score_sequences(model, [encoded])
    (scored,) = score_answers(model, tokenizer, rows)
    (alternative,) = alternative_nlls(
        model, tokenizer, rows["prompt"], [["4"]], options=options_of(rows)
    )
    trained = ForgetRows(rows, tokenizer, parts=("forget",))
    assert scored.nll == pytest.approx(expected.nll) and alternative == [
        pytest.approx(expected.nll)
    ]
    assert trained.forget == [encoded]
