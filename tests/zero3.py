"""Run under torchrun by test_head.py: the fused head under DeepSpeed ZeRO-3 on a CPU.

Steps of SGD on halves of a batch must end where one process ends on all of it.
"""

import itertools

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llmmix import attach_head
from llmmix.sharding import gathered

ZERO3 = {
    "stage": 3,
    # Nothing stays gathered for convenience: what reads a weight too late must fail
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "overlap_comm": False,
}


def build(tied: bool, tuning: str) -> torch.nn.Module:
    """A small model; its head is trained, frozen, or carries an adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    if tuning == "frozen head":
        model.lm_head.weight.requires_grad_(False)
    if tuning == "LoRA on the head":
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
        model = get_peft_model(model, lora)
    attach_head(model, outputs=("log_probs", "entropy"))
    return model


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Plain SGD over what is trained."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def mixed(hidden, labels, logprobs):
    """A second call of the head in the same forward, as SFTMix makes it."""
    a, b = hidden[0::2].flatten(0, 1), hidden[1::2].flatten(0, 1)
    targets = torch.stack([labels[0::2].flatten(), labels[1::2].flatten()], dim=1)
    return {"mixed": logprobs(0.3 * a + 0.7 * b, targets).mean()}


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """A loss that takes log-probabilities, entropy and an objective from one forward."""
    output = model(input_ids=ids, labels=ids, fused_lm_head=True, head_objective=mixed)
    return output.loss - output.objective["mixed"] + 0.1 * output.entropy.mean()


def main() -> None:
    """Compare every kind of head."""
    deepspeed.init_distributed(dist_backend="gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = torch.randint(0, 61, (2, 4, 9), generator=torch.Generator().manual_seed(1))
    n = 4 // world
    config = {
        "train_micro_batch_size_per_gpu": n,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": ZERO3,
    }
    tunings = ("all trained", "frozen head", "LoRA on the head")
    for tied, tuning in itertools.product((False, True), tunings):
        alone = build(tied, tuning)
        model = build(tied, tuning)
        optimizer = sgd(alone)
        engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
        assert not any(p.numel() for p in model.parameters())
        for ids in batches:
            expected = loss_of(alone, ids)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = loss_of(engine, ids[rank * n : (rank + 1) * n])
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / world, expected.detach(), rtol=1e-5, atol=1e-5)
        whole = dict(alone.named_parameters())
        for name, parameter in model.named_parameters():
            with gathered(parameter):
                torch.testing.assert_close(parameter.data, whole[name].data, rtol=1e-5, atol=1e-5)
        engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
