import sys
from types import ModuleType, SimpleNamespace

import pytest

from llmmix.sampling import Completion, sample

PROMPTS = ["1+1=", "123-45=", "7", [{"role": "user", "content": "What is 3*4?"}]]


def test_vllm_is_asked_for_each_completion_with_its_own_seed(tokenizer, monkeypatch):
    """The calls that vLLM gets, on a stand-in: vLLM itself comes below."""
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
    llm = SimpleNamespace(generate=generate, llm_engine=config)
    draws = list(sample(llm, tokenizer, PROMPTS, 3, done={(1, 0)}, temperature=0.5))
    assert [(c.prompt, c.sample) for c in draws] == [
        (p, s) for p in range(4) for s in range(3) if (p, s) != (1, 0)
    ]
    assert draws[0] == Completion(0, 0, "4", 1, True)
    assert asked[0][0] == {"prompt_token_ids": tokenizer(PROMPTS[0])["input_ids"]}
    assert len({params.seed for _, params in asked}) == 11
    assert {(p.temperature, p.top_p, p.max_tokens) for _, p in asked} == {(0.5, 1.0, 256)}


def test_vllm_itself(checkpoint, tokenizer):
    pytest.importorskip("vllm")
    from llmmix.sampling.vllm_backend import load_vllm

    llm = load_vllm(checkpoint, max_model_len=64)
    first, again = (
        list(sample(llm, tokenizer, PROMPTS, 4, max_new_tokens=8, seed=1)) for _ in "ab"
    )
    assert len({(c.prompt, c.sample) for c in first}) == 16
    assert first == again
