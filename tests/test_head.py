import contextlib
import copy
import dataclasses
import pickle
import types
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributions import Categorical
from torch.utils._pytree import tree_map
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trl.trainer.utils import add_fused_lm_head

from llmmix import attach_head, head_weights
from llmmix.logprobs import STATISTICS
from llmmix.trainers import keep_outputs_in_fp32

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gemma2-softcap": (
        Gemma2ForCausalLM,
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    ),
    "cohere-scale": (Cohere2ForCausalLM, Cohere2Config(**SMALL, logit_scale=0.5)),
    "granite-scaling": (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=3.0)),
    "mixtral-moe": (
        MixtralForCausalLM,
        MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2)),
}


def batch(vocabulary=61):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0  # padded on the right
    mask[1, :2] = 0  # padded on the left
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build(name):
    torch.manual_seed(0)
    kind, config = ARCHITECTURES[name]
    model = kind(copy.deepcopy(config)).eval()
    for parameter in model.parameters():  # as drawn, the logits of a small model are all near zero
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_as_the_models_own_logits_and_as_trls_head_do(name):
    model, inputs = build(name), batch()
    theirs = copy.deepcopy(model)
    shared = tuple(name for name in STATISTICS if name != "top_k_entropy")  # TRL has none
    add_fused_lm_head(theirs, outputs=shared)
    attach_head(model, outputs=STATISTICS, top_k=3)
    ours, theirs = model(**inputs, fused_lm_head=True), theirs(**inputs, fused_lm_head=True)
    for field in ("loss", *shared, "label_mask", "aux_loss"):
        a, b = getattr(ours, field), getattr(theirs, field)
        assert (a is None) == (b is None), field
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=field)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = expected.masked_fill(labels == -100, 0)
    torch.testing.assert_close(ours.log_probs, expected, rtol=1e-4, atol=1e-5)
    top = Categorical(logits=logits.topk(3).values).entropy().masked_fill(labels == -100, 0)
    torch.testing.assert_close(ours.top_k_entropy, top, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_cross_entropy():
    ours, plain = build("llama-tied"), build("llama-tied")
    attach_head(ours)
    ours(**batch(), fused_lm_head=True).loss.backward()
    plain(**batch()).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_other_calls_are_the_models_own(model, tokenizer):
    ids = tokenizer("2+2=", return_tensors="pt")
    logits, text = model(**ids).logits, model.generate(**ids, max_new_tokens=5, do_sample=False)
    attach_head(model)
    assert torch.equal(model(**ids).logits, logits)
    assert torch.equal(model.generate(**ids, max_new_tokens=5, do_sample=False), text)


def test_attaching_again_replaces_the_outputs():
    model = build("llama")
    attach_head(model)
    assert "entropy" not in model(**batch(), fused_lm_head=True)
    attach_head(model, outputs=("entropy",))
    assert model(**batch(), fused_lm_head=True).entropy.shape == (3, 8)
    assert model.forward.own_forward is LlamaForCausalLM.forward


HANDED_ON = {
    "as it is": lambda output: output,
    "replaced": dataclasses.replace,  # as FSDP1 does
    "in fp32": lambda output: convert_outputs_to_fp32(lambda: output)(),  # as under autocast
    "as a tree": lambda output: tree_map(lambda x: x, output),  # as FSDP2 does
    "copied": copy.deepcopy,
    "pickled": lambda output: pickle.loads(pickle.dumps(output)),
}


@pytest.mark.parametrize("way", HANDED_ON)
@pytest.mark.parametrize("name", [name for name in STATISTICS if name != "log_probs"])
def test_a_field_that_was_not_asked_for_is_named_when_it_is_used(name, way):
    model = build("llama")
    attach_head(model)
    with torch.no_grad():
        output = HANDED_ON[way](model(**batch(), fused_lm_head=True))
    assert set(output) == {"loss", "log_probs", "label_mask"} and "not computed" in repr(output)
    assert output.aux_loss is None and output.objective is None
    field = getattr(output, name)
    for use in (
        lambda: field[:, -3:],
        lambda: field.detach(),
        lambda: output.log_probs - field,
        lambda: field * 2,
        lambda: field or 0,
    ):
        with pytest.raises(AttributeError, match=f"did not compute `{name}`.*`outputs=`"):
            use()


@pytest.mark.parametrize(
    ("budget", "said"), [(None, "keeps"), (0, "computes its probabilities again")]
)
def test_memory_budget_changes_nothing_but_the_way_and_says_which(budget, said, caplog):
    head_weights._log_choice.cache_clear()
    ours, plain = build("llama"), build("llama")
    attach_head(ours, memory_budget=budget)
    with caplog.at_level("INFO", logger="llmmix.head_weights"):
        ours(**batch(), fused_lm_head=True).loss.backward()
    assert said in caplog.text
    plain(**batch()).loss.backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad)


@pytest.mark.parametrize("first", ["peft", "head"])
def test_works_before_and_after_peft(first):
    model, expected = build("llama"), build("llama")(**batch()).loss
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    if first == "head":
        attach_head(model)
    model = get_peft_model(model, lora)
    if first == "peft":
        attach_head(model)
    output = model(**batch(), fused_lm_head=True)
    torch.testing.assert_close(output.loss, expected)  # a fresh adapter changes nothing
    output.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


ADAPTERS_ON_THE_HEAD = {
    "lora": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "lora-dropout": ("llama", {"target_modules": ["lm_head"], "lora_dropout": 0.5}),
    "rslora": ("gemma2-softcap", {"target_modules": ["lm_head"], "use_rslora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 60]}),
    "tokens-untied": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 60]}),
}


@pytest.mark.parametrize(
    ("kind", "state"),
    [(k, s) for k in ADAPTERS_ON_THE_HEAD for s in ("active", "disabled")] + [("lora", "merged")],
)
def test_an_adapter_on_the_head_is_computed_and_trained(kind, state):
    name, options = ADAPTERS_ON_THE_HEAD[kind]
    model = get_peft_model(build(name), LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:  # as drawn, B is zero
            nn.init.normal_(parameter, std=0.3)
    attach_head(model)
    if state == "merged":
        model.merge_adapter()
    inputs = batch()
    model.train(state == "active")

    def results(**kwargs):
        model.zero_grad()
        torch.manual_seed(3)  # of dropout
        with model.disable_adapter() if state == "disabled" else contextlib.nullcontext():
            loss = model(**inputs, **kwargs).loss
        if state == "active":
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads

    loss, grads = results(fused_lm_head=True)
    if kind == "lora-dropout":  # its masks are drawn for other shapes: not the same numbers
        assert set(grads) == set(results()[1]) and loss.isfinite()
        model.eval()
        loss, grads = results(fused_lm_head=True)
    torch.testing.assert_close((loss, grads), results(), rtol=1e-4, atol=1e-5)
    assert state != "active" or any("lm_head" in n or "token" in n for n in grads)


def test_a_deep_copy_runs_its_own_weights():
    model = build("llama")
    attach_head(model)
    twin = copy.deepcopy(model)
    nn.init.normal_(twin.lm_head.weight)
    inputs = batch()
    assert not torch.equal(twin(**inputs).logits, model(**inputs).logits)
    torch.testing.assert_close(twin(**inputs, fused_lm_head=True).loss, twin(**inputs).loss)


def test_saves_and_loads_as_if_it_were_not_there(model, tmp_path):
    attach_head(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.forward, "own_forward")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_nothing_scored_gives_a_zero_with_a_gradient():
    model, inputs = build("llama"), batch()
    attach_head(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs, fused_lm_head=True).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    losses = []
    for checkpointing in (False, True):
        model = build("llama").train()
        attach_head(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**batch(), fused_lm_head=True).loss
        loss.backward()
        losses.append((loss, model.model.embed_tokens.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])


def test_objective_runs_inside_the_forward():
    model = build("llama")
    attach_head(model)

    def objective(hidden, labels, logprobs):
        return {"first": logprobs(hidden[:, 0], labels[:, 0].clamp(min=0))}

    output = model(**batch(), fused_lm_head=True, head_objective=objective)
    assert output.label_mask[0, 0]  # the first position of row 0 is scored by both
    torch.testing.assert_close(output.objective["first"][0], output.log_probs[0, 0])


def test_under_fully_shard_it_answers_alike_and_in_fp32():
    """FSDP2 on one gloo rank, in bf16 with the policy that `keep_outputs_in_fp32` sets."""
    model, expected = build("llama"), build("llama")
    attach_head(expected)
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, output_dtype=torch.bfloat16
            )
        )
    )
    keep_outputs_in_fp32(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))
    policy = state.fsdp_plugin.mixed_precision_policy
    assert policy.output_dtype == torch.float32 and policy.param_dtype == torch.bfloat16
    attach_head(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        output = model(**batch(), fused_lm_head=True)
        assert output.log_probs.dtype == torch.float32
        truth = expected(**batch(), fused_lm_head=True)
        torch.testing.assert_close(output.loss, truth.loss, rtol=0.03, atol=0.03)
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_refuses_what_it_cannot_serve():
    model = build("llama")
    attach_head(model)
    with pytest.raises(ValueError, match="needs `labels`"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), fused_lm_head=True)
    with pytest.raises(TypeError, match="causal language model"):
        attach_head(nn.Linear(2, 2))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        attach_head(get_peft_model(build("llama"), lora))


def kept_logits(hidden, labels, head):
    return {"logits": head.logits(hidden[labels != -100])}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_at_hand_are_the_models_own_with_their_gradients(name):
    ours, plain, inputs = build(name), build(name), batch()
    mask = inputs["labels"][:, 1:] != -100
    attach_head(ours)
    found = ours(**inputs, fused_lm_head=True, head_objective=kept_logits).objective["logits"]
    logits = plain(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    expected = logits[:, :-1][mask]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.log_softmax(-1).square().mean().backward()
    expected.log_softmax(-1).square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_logits_at_hand_are_in_fp32_and_hold_an_adapter_of_the_head(name):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "q_proj"])
    model, inputs = get_peft_model(build(name), lora), batch()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    mask = inputs["labels"][:, 1:] != -100
    expected = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1][mask]
    attach_head(model)
    options = {"fused_lm_head": True, "head_objective": kept_logits}
    torch.testing.assert_close(
        model(**inputs, **options).objective["logits"], expected, rtol=1e-4, atol=1e-5
    )
    with model.disable_adapter():
        off = model(**inputs, **options).objective["logits"]
    assert (off - expected).abs().max() > 0.1
    assert model.bfloat16()(**inputs, **options).objective["logits"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["modernbert-decoder", "bert", "roformer"])
def test_a_model_that_does_more_than_a_product_is_refused_when_attached(kind):
    config = AutoConfig.for_model(
        kind, **{**SMALL, "hidden_size": 32}, is_decoder=True, pad_token_id=0, cls_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    with pytest.raises(ValueError, match=f"nats from those of {type(model).__name__}.*`Trainer`"):
        attach_head(model)
    assert not hasattr(model.forward, "own_forward")


def test_a_scale_of_the_width_is_known_and_a_padded_vocabulary_refused(caplog):
    sizes = {**SMALL, "hidden_size": 32, "head_dim": 16}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2}
    for padded in (False, True):
        config = AutoConfig.for_model(
            "inkling_text", **sizes, unpadded_vocab_size=50 if padded else None
        )
        model = AutoModelForCausalLM.from_config(config)
        nn.init.normal_(model.lm_head.weight, std=3.0)
        with pytest.raises(ValueError, match="nats from") if padded else contextlib.nullcontext():
            attach_head(model)
    assert "not compared" not in caplog.text


ROUTED = {
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
}


@pytest.mark.parametrize("kind", ROUTED)
def test_the_router_loss_is_the_models_own(kind):
    config = AutoConfig.for_model(
        kind, **SMALL, num_experts_per_tok=2, output_router_logits=True, **ROUTED[kind]
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, labels=ids)
    attach_head(model)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)
    plain = build("llama")
    attach_head(plain)
    refused = "router loss that LlamaForCausalLM does not have.*`router_aux_loss_coef=0`"
    with pytest.raises(ValueError, match=refused):
        plain(**batch(), fused_lm_head=True, output_router_logits=True)


def test_comparing_leaves_no_trace():
    model, seen = build("llama").train(), []
    model.model.layers[0].eval()
    model.register_forward_hook(lambda *_: seen.append(1))
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    attach_head(model)
    assert [m.training for m in model.modules()] == modes and not seen
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_come_later_are_compared_at_the_first_forward():
    with torch.device("meta"):
        model = LlamaForCausalLM(copy.deepcopy(ARCHITECTURES["llama"][1]))
    attach_head(model)
    model.to_empty(device="cpu")
    model.load_state_dict(build("llama").state_dict())
    model.model.rotary_emb = build("llama").model.rotary_emb
    model.lm_head.register_forward_pre_hook(lambda _, given: (-given[0],))
    with pytest.raises(ValueError, match="nats from those of LlamaForCausalLM"):
        model(**batch(), fused_lm_head=True)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(precision):
    for name in ARCHITECTURES:
        model = build(name).to(precision)
        attach_head(model)
        assert model.forward.compared == {"once"}


def test_a_model_that_cannot_run_on_tokens_alone_is_said_not_to_be_compared(caplog):
    model = build("llama")

    def needs_more(self, input_ids, pixels, **kwargs):
        return LlamaForCausalLM.forward(self, input_ids, **kwargs)

    model.forward = types.MethodType(needs_more, model)
    for _ in range(2):
        attach_head(model)
    assert caplog.text.count("was not compared with the own logits of LlamaForCausalLM") == 1


def test_unknown_outputs_and_encoders_are_refused():
    with pytest.raises(ValueError, match="`outputs` must be names among .* got 'perplexity'"):
        attach_head(build("llama"), outputs=("log_probs", "perplexity"))
    config = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration, which has an encoder"):
        attach_head(T5ForConditionalGeneration(config))
