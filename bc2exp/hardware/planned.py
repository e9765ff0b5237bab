"""The operations of a device that fuses them, for tensors without storage: what they keep, and no values.

Planning runs the model on such tensors on any machine, so it cannot call the operators of a device that is
not there. These keep for backward what fused operators keep, and make what they make.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bc2exp.hardware import eager

STATISTICS = 16
"""fp32 numbers a query row and head that fused attention keeps: maximum and sum, each eight times over, as
the operator of the device that keeps most of them does (see OPS.md of the stand-in)."""

CONSTANT_BYTES = {"npu": 2048 * 2048}
"""What a backend's operators keep once and for all: the mask that causal attention on an NPU wants."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        statistics = q.new_empty((*q.shape[:3], STATISTICS), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return torch.empty_like(gate), torch.empty_like(up)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    out: Tensor = _Attention.apply(q, k, v)
    return out


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _RmsNorm.apply(x, weight)
    return out


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = _SwiGlu.apply(gate, up)
    return out


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out: Tensor = _Rotary.apply(x)
    return out


OPS = replace(eager.OPS, attention=_attention, rms_norm=_rms_norm, swiglu=_swiglu, rotary=_rotary)
