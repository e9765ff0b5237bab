"""Norm and rotation of the CPU: the eager twins with their gradients written out.

On a CPU each pass over a tensor costs as much as any other, and memory that is new to the process more than
all of them. So nothing is kept for the backward pass but what came in, and passes are few and in place.
Memory for what stays is taken before that for what goes: behind it, it would leave a hole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `base.RmsNorm`."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty_like(x)
        return out.copy_(_normalised(x, eps)[0]).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        normalised, factor = _normalised(x, ctx.eps)
        # Both gradients need this product: one summed over the rows, one over the hidden size.
        product = grad_out.to(torch.float32, copy=True).mul_(normalised)
        grad_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype)
        along = product.mul_(weight).mean(dim=-1, keepdim=True)
        grad_x = torch.mul(grad_out, weight, out=product)
        grad_x = grad_x.addcmul_(normalised, along, value=-1).mul_(factor)
        return grad_x.to(x.dtype), grad_weight, None


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, fp32, and what it was multiplied by, [..., 1]."""
    wide = x.to(torch.float32, copy=True)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factor = (length.square() / x.shape[-1] + eps).rsqrt_()
    return wide.mul_(factor), factor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `base.Rotary`."""
    out: Tensor = _Rotary.apply(x, cos, sin)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turn(x, cos, first, second, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turn(grad_out, cos, second, first, -1), None, None


def _turn(x: Tensor, cos: Tensor, of_second: Tensor, of_first: Tensor, sign: int) -> Tensor:
    """x * cos + sign * concat(-x2 * of_second, x1 * of_first), in fp32 and then in x's type."""
    out = torch.empty_like(x)
    wide = x.float()
    turned = wide * cos
    first, second = wide.chunk(2, dim=-1)
    turned_first, turned_second = turned.chunk(2, dim=-1)
    turned_first.addcmul_(second, of_second, value=-sign)
    turned_second.addcmul_(first, of_first, value=sign)
    return out.copy_(turned)
