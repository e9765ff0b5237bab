"""The backend for Ascend NPUs, by torch_npu's fused operators; attention is in `npu_attention`.

Where an operator does not serve for a shape, or the configuration switches it off, the eager twin does.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bc2exp.config.errors import UserError
from bc2exp.hardware import eager, rehearsal
from bc2exp.hardware.determinism import be_deterministic
from bc2exp.hardware.npu_environment import problems
from bc2exp.hardware.probe import count_devices

try:
    # Not by itself on `import torch`: without CANN that would break every program of the environment.
    import torch_npu

    from bc2exp.hardware.npu_attention import attention
except (ImportError, RuntimeError) as error:
    raise UserError(
        f"hardware.backend=npu: torch_npu cannot be loaded ({str(error).splitlines()[0]}); it needs CANN in "
        "the environment (source its set_env.sh) and the torch that it was made for, and torch is "
        f"{torch.__version__}"
    ) from error

MOST_ROTARY, LARGEST_ROTARY = 1000, 896
"""What the rotary operator takes: fewer rows and heads, a smaller and even head dimension (op-plugin)."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `base.RmsNorm`. The operator is called by name, as torch's own `rms_norm` is not fused here."""
    out: Tensor = torch_npu.npu_rms_norm(x, weight, eps)[0]
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `base.SwiGlu`. The operator wants both in one tensor, the gate first; backward keeps that one."""
    out: Tensor = torch_npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `base.Rotary`."""
    batch, heads, _, dim = x.shape
    if max(batch, heads) >= MOST_ROTARY or dim >= LARGEST_ROTARY or dim % 2:
        return eager.rotary(x, cos, sin)
    out: Tensor = _Rotary.apply(x, cos, sin)
    return out


class _Rotary(torch.autograd.Function):
    """A rotation, which is walked back by turning the other way: it keeps the tables and nothing else.

    The operator's own derivative would keep x of every layer, for a gradient of the tables that nobody wants.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x turned, in fp32 and rounded once: the tables are fp32, and the operator takes one type.

    The model's x [B, N, S, D] lies as [B, S, N, D]: seen so, it needs no copy.
    """
    rows = [tensor.transpose(1, 2) for tensor in (x.float(), cos, sin)]
    turned: Tensor = torch_npu.npu_rotary_mul(*rows, rotary_mode="half")
    return turned.transpose(1, 2).to(x.dtype)


class NpuBackend:
    """See `base.Backend`."""

    name = "npu"
    packages: tuple[str, ...] = ("torch_npu",)
    collectives = "hccl"
    pins_memory = True
    ops = replace(eager.OPS, attention=attention, rms_norm=rms_norm, swiglu=swiglu, rotary=rotary)

    def device(self, local_rank: int) -> torch.device:
        """An NPU a rank, in the order of ASCEND_RT_VISIBLE_DEVICES."""
        return torch.device("npu", local_rank)

    def setup(self, local_rank: int, num_local_ranks: int, *, deterministic: bool = False) -> None:
        """Take the rank's NPU, and let fp32 be fp32: no HF32, which rounds the factors of products.

        Raises UserError where torch_npu is made for another torch, sees fewer NPUs than there are ranks, or
        is told two things about its allocator.
        """
        for problem in problems(os.environ, rehearsal=True):  # CANN is here, as torch_npu is
            raise UserError(f"hardware.backend=npu: {problem}")
        seen = torch_npu.npu.device_count()
        if seen < num_local_ranks:
            raise UserError(
                f"hardware.backend=npu: torch_npu sees {seen} NPUs and {num_local_ranks} are asked for; "
                "npu-smi lists those of this machine, and ASCEND_RT_VISIBLE_DEVICES leaves out some"
            )
        torch_npu.npu.set_device(local_rank)
        torch_npu.npu.set_compile_mode(jit_compile=False)  # no kernel is built for each new shape
        torch_npu.npu.matmul.allow_hf32 = False
        torch_npu.npu.conv.allow_hf32 = False
        if deterministic:
            be_deterministic()

    def synchronize(self) -> None:
        """Wait for the rank's NPU."""
        torch_npu.npu.synchronize()

    def peak_memory_bytes(self) -> int:
        """The most that torch_npu's allocator has held on the rank's NPU, free blocks of its own included."""
        return int(torch_npu.npu.max_memory_reserved())

    def peak_allocated_bytes(self) -> int | None:
        """The most that tensors have taken of it."""
        return int(torch_npu.npu.max_memory_allocated())

    def total_memory_bytes(self) -> int | None:
        """Memory of the rank's NPU."""
        return int(torch_npu.npu.mem_get_info()[1])

    def free_memory_bytes(self) -> int | None:
        """What is left of it."""
        return int(torch_npu.npu.mem_get_info()[0])

    def device_name(self) -> str:
        """The chip, such as Ascend910B3; in a rehearsal it says so."""
        return str(torch_npu.npu.get_device_name())

    def runtime(self) -> dict[str, str]:
        """CANN and the driver, as far as torch_npu can read their versions; a rehearsal has neither."""
        if rehearsal.is_active():
            return {"CANN": "played by the rehearsal"}
        found = {"CANN": _version("CANN"), "driver": _version("DRIVER")}
        return {name: version or "of unknown version" for name, version in found.items()}

    def count(self) -> int | None:
        """NPUs that the driver shows."""
        return count_devices(self.name)


def _version(module: str) -> str:
    """Of a part of the installation of CANN; empty where it is not told."""
    try:
        return str(torch_npu.npu.utils.get_cann_version(module))
    except (AttributeError, RuntimeError):  # older ones do not tell all of them
        return ""


BACKEND = NpuBackend()
