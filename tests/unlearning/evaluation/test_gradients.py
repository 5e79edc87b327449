import copy

import numpy as np
import pytest
import torch

from llmmix.rows.prompts import encode_answer
from llmmix.unlearning.evaluation.gradients import gradient_norms


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


def test_gradient_norms_of_an_adapter_are_those_of_the_merged_weights(adapted, tokenizer, rows):
    norms = gradient_norms(adapted, tokenizer, rows)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert norms == pytest.approx(gradient_norms(merged, tokenizer, rows), rel=1e-4)
