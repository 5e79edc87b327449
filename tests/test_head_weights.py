"""What an objective computes with the head at hand, against the logits of the whole model."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


def with_lora(name, **options):
    model = get_peft_model(build(name), LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:  # as drawn, B is zero
            nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {
    "tied": lambda: build("llama-tied"),
    "scale": lambda: build("granite-scaling"),
    "lora": lambda: with_lora("llama", target_modules=["q_proj"]),
    "lora on the head": lambda: with_lora("llama", target_modules=["lm_head"]),
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


def capture(model):
    """The scored hidden states and the head of a forward without gradient."""
    found = []

    def objective(hidden, labels, head):
        found.append((hidden[labels != -100], head))
        return {}

    with torch.no_grad():
        model(**batch(), fused_lm_head=True, head_objective=objective)
    return found[0]


REFERENCES = {
    "lora": lambda: with_lora("llama", target_modules=["down_proj"]),
    "lora on the head": lambda: with_lora("llama", target_modules=["lm_head"]),
    "lora under a softcap": lambda: with_lora("gemma2-softcap", target_modules=["q_proj"]),
    "saved head": lambda: with_lora(
        "llama", target_modules=["down_proj"], modules_to_save=["lm_head"]
    ),
    "trained tokens": lambda: with_lora(
        "llama-tied", target_modules=["q_proj"], trainable_token_indices=[5, 60]
    ),
    "copy": lambda: build("llama-tied"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_divergence_from_the_model_without_its_adapter_or_from_a_copy(name):
    """From one pass with the log-probabilities, which stand for those of the forward."""
    model, inputs = REFERENCES[name](), batch()
    labels = inputs["labels"][:, 1:]
    mask = labels != -100
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    if name == "copy":
        other = build("llama-tied")
        nn.init.normal_(other.model.norm.weight)
        off = contextlib.nullcontext
        attach_head(other)
    else:
        other, off = model, model.disable_adapter
    own = model(**plain).logits[:, :-1][mask].log_softmax(-1)
    with torch.no_grad(), off():
        theirs = other(**plain).logits[:, :-1][mask].log_softmax(-1)
    expected = (theirs.exp() * (theirs - own)).sum(-1)
    attach_head(model, outputs=("entropy",))
    with off():
        reference = capture(other)
    given = []

    def objective(hidden, labels, head):
        statistics, kl = head.statistics_and_kl(hidden[mask], labels[mask], *reference)
        given.append(statistics)
        alone = head.kl_from(hidden[mask], *reference)
        return {"statistics": statistics, "kl": kl, "alone": alone.detach()}

    output = model(**inputs, fused_lm_head=True, head_objective=objective)
    assert set(output.objective) == {"kl", "alone"} and expected.max() > 0.01
    torch.testing.assert_close(output.objective["kl"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.objective["alone"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.log_probs[mask], given[0].log_probs)
    assert torch.equal(output.entropy[mask], given[0].entropy)
    chosen = own.gather(1, labels[mask][:, None]).squeeze(1)
    gradients = []
    for log_probs, kl in ((output.log_probs[mask], output.objective["kl"]), (chosen, expected)):
        model.zero_grad()
        (kl - log_probs).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_under_fully_shard_a_reference_of_another_model_stays_readable():
    """FSDP2 on one gloo rank shards the model and the other."""
    model, copy, expected = build("llama"), build("llama-tied"), build("llama")
    attach_head(model), attach_head(copy), attach_head(expected)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = capture(copy)
        fully_shard(model, mesh=mesh), fully_shard(copy, mesh=mesh)
        outputs = []
        for one, reference in ((model, capture(copy)), (expected, whole)):
            objective = scored(lambda head, h, y, r=reference: head.kl_from(h, *r))
            output = one(**batch(), fused_lm_head=True, head_objective=objective)
            output.objective["value"].sum().backward()
            outputs.append(output.objective["value"])
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(
            model.lm_head.weight.grad.full_tensor(), expected.lm_head.weight.grad
        )
    finally:
        dist.destroy_process_group()
