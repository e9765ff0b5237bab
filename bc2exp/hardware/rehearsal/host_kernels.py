"""ATen kernels for npu tensors, run by the CPU on the device memory itself.

The memory of a rehearsed device is host memory, so a kernel views its npu arguments as CPU tensors, calls the
CPU operator on them, and copies what that created into fresh npu tensors. This replaces every kernel of
torch_npu that has a CPU counterpart. An operator without one is refused by name. One that torch_npu itself
has no kernel for is what torch_npu would run on the CPU: it is counted as such a fallback, and refused where
TORCH_NPU_FALLBACK_CPU_DISABLE=1 is set, as on a device.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch_npu
from torch import Tensor

from bc2exp.hardware.rehearsal import census
from bc2exp.hardware.rehearsal.memory import CPU, gradients, host_alias, to_device, with_index

# Allocation, metadata and dispatch: torch_npu's own code for these is what a rehearsal wants to run.
KEPT_FROM_TORCH_NPU = frozenset(
    [
        "empty.memory_format",
        "empty_strided",
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "as_strided",
        "view",
        "_reshape_alias",
        "_reshape_copy",
        "unfold",
        "data",
        "resize_",
        "set_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "is_set_to",
        "record_stream",
        "_pin_memory",
        "is_pinned",
        "_has_compatible_shallow_copy_type",
        "to.device",
        "to.dtype",
        "to.other",
        "to.dtype_layout",
        "_to_copy",
        "_copy_from",
        "_copy_from_and_resize",
        "scaled_dot_product_attention",
        "_fused_sdp_choice",
    ]
)

# Operators whose CPU arguments with dimensions are legitimate: indices, and copies between devices.
MIXED_DEVICES_ALLOWED = frozenset(
    [
        "aten::index",
        "aten::index_put",
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::_unsafe_index",
        "aten::_unsafe_index_put",
        "aten::_foreach_copy_",
        "aten::repeat_interleave",
    ]
)

COMPOSITES = (
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


class _Call:
    """The npu arguments of one operator call, replaced by what the CPU operator can take."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device: torch.device | None = None
        self.stray_cpu_argument = False

    def to_host(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type != "npu":
                self.stray_cpu_argument |= value.dim() > 0
                return value
            if self.device is None:
                self.device = value.device
            elif value.device != self.device and value.dim() > 0:
                raise RuntimeError(f"{self.name}: arguments on {self.device} and on {value.device}")
            return host_alias(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.to_host(item) for item in value)
        if isinstance(value, torch.device) and value.type == "npu":
            self.device = self.device or with_index(value)
            return CPU
        if isinstance(value, torch.Generator):
            return None  # _seeded() takes its place
        return value

    def check_devices(self) -> torch.device:
        if self.device is None:
            self.device = with_index(torch.device("npu"))
        elif self.stray_cpu_argument and self.name not in MIXED_DEVICES_ALLOWED:
            raise RuntimeError(
                f"{self.name}: expected all tensors on the same device, found {self.device} and cpu"
            )
        return self.device

    def from_host(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            assert self.device is not None
            return to_device(value, self.device)
        if isinstance(value, (list, tuple)):
            return type(value)(self.from_host(item) for item in value)
        return value


_generator_lock = threading.Lock()


def _seeded(run: Callable[[], Any], device: torch.device, generator: torch.Generator | None) -> Any:
    """Run a random CPU operator as a function of the npu generator's (seed, offset), and advance the offset.

    So manual_seed, get/set_rng_state, checkpointing and fork_rng act on npu draws, and the CPU generator is
    left as it was.
    """
    generator = generator or torch_npu.npu.default_generators[device.index]
    with _generator_lock:
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.set_offset(offset + 4)
        saved = torch.default_generator.get_state()
        torch.default_generator.manual_seed((seed ^ (offset * 0x9E3779B97F4A7C15)) & (2**63 - 1))
        try:
            return run()
        finally:
            torch.default_generator.set_state(saved)


def _grow(original: Tensor, alias: Tensor) -> None:
    """An `out=` argument that the CPU operator resized: let the npu tensor follow."""
    if alias.shape != original.shape:
        original.resize_(alias.shape)
        host_alias(original).copy_(alias)


def _host_kernel(op: Any) -> Callable[..., Any]:
    """A kernel for npu tensors that calls the CPU kernel of `op`."""
    schema = op._schema
    name = schema.name
    written = [
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    is_random = torch.Tag.nondeterministic_seeded in op.tags
    is_fused = schema.name.startswith("aten::_fused_")
    # An in-place operator returns its arguments, in order; a mixed one does not occur among the covered ones.
    returns_arguments = bool(written) and all(result.alias_info is not None for result in schema.returns)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        census.host_kernels[name] += 1
        if is_fused:
            census.count_operator(name, (*args, *kwargs.values()))
        call = _Call(name)
        host_args = [call.to_host(value) for value in args]
        host_kwargs = {key: call.to_host(value) for key, value in kwargs.items()}
        device = call.check_devices()
        if is_random:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)), None)
            result = _seeded(lambda: op(*host_args, **host_kwargs), device, given)
        else:
            result = op(*host_args, **host_kwargs)
        if not written:
            return call.from_host(result)
        originals = [args[i] if i < len(args) else kwargs[key] for i, key in written]
        aliases = [host_args[i] if i < len(host_args) else host_kwargs[key] for i, key in written]
        for original, alias in zip(originals, aliases, strict=True):
            if isinstance(original, Tensor):
                _grow(original, alias)
        if not returns_arguments:
            return call.from_host(result)
        if not schema.returns:
            return None
        return originals[0] if len(schema.returns) == 1 else tuple(originals)

    return kernel


def _fallback(op: Any) -> Callable[..., Any]:
    """What torch_npu does with an operator that it has no kernel for: it runs on the CPU, or is refused."""
    name, run = op._schema.name, _host_kernel(op)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("TORCH_NPU_FALLBACK_CPU_DISABLE") == "1":
            raise census.refuse(name, "torch_npu has no kernel for it, and TORCH_NPU_FALLBACK_CPU_DISABLE=1")
        census.fallbacks[name] += 1
        return run(*args, **kwargs)

    return kernel


def refuser(name: str) -> Callable[..., Any]:
    """A kernel that refuses the operator `name`."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise census.refuse(name, "it has no kernel on host memory")

    return kernel


def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    host_alias(self).copy_(host_alias(source) if source.device.type == "npu" else source)
    return self


def _clone(self: Tensor, memory_format: Any = None) -> Tensor:
    copy = host_alias(self).clone(memory_format=memory_format or torch.preserve_format)
    return to_device(copy, self.device)


def _local_scalar_dense(self: Tensor) -> Any:
    return host_alias(self).item()


def _matmul_backward(
    grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    found = gradients(torch.matmul, (host_alias(self), host_alias(other)), host_alias(grad))
    return tuple(to_device(g, self.device) if wanted else None for g, wanted in zip(found, mask, strict=True))


BY_HAND = {
    "copy_": _copy_,
    "clone": _clone,
    "_local_scalar_dense": _local_scalar_dense,
    "matmul_backward": _matmul_backward,
}

_library: torch.library.Library | None = None


def _operator(full_name: str) -> Any:
    """The operator "aten::name.overload", None where there is no such schema."""
    packet, _, overload = full_name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)


def _has_kernel(op: Any, *keys: str) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)


def install() -> None:
    """Register the kernels; once, after torch_npu was imported."""
    global _library
    _library = torch.library.Library("aten", "IMPL")

    put = functools.partial(_library.impl, dispatch_key="PrivateUse1", allow_override=True)
    of_torch_npu = set(torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"))
    of_the_cpu = set(torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
    for full_name in sorted(of_torch_npu | of_the_cpu):
        namespace, _, name = full_name.partition("::")
        op = _operator(full_name) if namespace == "aten" else None
        if op is None or name in KEPT_FROM_TORCH_NPU or name in BY_HAND:
            continue
        if full_name not in of_torch_npu:
            if not _has_kernel(op, *COMPOSITES):
                put(name, _fallback(op))
        elif _has_kernel(op, "CPU", *COMPOSITES):
            put(name, _host_kernel(op))
        else:
            put(name, refuser(full_name))
    for name, kernel in BY_HAND.items():
        put(name, kernel)
