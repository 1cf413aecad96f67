"""The network on many processes: replicated (DDP) or sharded (FSDP), and gathered again for checkpoints and previews.

Accelerate's launcher says which: `accelerate launch --use_fsdp`, or a configuration with `distributed_type: FSDP`, sets
an environment variable. Sharding is torch's `fully_shard`, block by block, with parameters kept in float32, so that a
sharded run computes what a replicated one does and either resumes from the other's checkpoints.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from models import DeepFlow


def is_sharded() -> bool:
    """Whether the launcher enables FSDP, and there is more than one process to shard over."""
    return dist.is_initialized() and dist.get_world_size() > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


@torch.no_grad()
def synchronise(network: nn.Module) -> None:
    """Give all processes the weights of the first: before anything is copied from them."""
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)


def shard(network: DeepFlow, device: torch.device) -> None:
    """Cut the parameters over all processes, in place: gathered block by block, when a block computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # from torch 2.6 on

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in network.repeated_blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def replicate(network: nn.Module, device: torch.device) -> nn.Module:
    """The network wrapped so that gradients are averaged over all processes; itself where there is only one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)


def averaging(model: Callable[..., Any], wanted: bool) -> AbstractContextManager:
    """Around a forward and backward: whether its gradients are averaged over the processes, or only added up."""
    if hasattr(model, "set_requires_gradient_sync"):  # sharded
        model.set_requires_gradient_sync(wanted)
        return nullcontext()
    return nullcontext() if wanted or not isinstance(model, DistributedDataParallel) else model.no_sync()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU, on the first process (elsewhere it may be empty). Every process has to call it."""
    return get_model_state_dict(network, options=WHOLE)


def whole_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by the names of the weights, as `whole_weights`."""
    state = get_optimizer_state_dict(network, optimizer, options=WHOLE)
    for group in state.get("param_groups", []):
        group.pop("initial_lr", None)  # an option, not a state: a fresh optimizer, to be loaded, has none
    return state


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over moments and step counts that `whole_optimizer` returned; rates and decays stay the optimizer's own."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(network, optimizer, dict(state), options=StateDictOptions(full_state_dict=True))
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)


@torch.no_grad()
def whole_copy(network: DeepFlow) -> DeepFlow:
    """A network to sample from, on every process: itself, or a copy where it is sharded. All processes must call it."""
    if not hasattr(network, "set_requires_gradient_sync"):
        return network.eval()
    tensors = {name: tensor.full_tensor() for name, tensor in network.state_dict().items()}
    with torch.device("meta"):
        copy = DeepFlow(**network.config)
    copy.load_state_dict(tensors, assign=True)
    return copy.eval()
