"""Lay a model over data-parallel ranks with FSDP2, and set its precision.

Every rank of `ddp` holds the whole model: a mesh of (replicate N, shard 1). bf16 goes through FSDP2 on one
rank too, as its mixed precision is what keeps parameters, moments and the reduction of gradients in fp32
while the model computes in bf16. One rank in fp32 needs nothing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bc2exp.parallel.world import World


def needs_sharding(world_size: int, precision: str) -> bool:
    """Whether `parallelize` will wrap the model at all."""
    return world_size > 1 or precision == "bf16"


def parallelize(model: nn.Module, world: World, *, replicate: int, precision: str) -> None:
    """Wrap a model for training, in place. The model's parameters are fp32.

    Args:
        model: has `layers`.
        world: the ranks; `join` has been called.
        replicate: ranks that each hold the whole model; -1: all.
        precision: `fp32` or `bf16`: what the model computes in.
    """
    if not needs_sharding(world.size, precision):
        return
    copies = world.size if replicate == -1 else replicate
    shape = (copies, world.size // copies)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    compute = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in cast(nn.ModuleDict, model.layers).values():
        # nothing is sharded, so freeing and gathering again in backward would only copy
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def exchange_gradients(model: nn.Module, *, now: bool) -> None:
    """Whether the next backward pass sums gradients over the ranks: only the last micro batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)


def release_gathered(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: what it gathered is freed, and the parameters are
    again those that the optimizer knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full values of a tensor that may be distributed. A collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be distributed; writing to it writes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of full values that this rank holds of `like`, a tensor of the same shape."""
    if not isinstance(like, DTensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()
