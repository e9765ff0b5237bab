"""Device memory seen by the host: it is host memory, so that a CPU tensor can lie on an npu tensor's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch_npu
from torch import Tensor

CPU = torch.device("cpu")


def host_alias(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of an npu tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype)
    return alias.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A fresh npu tensor with the values and strides of a CPU tensor."""
    result = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        host_alias(result).copy_(tensor)
    return result


def with_index(device: torch.device) -> torch.device:
    """The device, of which the number is filled in where it names none."""
    return device if device.index is not None else torch.device("npu", torch_npu.npu.current_device())


def without_autograd_keys() -> torch._C._ForceDispatchKeyGuard:
    """Inside a kernel, let autograd record again. Autocast stays off: it would compute in bf16 unasked."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    keys = torch._C.DispatchKey
    for key in (
        keys.AutogradCPU,
        keys.AutogradPrivateUse1,
        keys.AutogradOther,
        keys.AutogradFunctionality,
        keys.ADInplaceOrView,
    ):
        if excluded.has(key):
            excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], output_gradients: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of function(*inputs), recomputed with autograd on CPU copies."""
    with torch.enable_grad(), without_autograd_keys():
        leaves = [value.detach().clone().requires_grad_() for value in inputs]
        return torch.autograd.grad(function(*leaves), leaves, output_gradients)
