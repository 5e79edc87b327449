"""Read a parameter whole where FSDP2 or DeepSpeed ZeRO-3 spreads it over ranks."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial


@overload
def whole(parameter: Tensor) -> Tensor: ...
@overload
def whole(parameter: None) -> None: ...
def whole(parameter: Tensor | None) -> Tensor | None:
    """The full tensor of a parameter that FSDP2 shards as a DTensor.

    Its gradient is averaged over the ranks and sharded again, as FSDP2 does for the parameters of
    a module that it calls. Under ZeRO-3 it is the parameter itself, to be read inside `gathered`.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def gathered(*parameters: Tensor | None) -> AbstractContextManager:
    """Gather what ZeRO-3 has partitioned while the context is open; otherwise do nothing.

    An autograd function that reads a weight enters it around `apply`, and again in its backward.
    ZeRO-3 accumulates the gradient of a trained weight after the backward has returned, and so
    needs it gathered for longer: the function must run inside the forward of the model, and take
    the weight from its module there. DeepSpeed then fetches it for the whole backward.
    """
    partitioned: dict[int, Any] = {id(p): p for p in parameters if hasattr(p, "ds_id")}
    if not partitioned:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # What a module of the model has gathered already must not be gathered again
    spread = [p for p in partitioned.values() if p.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(spread) if spread else nullcontext()


def is_spread(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 spreads the weights of a model over ranks."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )
