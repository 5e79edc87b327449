"""Run under torchrun by test_two_ranks.py: the fused head with its weight spread over ranks.

    torchrun --nproc_per_node 2 -m tests.sharded fsdp2 | zero3

Steps of SGD on shares of a batch must end where one process ends on all of it, for heads that are
trained, frozen, replaced by PEFT's `modules_to_save`, or carry LoRA, tied to the embedding or not.
With adapters FSDP2 has a divergence from the model without them in its loss.
"""

import itertools
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from llmmix import attach_head
from llmmix.fused.sharding import gathered, whole

ADAPTERS = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
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
    """A small model with our head attached."""
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
    if tuning in ADAPTERS:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **ADAPTERS[tuning]))
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


def diverging(model, ids: torch.Tensor) -> torch.Tensor:
    """`loss_of`, and the divergence from the model with its adapter off, as asft takes it."""
    kept: list = []
    with torch.no_grad(), model.disable_adapter():
        model(
            input_ids=ids,
            labels=torch.full_like(ids, -100),
            fused_lm_head=True,
            head_objective=lambda hidden, _, head: kept.append((hidden.flatten(0, 1), head)) or {},
        )

    def objective(hidden, labels, head):
        return {"kl": head.kl_from(hidden.flatten(0, 1), *kept[0]).mean()}

    output = model(input_ids=ids, labels=ids, fused_lm_head=True, head_objective=objective)
    return loss_of(model, ids) + 3 * output.objective["kl"]


def zero3(model: torch.nn.Module, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A step under DeepSpeed."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": ZERO3,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    assert not any(p.numel() for p in model.parameters())

    def step(ids):
        loss = loss_of(engine, ids)
        engine.backward(loss)
        engine.step()
        return loss

    return step


def fsdp2(model: torch.nn.Module, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A step under `fully_shard`, where an untied head is a unit whose forward is never called."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # where torch is built for GPUs too
    for layer in causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    if not causal_lm.config.tie_word_embeddings:
        fully_shard(causal_lm.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, loss_function = sgd(model), diverging if causal_lm is not model else loss_of

    def step(ids):
        loss = loss_function(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def compare(kind: str) -> None:
    """Compare every kind of head, within a process group that is there."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = torch.randint(0, 61, (3, 4, 9), generator=torch.Generator().manual_seed(1))
    rows = 4 // world
    for tied, tuning in itertools.product((False, True), ("all", "frozen head", *ADAPTERS)):
        if tied and tuning == "saved":
            continue  # a saved copy is not tied any more
        alone, model = build(tied, tuning), build(tied, tuning)
        optimizer = sgd(alone)
        step = {"zero3": zero3, "fsdp2": fsdp2}[kind](model, rows)
        for ids in batches:
            both = kind == "fsdp2" and tuning in ADAPTERS
            expected = (diverging if both else loss_of)(alone, ids)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = step(ids[rank * rows : (rank + 1) * rows]).detach().clone()
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / world, expected.detach(), rtol=1e-5, atol=1e-5)
        trained = dict(alone.named_parameters())
        for name, parameter in model.named_parameters():
            with gathered(parameter), torch.no_grad():
                full = whole(parameter).detach()
                torch.testing.assert_close(full, trained[name].detach(), rtol=1e-5, atol=1e-5)
        if os.environ.get("RANK") == "0":
            print(kind, "tied" if tied else "untied", tuning, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "zero3":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    compare(sys.argv[1])
    dist.destroy_process_group()
