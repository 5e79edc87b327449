import copy
import logging

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RwkvConfig,
    SiglipVisionConfig,
)
from transformers.integrations.neftune import activate_neftune
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmmix import attach_head, attach_heads, padding_free
from llmmix.padding_free import check_padding_free
from llmmix.segment_attention import Segments, attend

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SMALL, **KINDS, head_dim=8, sliding_window=4),
    "gemma2": Gemma2Config(**SMALL, **KINDS, head_dim=8, sliding_window=4),
    "mixtral": MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
    ),
    "gpt_oss": GptOssConfig(
        **SMALL, **KINDS, head_dim=8, num_local_experts=4, sliding_window=4, num_experts_per_tok=2
    ),
    "falcon": FalconConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    ),
    "gpt2": GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2),
    "opt": OPTConfig(
        vocab_size=61,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    ),
}
# Eager attention under windows has no answer in fp64 where a row is padded, and Gemma's
# normalization computes in fp32
IN_FP32 = ("gemma2", "gemma3", "gpt_oss")
# Those whose attention has a softcap, sinks, or no look at the positions
DENSE = ("gemma2", "gpt_oss", "falcon")


def build(name, dtype=torch.float64, **settings):
    if name in ("mixtral", "qwen3_moe", "gpt_oss"):
        settings["experts_implementation"] = "eager"  # the other has no fp64
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), **settings).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def batch(side="right", lengths=(7, 12, 1, 0, 9)):
    width = max(lengths) + 2
    ids = torch.randint(5, 61, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    mask = mask if side == "right" else mask.flip(1)
    labels = ids.masked_fill(~mask, -100)
    labels[:, 1:].masked_fill_(~mask[:, :-1], -100)  # no token predicts the first
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def trained(model, inputs, free):
    attach_head(model, outputs=("log_probs", "entropy"), padding_free=free)
    return stepped(model, inputs)


def stepped(model, inputs):
    model.zero_grad()
    output = model(**inputs, fused_lm_head=True)
    output.loss.backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(padded, free, rtol):
    (a, grads), (b, found) = padded, free
    assert torch.equal(a.label_mask, b.label_mask)
    for name in ("loss", "log_probs", "entropy", "aux_loss"):
        if a.get(name) is not None:
            assert (a[name] - b[name]).abs().max() <= rtol * a[name].abs().max(), name
    largest = max(grad.norm() for grad in grads.values())
    assert grads.keys() == found.keys()
    for name, grad in grads.items():
        assert (grad - found[name]).norm() <= 10 * rtol * max(grad.norm(), 1e-3 * largest), name


@pytest.fixture
def widths(monkeypatch):
    """Of each attention by segments, the lengths that it saw."""
    seen = []

    def counting(query, key, value, segments, *args):
        seen.append(segments.lengths)
        return attend(query, key, value, segments, *args)

    monkeypatch.setattr("llmmix.segment_attention.attend", counting)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_padded_batch(name, widths, caplog):
    model = build(name, torch.float32 if name in IN_FP32 else torch.float64)
    padding_free.log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        free = trained(model, batch(), True)
    rtol = 1e-5 if name in IN_FP32 else 1e-9
    assert_alike(trained(model, batch(), False), free, rtol)
    if name in DENSE:
        assert widths == [] and "under a dense mask" in caplog.text
    else:
        assert widths[-1] == [7, 12, 1, 9] and caplog.text == ""


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gemma2", "qwen3_moe", "opt"])
def test_is_the_padded_batch_where_the_padding_is_on_the_left(name):
    # Rotary embeddings are in fp32, whatever the model is in
    model = build(name, torch.float32)
    padded, free = (trained(model, batch("left"), free) for free in (False, True))
    assert_alike(padded, free, rtol=1e-5)


def test_learned_positions_count_from_the_first_token():
    """A padded run of GPT-2 counts the padding on the left as well."""
    model, inputs = build("gpt2"), batch("left")
    free = trained(model, inputs, True)[0].log_probs[0, -6:]
    ids = inputs["input_ids"][:1, -7:]
    alone = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    torch.testing.assert_close(free, alone)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_sequences_that_came_packed_are_kept_apart(name, widths):
    """GPT-OSS does not look at positions, and alone it would mix them."""
    model, padded = build(name, torch.float32), batch()
    kept = padded["attention_mask"] != 0
    packed = {k: padded[k][kept].unsqueeze(0) for k in ("input_ids", "labels")}
    packed["position_ids"] = (kept.cumsum(1) - 1)[kept].unsqueeze(0)
    packed["labels"][packed["position_ids"] == 0] = -100  # as TRL has them
    free = trained(model, {**packed, "seq_idx": None}, True)
    assert name == "gpt_oss" or widths[-1] == [7, 12, 1, 9]
    rows, apart = (run[0].log_probs for run in (free, trained(model, padded, True)))
    torch.testing.assert_close(rows[rows != 0], apart[apart != 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing_attends_as_the_forward_did(name, reentrant, widths):
    model = build(name, torch.float32).train()
    padded = trained(model, batch(), False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_alike(padded, trained(model, batch(), True), rtol=1e-5)
    # two layers when it is compared, in the forward, and again in the backward
    assert len(widths) == (6 if name == "llama" else 0)


@pytest.mark.parametrize("first", ["head", "adapter"])
def test_adapters_are_trained_alike(first):
    gradients = []
    for free in (False, True):
        model = build("llama")
        if first == "head":
            attach_head(model, padding_free=free)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(init_lora_weights=False))
        gradients.append(trained(model, batch(), free))
    assert_alike(*gradients, rtol=1e-9)


def test_autocast_rounds_and_no_more():
    model = build("llama", torch.float32)
    padded = trained(model, batch(), False)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(padded, trained(model, batch(), True), rtol=3e-2)
    model = model.to(torch.bfloat16)
    loss = trained(model, batch(), True)[0].loss
    torch.testing.assert_close(loss, padded[0].loss, rtol=3e-2, atol=0)


def test_noise_of_neftune_is_that_of_the_padded_batch():
    model = build("llama").train()
    activate_neftune(model, 5.0)
    runs = []
    for free in (False, True):
        torch.manual_seed(3)
        runs.append(trained(model, batch(), free))
    assert_alike(*runs, rtol=1e-9)


def test_an_objective_has_the_rows_of_the_batch():
    model = build("llama")
    for inputs in (batch(), batch("left")):
        padded, free = (objective_of(model, inputs, free) for free in (False, True))
        kept = inputs["attention_mask"][:, :-1] != 0
        assert free["hidden"].shape == padded["hidden"].shape == (5, 13, 16)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(free["hidden"][kept], padded["hidden"][kept], **close)
        assert not free["hidden"][~kept].any() and torch.equal(free["labels"], padded["labels"])


def objective_of(model, inputs, free):
    attach_head(model, padding_free=free)

    def keep(hidden, labels, head):
        return {"hidden": hidden, "labels": labels}

    return model(**inputs, fused_lm_head=True, head_objective=keep).objective


def test_a_label_behind_padding_is_not_scored():
    model, inputs = build("llama"), batch("left")
    attach_head(model, padding_free=True)
    expected = model(**inputs, fused_lm_head=True)
    labels = inputs["input_ids"].clone()  # the first token of each row too, and the padding
    found = model(**{**inputs, "labels": labels}, fused_lm_head=True)
    assert torch.equal(found.label_mask, expected.label_mask)
    assert torch.equal(found.log_probs, expected.log_probs)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    inputs["labels"] = None
    again = model(**inputs, shift_labels=shifted, fused_lm_head=True)
    assert torch.equal(again.log_probs[:, :-1], expected.log_probs)
    assert not again.log_probs[:, -1].any()


def test_other_inputs_of_each_token_lose_their_padding_too():
    model, inputs = build("gpt2"), batch()
    padded = trained(model, inputs, False)
    kinds = torch.randint(5, 61, inputs["input_ids"].shape)
    assert_alike(
        *(trained(model, {**inputs, "token_type_ids": kinds}, free) for free in (False, True)),
        rtol=1e-9,
    )
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    free = trained(model, {**inputs, "inputs_embeds": embedded}, True)
    torch.testing.assert_close(free[0].log_probs, padded[0].log_probs, rtol=1e-9, atol=1e-12)


AS_THEY_CAME = {
    "no padding": lambda inputs: {"attention_mask": torch.ones_like(inputs["attention_mask"])},
    "no mask": lambda inputs: {"attention_mask": None},
    "no token": lambda inputs: {"attention_mask": torch.zeros_like(inputs["attention_mask"])},
    "positions": lambda inputs: {"position_ids": torch.arange(14).expand(5, 14)},
    "4D": lambda inputs: {
        "attention_mask": (inputs["attention_mask"].bool()[:, None, None]).expand(5, 1, 14, 14)
    },
    "holes": lambda inputs: {"attention_mask": torch.arange(14).ne(3).long().expand(5, 14)},
}


@pytest.mark.parametrize("kind", AS_THEY_CAME)
def test_other_batches_run_as_they_came(kind, widths):
    model, inputs = build("llama"), batch()
    inputs |= AS_THEY_CAME[kind](inputs)
    padded = trained(model, inputs, False)
    free = trained(model, inputs, True)
    assert len(widths) == 2  # as it was compared
    assert torch.equal(padded[0].log_probs, free[0].log_probs)


def test_one_row_and_ids_by_their_place():
    model = build("llama")
    one = {name: x[:1] for name, x in batch().items()}
    padded, free = (trained(model, one, free) for free in (False, True))
    assert_alike(padded, free, rtol=1e-9)
    ids = one.pop("input_ids")
    assert torch.equal(model(ids, **one, fused_lm_head=True).log_probs, padded[0].log_probs)


def test_shows_nowhere_else(model, tokenizer, tmp_path):
    ids = tokenizer("2+2=", return_tensors="pt")
    reference, before = copy.deepcopy(model), model.config.to_dict()
    text = model.generate(**ids, max_new_tokens=5, do_sample=False)
    logits = model(**ids).logits
    attach_head(model, padding_free=True)
    model(**batch(), fused_lm_head=True).loss.backward()
    assert model.config.to_dict() == before and model.config._attn_implementation == "sdpa"
    for other in (model, reference, copy.deepcopy(model)):
        assert torch.equal(other(**ids).logits, logits)
        assert torch.equal(other.generate(**ids, max_new_tokens=5, do_sample=False), text)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**ids).logits, logits)


def test_a_copy_runs_its_own_weights():
    model = build("llama")
    attach_head(model, padding_free=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.neg_()
    expected = trained(copy.deepcopy(other), batch(), False)[0]
    found = other(**batch(), fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attention_that_the_user_chose_is_kept(when, widths):
    model = build("llama")
    padded = trained(model, batch(), False)
    if when == "before":
        model.set_attn_implementation("eager")
    attach_head(model, outputs=("log_probs", "entropy"), padding_free=True)
    model.set_attn_implementation("eager")
    widths.clear()
    free = stepped(model, batch())
    assert widths == [] and model.config._attn_implementation == "eager"
    assert_alike(padded, free, rtol=1e-6)


def test_flash_attention_gets_the_bounds_and_no_mask(monkeypatch):
    model, lengths = build("mistral"), []
    padded = trained(model, batch(), False)

    def flash(module, query, key, value, mask, scaling, sliding_window, **kwargs):
        if mask is not None:  # as flash attention does where a batch is padded
            return AttentionInterface()["sdpa"](module, query, key, value, square(mask)), None
        bounds = kwargs["cu_seq_lens_q"]
        assert bounds.dtype == torch.int32 and torch.equal(bounds, kwargs["cu_seq_lens_k"])
        lengths.append(bounds.diff().tolist())
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths[-1])
        segments = Segments(lengths[-1], query.device)
        return attend(query, key, value, segments, sliding_window, scaling), None

    def square(mask):
        size = mask.size(1)
        return (torch.ones(size, size).tril().triu(-3).bool() & mask.bool()[:, None])[:, None]

    def answered(*args, **kwargs):
        out = flash(*args, **kwargs)
        return out[0] if isinstance(out[0], tuple) else out

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", answered)
    model.config._attn_implementation = "flash_attention_2"
    free = trained(model, batch(), True)
    assert lengths[-1] == [7, 12, 1, 9]
    assert_alike(padded, free, rtol=1e-9)


TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2}
REFUSED = {
    "BloomForCausalLM takes no `position_ids`": BloomConfig(
        vocab_size=61, hidden_size=16, n_layer=1, n_head=2
    ),
    "MambaForCausalLM .* not plain attention .linear_attention.": MambaConfig(**TINY),
    "RwkvForCausalLM .* not plain attention .state.": RwkvConfig(**TINY),
    "Lfm2ForCausalLM .* not plain attention .conv.": Lfm2Config(
        **SMALL, layer_types=["conv", "full_attention"]
    ),
    "Llama4ForCausalLM attends within chunks": Llama4TextConfig(
        **SMALL, intermediate_size_mlp=16, head_dim=8, num_local_experts=2, pad_token_id=0
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refuses_by_name_what_cannot_run_without_padding(said):
    model = AutoModelForCausalLM.from_config(REFUSED[said])
    for refuse in (check_padding_free, lambda model: attach_head(model, padding_free=True)):
        with pytest.raises(ValueError, match=said):
            refuse(model)


def test_refuses_virtual_tokens_images_and_tensor_parallelism(monkeypatch):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PeftModelForCausalLM puts the virtual tokens"):
        check_padding_free(get_peft_model(build("llama"), prompt))
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=CONFIGS["gemma3"], vision_config=vision)
        )
    with pytest.raises(ValueError, match="reads more than tokens"):
        check_padding_free(model)
    model = build("llama")
    monkeypatch.setattr(model, "_tp_size", 2)
    with pytest.raises(ValueError, match="tensor-parallel"):
        check_padding_free(model)


def test_refuses_a_model_that_answers_otherwise():
    model = build("llama")
    own = model.model.rotary_emb.forward

    def counted_on(x, position_ids):  # as a model that does not look at its positions
        return own(x, torch.arange(x.size(1)).unsqueeze(0) ** 2)

    model.model.rotary_emb.forward = counted_on
    attach_head(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not answer alike without padding"):
        attach_head(model, padding_free=True)


def test_weights_that_come_later_are_compared_at_the_first_forward(widths):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    attach_head(model, padding_free=True)
    model.to_empty(device="cpu").load_state_dict(build("llama", torch.float32).state_dict())
    model.model.rotary_emb = build("llama", torch.float32).model.rotary_emb
    found = model(**batch(), fused_lm_head=True)
    assert len(widths) == 4
    expected = trained(model, batch(), False)[0]
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trls_trainers_take_the_same_steps(method, checkpoint, math_rows, preference_rows, widths):
    kind, config, rows = (
        (SFTTrainer, SFTConfig, math_rows)
        if method == "sft"
        else (DPOTrainer, DPOConfig, preference_rows)
    )
    logs = []
    for free in (False, True):
        args = config(
            output_dir="unused",
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        )
        lora = LoraConfig(init_lora_weights=False) if method == "dpo" else None
        torch.manual_seed(0)
        trainer = kind(checkpoint, args=args, train_dataset=rows, peft_config=lora)
        attach_heads(trainer, padding_free=free)
        widths.clear()
        trainer.train()
        assert (len(widths) > 0) == free
        logs.append(trainer.state.log_history[:-1])
    assert len(logs[0]) == 3
    for padded, free in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "rewards/margins", "mean_token_accuracy"):
            if name in padded:
                rtol = 1e-4 if name == "grad_norm" else 1e-5
                assert free[name] == pytest.approx(padded[name], rel=rtol, abs=1e-6), name
