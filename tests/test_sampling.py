from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmmix.sampling import sample
from llmmix.verify import boxed_answer, exact_match


@pytest.fixture
def loaded(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model, AutoTokenizer.from_pretrained(checkpoint)


def test_draws_follow_the_models_distribution(loaded):
    """First tokens of 4,000 draws against their probabilities, by a chi-square."""
    model, tokenizer = loaded
    prompt = "12+7="
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    p = logits.double().softmax(-1)
    (draws,) = sample(model, tokenizer, [prompt], 4000, max_new_tokens=1, seed=3)
    counts = Counter(draws)
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    shared = Counter(texts)  # bytes that are no character alone all decode to the same mark
    common = [i for i in p.argsort(descending=True).tolist() if shared[texts[i]] == 1 and i > 3][
        :20
    ]
    observed = torch.tensor([counts[texts[i]] for i in common]).double()
    expected = 4000 * p[common]
    assert ((observed - expected) ** 2 / expected).sum() < 60  # 20 degrees of freedom


def test_same_seed_same_draws_and_the_callers_state_is_left_alone(loaded):
    model, tokenizer = loaded
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prompts = ["1+1=", [{"role": "user", "content": "2+2"}]]
    first = list(sample(model, tokenizer, prompts, 3, max_new_tokens=5, seed=1))
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert first == list(sample(model, tokenizer, prompts, 3, max_new_tokens=5, seed=1))
    assert first != list(sample(model, tokenizer, prompts, 3, max_new_tokens=5, seed=2))
    assert [len(completions) for completions in first] == [3, 3]


def test_refusals(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=r"1 prompts \(first: row 1, 300 tokens\) leave no room"):
        list(sample(model, tokenizer, ["1", "1" * 300], 1, max_new_tokens=8))
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        list(sample(model, tokenizer, ["1"], 1))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        ("4", None),
    ],
)
def test_boxed_answer(text, answer):
    assert boxed_answer(text) == answer


def test_exact_match_ignores_spaces_alone():
    assert exact_match(r"\boxed{ 1 2 }", "12") and exact_match(r"\boxed{7}", 7)
    assert not exact_match(r"\boxed{12.0}", "12") and not exact_match("12", "12")


def test_greedy_limit_is_generate(loaded):
    """At a temperature near zero every draw is what greedy `generate` gives, padding or not."""
    model, tokenizer = loaded
    prompts = ["1+1=", "123-45=", "7"]
    draws = list(sample(model, tokenizer, prompts, 2, max_new_tokens=6, temperature=1e-4))
    for prompt, completions in zip(prompts, draws, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].size(1) :], skip_special_tokens=True)
        assert completions == [text, text]


def test_finished_rows_leave_and_the_others_go_on(loaded):
    """With half of the vocabulary stopping, lengths are geometric and no text follows a stop."""
    model, tokenizer = loaded
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 2))
    (draws,) = sample(model, tokenizer, ["12+7="], 300, max_new_tokens=20, seed=1)
    lengths = [len(tokenizer(text)["input_ids"]) for text in draws]
    assert min(lengths) == 0 and max(lengths) > 2


def test_nucleus_leaves_out_the_tail(loaded):
    model, tokenizer = loaded
    with torch.no_grad():
        logits = model(**tokenizer("12+7=", return_tensors="pt")).logits[0, -1]
    p, order = logits.softmax(-1).sort(descending=True)
    nucleus = order[: int((p.cumsum(0) - p < 0.5).sum())].tolist()
    (draws,) = sample(model, tokenizer, ["12+7="], 500, max_new_tokens=1, top_p=0.5)
    assert set(draws) <= {tokenizer.decode([i], skip_special_tokens=True) for i in nucleus}
    with pytest.raises(ValueError, match="`top_p` must lie"):
        list(sample(model, tokenizer, ["1"], 1, top_p=0.0))
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        list(sample(model, tokenizer, ["1"], 1, temperature=0.0))
