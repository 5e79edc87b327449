"""`llmmix.sampling.sample` on vLLM: the same completions asked for, drawn by vLLM's own streams.

vLLM seeds each request by itself, so a completion does not depend on what runs beside it; it is
another stream than that of the transformers engine, and the two draw different completions.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from llmmix.sampling.requests import Completion, PromptRequest, SamplingOptions

REQUESTS_A_CALL = 4096  # completions come back, and are written down, after each call


def load_vllm(checkpoint: str, adapter: str | None = None, **options: Any) -> Any:
    """A `vllm.LLM` of a checkpoint folder or hub id.

    Args:
        checkpoint: What `from_pretrained` takes.
        adapter: Must be None: merge an adapter into the checkpoint first.
        **options: Further arguments of `vllm.LLM`.

    Raises:
        ValueError: vLLM is not installed, or an adapter is given.
    """
    if adapter is not None:
        raise ValueError(
            "`adapter` is not taken by the vllm backend: merge it into the checkpoint "
            "(`merge_and_unload` of peft), or use `backend` 'transformers'."
        )
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            "`backend` is 'vllm', and it is not installed: pip install llmmix[vllm]"
        ) from error
    return LLM(model=checkpoint, enable_prefix_caching=True, **options)


def sample_vllm(
    llm: Any, wanted: Sequence[PromptRequest], options: SamplingOptions
) -> Iterator[Completion]:
    """Draw what is wanted, a few thousand requests a call, each with a seed of its own."""
    from vllm import SamplingParams

    requests = [(prompt, sample) for prompt in wanted for sample in prompt.samples]
    for start in range(0, len(requests), REQUESTS_A_CALL):
        part = requests[start : start + REQUESTS_A_CALL]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt.ids} for prompt, _ in part],
            [
                SamplingParams(
                    temperature=options.temperature,
                    top_p=options.top_p,
                    max_tokens=options.max_new_tokens,
                    seed=request_seed(options.seed, prompt.number, sample),
                    skip_special_tokens=True,
                )
                for prompt, sample in part
            ],
            use_tqdm=False,
        )
        for (prompt, sample), output in zip(part, outputs, strict=True):
            answer = output.outputs[0]
            finished = answer.finish_reason == "stop"
            # The stop token, which comes with the others, is not counted
            tokens = max(0, len(answer.token_ids) - finished)
            yield Completion(prompt.number, sample, answer.text, tokens, finished)


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """A seed below 2^63 for one completion, far from those of its neighbours."""
    digest = hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
