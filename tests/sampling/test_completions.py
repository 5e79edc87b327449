from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from llmmix.rows.prompts import encode
from llmmix.sampling import Completion, engine, sample


@pytest.fixture
def loaded(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model, AutoTokenizer.from_pretrained(checkpoint)


def by_key(completions) -> dict[tuple[int, int], Completion]:
    found = {(c.prompt, c.sample): c for c in completions}
    return dict(sorted(found.items()))


def texts(model, tokenizer, prompts, n, **options) -> list[list[str]]:
    found = by_key(sample(model, tokenizer, prompts, n, **options))
    assert list(found) == [(p, s) for p in range(len(prompts)) for s in range(n)]
    return [[found[p, s].text for s in range(n)] for p in range(len(prompts))]


PROMPTS = ["1+1=", "123-45=", "7", [{"role": "user", "content": "What is 3*4?"}]]


def test_draws_follow_the_models_distribution(loaded):
    """First tokens of 4,000 draws against their probabilities, by a chi-square."""
    model, tokenizer = loaded
    prompt = "12+7="
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    p = logits.double().softmax(-1)
    (draws,) = texts(model, tokenizer, [prompt], 4000, max_new_tokens=1, seed=3)
    counts = Counter(draws)
    names = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    shared = Counter(names)  # bytes that are no character alone all decode to the same mark
    common = [i for i in p.argsort(descending=True).tolist() if shared[names[i]] == 1 and i > 3][
        :20
    ]
    observed = torch.tensor([counts[names[i]] for i in common]).double()
    expected = 4000 * p[common]
    assert ((observed - expected) ** 2 / expected).sum() < 60  # 20 degrees of freedom


def test_second_tokens_follow_the_models_distribution_too(loaded, monkeypatch):
    """The shared prompt and a row's own keys, both in the chi-square."""
    model, tokenizer = loaded
    prompt = tokenizer("12+7=")["input_ids"]
    tokens = []
    take = engine.Engine._take

    def note(self, row, token):
        tokens.append((row, token))
        return take(self, row, token)

    monkeypatch.setattr(engine.Engine, "_take", note)
    list(sample(model, tokenizer, ["12+7="], 6000, max_new_tokens=2, seed=5))
    pairs: dict[int, list[int]] = {}
    for row, token in tokens:
        pairs.setdefault(id(row), []).append(token)
    drawn = Counter(tuple(pair) for pair in pairs.values() if len(pair) == 2)
    first = Counter(pair[0] for pair in drawn.elements()).most_common(1)[0][0]
    with torch.no_grad():
        p = model(torch.tensor([[*prompt, first]])).logits[0, -1].double().softmax(-1)
    total = sum(count for pair, count in drawn.items() if pair[0] == first)
    common = p.argsort(descending=True)[:10].tolist()
    observed = torch.tensor([drawn[first, i] for i in common]).double()
    expected = total * p[common]
    assert total > 300 and ((observed - expected) ** 2 / expected).sum() < 40


def test_same_seed_same_draws_and_the_callers_state_is_left_alone(loaded):
    model, tokenizer = loaded
    model.train()
    model.model.layers[0].eval()  # a mode of its own, which must come back too
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = texts(model, tokenizer, PROMPTS, 3, max_new_tokens=5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.model.layers[0].training
    assert model.config._attn_implementation == "sdpa"
    assert first == texts(model, tokenizer, PROMPTS, 3, max_new_tokens=5, seed=1)
    assert first != texts(model, tokenizer, PROMPTS, 3, max_new_tokens=5, seed=2)


def test_left_half_way_the_model_is_as_it_was(loaded):
    model, tokenizer = loaded
    model.train()
    next(sample(model, tokenizer, PROMPTS, 3, max_new_tokens=5))
    assert model.training and model.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_draws_do_not_depend_on_what_runs_beside_them(loaded):
    """One row at a time, a few, all; alone, in a shard, or after a resume: the same completions."""
    model, tokenizer = loaded
    options = {"max_new_tokens": 12, "seed": 4}
    longest = len(encode(tokenizer, PROMPTS[3]))
    whole = by_key(sample(model, tokenizer, PROMPTS, 5, **options))
    for budget in (longest + 12, 3 * (longest + 12), 5 * (longest + 12)):
        assert whole == by_key(sample(model, tokenizer, PROMPTS, 5, token_budget=budget, **options))
    shards = [
        by_key(sample(model, tokenizer, PROMPTS[r::2], 5, numbers=range(r, 4, 2), **options))
        for r in (0, 1)
    ]
    assert whole == dict(sorted({**shards[0], **shards[1]}.items()))
    done = [key for key in whole if sum(key) % 2]
    rest = by_key(sample(model, tokenizer, PROMPTS, 5, done=done, **options))
    assert rest == {key: value for key, value in whole.items() if key not in done}
    more = by_key(sample(model, tokenizer, PROMPTS, 7, **options))
    assert whole == {key: value for key, value in more.items() if key[1] < 5}


def families(tokenizer):
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    yield MistralForCausalLM(MistralConfig(**shared, sliding_window=6))
    yield Gemma2ForCausalLM(
        Gemma2Config(
            **shared, sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=8
        )
    )
    yield GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.3,
        )
    )


class Ids:
    """A tokenizer without a stop token, which gives token ids for text."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, ids, skip_special_tokens):
        return list(ids)


@pytest.mark.parametrize("family", [0, 1, 2], ids=["window", "softcap", "learned-positions"])
def test_temperature_zero_is_the_models_own_argmax(tokenizer, family):
    """At temperature 0 each token is the argmax of a plain forward over all before it."""
    model = list(families(tokenizer))[family].eval()
    model.generation_config.eos_token_id = None
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    draws = texts(model, Ids(), prompts, 2, max_new_tokens=14, temperature=0)
    for ids, (first, second) in zip(prompts, draws, strict=True):
        assert first == second and len(first) == 14
        for count in range(14):
            with torch.no_grad():
                logits = model(torch.tensor([ids + first[:count]])).logits[0, -1]
            assert logits[first[count]] >= logits.max() - 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
def test_ties_are_broken_alike_everywhere(tied_checkpoint, tokenizer, dtype, adapter):
    """Two tokens have each logit; equal prompts get one answer, in fp32 that of `generate`."""
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint, dtype=dtype)
    if adapter:
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, lora)
    prompts = ["12+7="] * 8 + ["1+1="] * 2
    draws = texts(model, tokenizer, prompts, 4, max_new_tokens=20, temperature=0, seed=5)
    assert draws == [[draws[0][0]] * 4] * 8 + [[draws[8][0]] * 4] * 2
    if dtype == torch.float32:  # bf16 rounds a row alone and beside others in two ways
        for prompt, (answer, *_) in zip(prompts, draws, strict=True):
            ids = torch.tensor([encode(tokenizer, prompt)])
            out = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
            assert answer == tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)


def test_lora_is_sampled_with_its_adapter(loaded):
    model, tokenizer = loaded
    plain = texts(model, tokenizer, PROMPTS, 2, max_new_tokens=8, temperature=0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert plain == texts(adapted, tokenizer, PROMPTS, 2, max_new_tokens=8, temperature=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    moved = texts(adapted, tokenizer, PROMPTS, 2, max_new_tokens=8, temperature=0)
    merged = adapted.merge_and_unload()
    assert plain != moved == texts(merged, tokenizer, PROMPTS, 2, max_new_tokens=8, temperature=0)


def test_finished_rows_leave_and_the_others_go_on(loaded):
    """With half of the vocabulary stopping, lengths are geometric and no text follows a stop."""
    model, tokenizer = loaded
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 2))
    draws = list(sample(model, tokenizer, ["12+7="], 300, max_new_tokens=20, seed=1))
    lengths = [c.tokens for c in draws]
    odd = {tokenizer.decode([i], skip_special_tokens=True) for i in range(1, len(tokenizer), 2)}
    assert {c.text for c in draws if c.tokens == 1} <= odd  # what stops is not in the text
    assert len(draws) == 300 and min(lengths) == 0 and 2 < max(lengths) < 20
    assert all(c.finished for c in draws)


def test_what_is_cut_is_not_finished(loaded):
    model, tokenizer = loaded
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    draws = list(sample(model, tokenizer, PROMPTS, 6, max_new_tokens=4, seed=1))
    assert {(c.tokens == 4) for c in draws if not c.finished} == {True}
    assert any(not c.finished for c in draws)


def test_rows_never_exceed_the_budget(loaded, monkeypatch):
    model, tokenizer = loaded
    seen = []
    init = engine.SharedPromptCache.__init__

    def record(self, rows, prompts, prompt_length, completion_length):
        seen.append(rows * completion_length + prompts * prompt_length)
        init(self, rows, prompts, prompt_length, completion_length)

    monkeypatch.setattr(engine.SharedPromptCache, "__init__", record)
    for budget in (100, 300, 1000):
        list(sample(model, tokenizer, PROMPTS, 4, max_new_tokens=8, token_budget=budget))
        assert seen[-1] <= budget
    with pytest.raises(ValueError, match="`token_budget` of 10 is less than one prompt of"):
        list(sample(model, tokenizer, PROMPTS, 4, max_new_tokens=8, token_budget=10))


def test_nucleus_leaves_out_the_tail(loaded):
    model, tokenizer = loaded
    with torch.no_grad():
        logits = model(**tokenizer("12+7=", return_tensors="pt")).logits[0, -1]
    p, order = logits.softmax(-1).sort(descending=True)
    nucleus = order[: int((p.cumsum(0) - p < 0.5).sum())].tolist()
    (draws,) = texts(model, tokenizer, ["12+7="], 500, max_new_tokens=1, top_p=0.5)
    assert set(draws) == {tokenizer.decode([i], skip_special_tokens=True) for i in nucleus}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["1"], {"top_p": 0.0}, "`top_p` must lie"),
        (["1"], {"temperature": -1.0}, "`temperature` must be 0, for the most probable token"),
        (["1"], {"temperature": 1e-46}, "or lie between 1.17549e-38 and infinity, got 1e-46"),
        (["1"], {"temperature": float("nan")}, "got nan"),
        (["1"], {"temperature": float("inf")}, "got inf"),
        (["1"], {"seed": -1}, "`seed` must be 0 or above"),
        (["1"], {"max_new_tokens": 0}, "`max_new_tokens` must be 1 or more"),
        (["1", ""], {}, r"1 prompts have no token \(first: prompt 1\)"),
        (["1", "1" * 300], {"max_new_tokens": 8}, r"first: prompt 1, 300 tokens\) leave no room"),
    ],
)
def test_refusals(loaded, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        list(sample(*loaded, prompts, 1, **options))


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_nan_is_refused(loaded, broken, temperature):
    model, tokenizer = loaded
    with torch.no_grad():
        model.lm_head.weight[3] = broken
    with pytest.raises(ValueError, match="NaN or infinity"):
        list(sample(model, tokenizer, ["1"], 1, max_new_tokens=8, temperature=temperature))


def test_no_pad_token_is_needed(loaded):
    model, tokenizer = loaded
    whole = list(sample(model, tokenizer, PROMPTS, 2, max_new_tokens=4))
    tokenizer.pad_token = None
    assert whole == list(sample(model, tokenizer, PROMPTS, 2, max_new_tokens=4))


def test_completions_of_one_token_come_as_they_are_drawn(loaded, monkeypatch):
    """Prompts are read as they are needed, not all before the first completion."""
    model, tokenizer = loaded
    monkeypatch.setattr(engine, "ROWS_STARTED_AT_ONCE", 4)
    read = []
    prefill = engine.Engine._prefill

    def note(self, *given):
        read.append(1)
        return prefill(self, *given)

    monkeypatch.setattr(engine.Engine, "_prefill", note)
    draws = sample(model, tokenizer, ["1+1=", "2", "3", "4", "5", "6"], 4, max_new_tokens=1)
    next(draws)
    assert len(read) == 1
    assert len(list(draws)) == 23 and len(read) == 6
