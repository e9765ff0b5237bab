"""Data parallelism with FSDP2: who holds which part of parameters, gradients and moments, and the precision.

Ranks of the mesh's `shard` axis share them, those of `replicate` each have them; `ddp` is (replicate N,
shard 1). bf16 goes through FSDP2 in every layout of several ranks, as its mixed precision is what keeps
parameters, moments and the reduction of gradients in fp32 while the model computes in bf16. In fp32 one data
rank needs nothing. A rank alone casts each weight where it is used: FSDP2 would gather from nobody and reduce
with nobody, which on a CPU copied every parameter and gradient several times a step. It does not even import
FSDP2, which takes half as long as torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.model.loss import ROW_BLOCK
from bc2exp.model.plan import tensor_cut
from bc2exp.parallel.mesh import Mesh

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def needs_sharding(mesh: Mesh, precision: str) -> bool:
    """Whether FSDP2 is used at all."""
    return mesh.num_data_ranks > 1 or (precision == "bf16" and not casts_weights(mesh, precision))


def casts_weights(mesh: Mesh, precision: str) -> bool:
    """Whether the weights are wider than what is computed in, and each is cast where it is used."""
    return precision == "bf16" and mesh.num_data_ranks * mesh.tensor * mesh.pipeline == 1


def shard_layers(model: Baichuan2, mesh: Mesh, *, precision: str, zero_stage: int) -> None:
    """Wrap every layer, the embedding and the head, and then the model, in place. Parameters are fp32."""
    if not needs_sharding(mesh, precision):
        if casts_weights(mesh, precision):
            model.compute_in(torch.bfloat16)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    axes = ("replicate", "shard") if mesh.replicate > 1 else "shard"
    compute = torch.bfloat16 if precision == "bf16" else None
    settings: dict[str, Any] = {
        "mesh": mesh.devices[axes],
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
    }
    # Where nothing is sharded, freeing and gathering again in backward would only copy.
    reshard = zero_stage == 3 and mesh.shard > 1
    if model.embed_tokens is not None:
        fully_shard(model.embed_tokens, reshard_after_forward=reshard, **settings)
    for layer in model.layers.values():
        fully_shard(layer, reshard_after_forward=reshard, **settings)
    if model.norm is not None and model.lm_head is not None:
        # Backward begins with these two, so they stay.
        fully_shard([model.norm, model.lm_head], reshard_after_forward=False, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)


def take_storage(model: nn.Module, device: torch.device) -> None:
    """Give the parameters that a rank has memory on its device, in place; their values are then to be set."""
    if any(_is_sharded_tensor(parameter) for parameter in model.parameters()):
        model.to_empty(device=device)
        return
    # `to_empty` asks the meta device what is alike, which imports sympy
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            values = torch.empty(old.shape, dtype=old.dtype, device=device)
            setattr(module, name, nn.Parameter(values, old.requires_grad))


def before_backward(model: nn.Module, *, last: bool, keep: bool, defer: bool) -> None:
    """Say what the next backward pass does with the gradients, and with what it gathered.

    Args:
        last: it is the last one of the step. Copies sum their gradients only then.
        keep: parameters stay gathered until then.
        defer: ranks that share gradients reduce them only then, too.
    """
    if _is_sharded_module(model):
        model.set_requires_gradient_sync(last or not defer)  # sets the next, too
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or not keep)


def release_gathered(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: what it gathered is freed, and the parameters are
    again those that the optimizer knows."""
    for module in model.modules():
        if _is_sharded_module(module):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded; writing to it writes the tensor."""
    return tensor.to_local() if _is_sharded_tensor(tensor) else tensor


def gradients(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """This rank's parts of the gradients, by name."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, local(parameter.grad)


def complete_gradients(model: nn.Module, mesh: Mesh) -> None:
    """With the sequence cut over tensor-parallel ranks, each has the gradient of the weights that are not cut
    (the norms) from its part of the sequence only: add them up, all at once. Call it once a step."""
    partial = [gradient for name, gradient in gradients(model) if tensor_cut(name).dim is None]
    if not partial:
        return
    flat = torch.cat([gradient.flatten() for gradient in partial])
    dist.all_reduce(flat, group=mesh.group("tensor"))
    for gradient, part in zip(partial, flat.split([g.numel() for g in partial]), strict=True):
        gradient.copy_(part.view_as(gradient))


def squared_norm(model: nn.Module, mesh: Mesh) -> Tensor:
    """What this rank adds to the squared norm of the whole gradient: what several ranks have counts once."""
    total = torch.zeros((), device=mesh.world.device)
    for name, gradient in gradients(model):
        # Row by row: one fp32 sum over a hundred million squares is wrong by half a per cent.
        copies = 1 if tensor_cut(name).dim is not None else mesh.tensor
        for rows in _wide_rows(gradient):
            total += torch.linalg.vector_norm(rows, dim=-1).square().sum() / copies
    return total / mesh.replicate


def _wide_rows(gradient: Tensor) -> Iterator[Tensor]:
    """The rows of a gradient in fp32, of one that is narrower a block at a time."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if gradient.dtype == torch.float32:
        yield gradient
    else:
        yield from (rows.float() for rows in gradient.split(ROW_BLOCK))


def _is_sharded_module(module: nn.Module) -> TypeGuard[FSDPModule]:
    return _is(module, "torch.distributed.fsdp", "FSDPModule")


def _is_sharded_tensor(tensor: Tensor) -> TypeGuard[DTensor]:
    return _is(tensor, "torch.distributed.tensor", "DTensor")


def _is(value: object, module: str, name: str) -> bool:
    """Whether `value` is of a class whose module may not be imported yet: then there is no such value."""
    imported = sys.modules.get(module)
    return imported is not None and isinstance(value, getattr(imported, name))
