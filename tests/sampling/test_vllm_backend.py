import sys
from types import ModuleType, SimpleNamespace

import pytest

from llmmix.sampling import Completion, sample
from llmmix.unlearning.evaluation.texts import generate_greedily

PROMPTS = ["1+1=", "123-45=", "7", [{"role": "user", "content": "What is 3*4?"}]]


@pytest.fixture
def stand_in(tokenizer, monkeypatch):
    """A `vllm.LLM` that always answers 4, and the list of what it is asked."""
    vllm = ModuleType("vllm")
    vllm.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    asked = []

    def generate(prompts, params, use_tqdm):
        asked.extend(zip(prompts, params, strict=True))
        answer = SimpleNamespace(text="4", token_ids=[5, tokenizer.eos_token_id])
        answer.finish_reason = "stop"
        return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
    return SimpleNamespace(generate=generate, llm_engine=config), asked


def test_vllm_is_asked_for_each_completion_with_its_own_seed(stand_in, tokenizer):
    """The calls that vLLM gets, on a stand-in: vLLM itself comes below."""
    llm, asked = stand_in
    draws = list(sample(llm, tokenizer, PROMPTS, 3, done={(1, 0)}, temperature=0.5))
    assert [(c.prompt, c.sample) for c in draws] == [
        (p, s) for p in range(4) for s in range(3) if (p, s) != (1, 0)
    ]
    assert draws[0] == Completion(0, 0, "4", 1, True)
    assert asked[0][0] == {"prompt_token_ids": tokenizer(PROMPTS[0])["input_ids"]}
    assert len({params.seed for _, params in asked}) == 11
    assert {(p.temperature, p.top_p, p.max_tokens) for _, p in asked} == {(0.5, 1.0, 256)}


def test_vllm_is_asked_for_greedy_answers_at_temperature_zero(stand_in, tokenizer):
    """It raises a temperature below 0.01, such as 1e-12, to 0.01, at which it still draws."""
    llm, asked = stand_in
    assert generate_greedily(llm, tokenizer, PROMPTS[:2]) == ["4", "4"]
    list(sample(llm, tokenizer, PROMPTS[:2], 2, temperature=0))
    assert [p.temperature for _, p in asked] == [0] * 6


def test_vllm_itself(checkpoint, tokenizer):
    pytest.importorskip("vllm")
    from llmmix.sampling.vllm_backend import load_vllm

    llm = load_vllm(checkpoint, max_model_len=64)
    first, again = (
        list(sample(llm, tokenizer, PROMPTS, 4, max_new_tokens=8, seed=1)) for _ in "ab"
    )
    assert len({(c.prompt, c.sample) for c in first}) == 16
    assert first == again
    greedy = list(sample(llm, tokenizer, PROMPTS, 4, max_new_tokens=8, temperature=0))
    assert len({(c.prompt, c.text) for c in greedy}) == 4
