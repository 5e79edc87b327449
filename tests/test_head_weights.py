"""What an objective computes with the head at hand, against the logits of the whole model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llmmix import attach_head
from tests.test_head import batch, build


def scored(function):
    """An objective of one value a scored token."""

    def objective(hidden, labels, head):
        mask = labels != -100
        return {"value": function(head, hidden[mask], labels[mask])}

    return objective


def values_and_gradients(model, function, dense):
    """Of `function` through the fused head, and of `dense` of the model's own logits."""
    inputs = batch()
    labels = inputs["labels"][:, 1:]
    mask = labels != -100
    own = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1][mask]
    attach_head(model)
    fused = model(**inputs, fused_lm_head=True, head_objective=scored(function))
    for value in (fused.objective["value"], dense(own, labels[mask])):
        model.zero_grad()
        value.square().sum().backward()
        yield (
            value.detach(),
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        )


def with_lora(name, target):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target])
    model = get_peft_model(build(name), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as drawn, B is zero
            nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {
    "tied": lambda: build("llama-tied"),
    "scale": lambda: build("granite-scaling"),
    "lora": lambda: with_lora("llama", "q_proj"),
    "lora on the head": lambda: with_lora("llama", "lm_head"),
}


def above_mean_of(z, y):
    return z.gather(1, y[:, None]).squeeze(1) - z.mean(1)


def at_temperature(z, y):
    return (z / 0.7).log_softmax(-1).gather(1, y[:, None]).squeeze(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("function", "dense"),
    [
        (lambda head, h, y: head.above_mean(h, y), above_mean_of),
        (lambda head, h, y: head.statistics(h, y, temperature=0.7).log_probs, at_temperature),
    ],
    ids=["above_mean", "temperature"],
)
def test_values_and_gradients_are_those_of_the_models_logits(name, function, dense):
    ours, plain = values_and_gradients(MODELS[name](), function, dense)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_above_mean_names_the_cap_of_the_model():
    model = build("gemma2-softcap")
    attach_head(model)
    with pytest.raises(ValueError, match=r"softcap 2\.0"):
        model(
            **batch(),
            fused_lm_head=True,
            head_objective=scored(lambda head, h, y: head.above_mean(h, y)),
        )
