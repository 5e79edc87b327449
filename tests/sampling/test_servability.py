"""What the engine decodes, and how `generate` samples the rest."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmmix.positions import rows_alike
from llmmix.sampling import completions, sample
from llmmix.sampling.completions import sample_by_generate
from llmmix.sampling.requests import SamplingOptions, requests_for
from llmmix.sampling.servability import assigned, why_not
from tests.checkpoint import LONG_ROPE

PROMPTS = ["What is 2+3?", "7", "What is 12+34? Say it."]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Models that attend, or keep a state, in ways of their own: why the engine refuses them
OTHERS = {
    "stablelm": ({}, "KeyError"),  # hands its attention no further arguments
    "jetmoe": ({"num_local_experts": 2, "kv_channels": 8}, "RuntimeError"),  # heads of experts
    "mamba": ({"state_size": 4}, "it keeps no keys and values"),
    "plbart": (
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "init_std": 0.2},
        "its logits come out wrong by",  # positions in its own order
    ),
    "gpt_oss": (
        {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "it has attention sinks",
    ),
    "qwen3_next": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 0,
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "IndexError",  # a layer without keys
    ),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "first_k_dense_replace": 2,
        },
        "RuntimeError",  # keys and values of two sizes
    ),
}


def build(tokenizer, name, **given):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{"vocab_size": len(tokenizer), **SIZES, **given})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "do_sample": False}
    out = model.generate(input_ids=ids, max_new_tokens=count, **options)
    return tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)


def by_key(draws):
    return dict(sorted({(c.prompt, c.sample): c for c in draws}.items()))


def options_of(**given):
    return SamplingOptions(**{**OPTIONS, **given})


OPTIONS = {
    "temperature": 0.7,
    "top_p": 0.9,
    "max_new_tokens": 8,
    "seed": 3,
    "num_samples": 3,
    "token_budget": 1000,
}


def requests(tokenizer, prompts, samples=1):
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return requests_for(ids, samples, range(len(ids)), ())


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_the_engine_cannot_decode_is_sampled_by_generate(tokenizer, name, monkeypatch):
    given, why = OTHERS[name]
    model = build(tokenizer, name, **given)
    model.generation_config.forced_eos_token_id = None
    with pytest.raises(ValueError, match=f"cannot be decoded by llmmix's engine.*{why}"):
        list(sample(model, tokenizer, PROMPTS, 1, max_new_tokens=8, fall_back=False))
    said = []
    monkeypatch.setattr(completions, "say_once", said.append)
    draws = by_key(sample(model, tokenizer, PROMPTS, 2, max_new_tokens=8, temperature=0))
    assert len(said) == 1 and "is slower than llmmix's engine" in said[0] and why in said[0]
    for number, prompt in enumerate(PROMPTS):
        first, second = draws[number, 0], draws[number, 1]
        assert first.text == second.text == greedy(model, tokenizer, prompt, 8)


def test_generate_and_the_engine_draw_the_same(model, tokenizer):
    """Each completion from its own stream, whatever shares its batch; stops and cuts alike."""
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 7))
    model.generation_config.repetition_penalty = 5.0  # neither is to heed it
    model.train()
    options = {key: value for key, value in OPTIONS.items() if key != "num_samples"}
    engine = by_key(sample(model, tokenizer, PROMPTS, 3, done={(0, 1)}, **options))
    assert len({c.finished for c in engine.values()}) == 2
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for budget in (1000, 40):
        wanted = requests_for(ids, 3, range(3), {(0, 1)})
        draws = sample_by_generate(model, tokenizer, wanted, options_of(token_budget=budget))
        assert by_key(draws) == engine
    assert model.generation_config.repetition_penalty == 5.0 and model.training


def test_what_nothing_can_decode_says_so(model, tokenizer, monkeypatch):
    model.hf_device_map = {"model": 0, "lm_head": 1}
    monkeypatch.setattr(model, "generate", lambda **given: 1 / 0)
    with pytest.raises(ValueError, match="several devices.*nor by its own `generate` .ZeroDiv"):
        list(sample(model, tokenizer, PROMPTS, 1, max_new_tokens=4))


def long_rope(tokenizer, model_class=Phi3ForCausalLM, config_class=Phi3Config):
    """A model that changes its frequencies behind 24 tokens."""
    torch.manual_seed(0)
    extra = {"original_max_position_embeddings": 24} if config_class is Phi3Config else {}
    config = config_class(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        rope_parameters=dict(LONG_ROPE),
        **SIZES,
        **extra,
    )
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_a_row_beyond_the_switch_changes_no_row_before_it(tokenizer, family):
    classes = () if family == "phi3" else (LlamaForCausalLM, LlamaConfig)
    model = long_rope(tokenizer, *classes)
    prompts = ["7", "What is 2+3? " * 2, "What is 2+3? " * 6]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert lengths[0] + 9 <= 24 and lengths[1] <= 24 < lengths[1] + 9 and lengths[2] > 24
    assert rows_alike(model, lengths) == [[0, 1], [2]]
    options = options_of(max_new_tokens=10)
    whys = [why for _, why in assigned(model, requests(tokenizer, prompts), options)]
    assert whys == [None, "its positions change where a row passes 24 tokens", None]
    beside = by_key(sample(model, tokenizer, prompts, 4, max_new_tokens=10, seed=1))
    for number, prompt in enumerate(prompts):
        given = {"max_new_tokens": 10, "numbers": [number]}
        alone = by_key(sample(model, tokenizer, [prompt], 4, seed=1, **given))
        assert alone == {key: c for key, c in beside.items() if key[0] == number}
        (first,) = sample(model, tokenizer, [prompt], 1, temperature=0, **given)
        assert first.text == greedy(model, tokenizer, prompt, 10)


def test_a_state_of_the_longest_row_is_noticed_whatever_it_is(model, tokenizer):
    wanted = requests(tokenizer, ["7", "What is 2+3? " * 6])
    assert why_not(model, wanted, options_of()) is None
    rope = model.model.rotary_emb
    plain = rope.forward

    def by_the_longest(x, position_ids):
        return plain(x, position_ids * (2 if position_ids.max() > 24 else 1))

    rope.forward = by_the_longest
    assert "logits come out wrong" in why_not(model, wanted, options_of())
    assert why_not(model, wanted[:1], options_of()) is None  # never so far


def test_a_window_that_the_attention_is_not_told_of_is_noticed(tokenizer):
    """Only rows that pass it are wrong."""
    config = {**SIZES, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **config)).eval()
    short, long = requests(tokenizer, ["7", "What is 2+3? " * 6])
    assert why_not(model, [short, long], options_of()) is None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert why_not(model, [short], options_of()) is None
    assert "logits come out wrong" in why_not(model, [short, long], options_of())
