"""Matrices and embeddings whose weights are wider than what is computed in.

Where one rank alone trains in bf16, its weights are fp32 and each is cast where it is used. autograd would
keep every cast matrix from the forward pass for the backward pass, together half as much as the weights
themselves; here it is cast again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bc2exp.model.room import Room

Activation = Callable[[Tensor, Tensor], Tensor]
"""See `hardware.base.SwiGlu`."""


class Linear(nn.Linear):
    """A matrix without bias, used in the type of what it is given. Where it is cast, it is into
    `casts`, which all of a model share."""

    def __init__(self, in_features: int, out_features: int, casts: Room) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.casts = casts

    def reset_parameters(self) -> None:
        """torch's first values; none on the meta device, where torch imports its compiler to draw nothing."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight)
        out: Tensor = _CastLinear.apply(x, self.weight, self.casts)
        return out

    def of_gated(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """The matrix times activation(gate, up). Where the matrix is cast again for the backward pass, that
        is computed again, too: little time, and more than a quarter of what a layer would keep."""
        if self.weight.dtype == gate.dtype:
            return F.linear(activation(gate, up), self.weight)
        out: Tensor = _CastGatedLinear.apply(activation, gate, up, self.weight, self.casts)
        return out


class _CastLinear(torch.autograd.Function):
    """x [..., I] times weight [O, I]^T, cast to x's type. The weight's gradient comes in x's type, from which
    autograd casts it to the weight's `grad_dtype`, if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, casts: Room) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.casts = casts
        return F.linear(x, _cast(weight, x.dtype, casts))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        want_x, want_weight, _ = ctx.needs_input_grad
        grad_weight = grad_out.flatten(0, -2).T @ x.flatten(0, -2) if want_weight else None
        return grad_out @ _cast(weight, x.dtype, ctx.casts) if want_x else None, grad_weight, None


class _CastGatedLinear(torch.autograd.Function):
    """The same of activation(gate, up) [..., I]."""

    @staticmethod
    def forward(
        ctx: Any, activation: Activation, gate: Tensor, up: Tensor, weight: Tensor, casts: Room
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.activation, ctx.casts = activation, casts
        out = gate.new_empty(*gate.shape[:-1], len(weight))
        product = activation(gate, up)
        torch.mm(product.flatten(0, -2), _cast(weight, gate.dtype, casts).T, out=out.flatten(0, -2))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *given, weight = ctx.saved_tensors
        _, *wanted, want_weight, _ = ctx.needs_input_grad
        grad_weight = grad_out.new_empty(weight.shape) if want_weight else None
        given = [tensor.detach().requires_grad_(want) for tensor, want in zip(given, wanted, strict=True)]
        with torch.enable_grad():
            x = ctx.activation(*given)
            start = x.sum()  # of the way back: from `x` itself, given a gradient, it imports sympy
        if grad_weight is not None:
            torch.mm(grad_out.flatten(0, -2).T, x.detach().flatten(0, -2), out=grad_weight)
        if any(wanted):
            grad_x = grad_out @ _cast(weight, x.dtype, ctx.casts)
            x.register_hook(lambda _: grad_x)
            start.backward()
        return None, *(tensor.grad for tensor in given), grad_weight, None


def _cast(weight: Tensor, dtype: torch.dtype, casts: Room) -> Tensor:
    """Good until the next one is cast."""
    return casts.take(weight.shape, dtype, weight.device).copy_(weight)


class Embedding(nn.Embedding):
    """Rows of words, in the type `compute_dtype`; None: in their own. With `sparse` the weight's gradient has
    only the rows of words that were used, each as often as its word."""

    compute_dtype: torch.dtype | None = None

    def reset_parameters(self) -> None:
        """See `Linear`."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        if self.sparse and torch.is_grad_enabled():
            rows: Tensor = _SparseRows.apply(self.weight, ids, self.padding_idx)
            return rows.to(self.compute_dtype)
        return F.embedding(ids, self.weight, self.padding_idx).to(self.compute_dtype)


class _SparseRows(torch.autograd.Function):
    """As torch's own sparse embedding; but that leaves out the rows of padding, so that its size depends on
    values, which a plan does not have. Here they are zero."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = weight.shape, padding
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        ids = ctx.saved_tensors[0].flatten()
        rows = grad_out.flatten(0, -2)
        if ctx.padding is not None:
            rows = rows * (ids != ctx.padding)[:, None]
        return torch.sparse_coo_tensor(ids[None], rows, ctx.shape, check_invariants=False), None, None
