"""Matrices and embeddings whose weights are wider than what is computed in.

Where one rank alone trains in bf16, its weights are fp32 and each is cast where it is used. autograd would
keep every cast matrix from the forward pass for the backward pass, together half as much as the weights
themselves; here it is cast again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """A matrix without bias, used in the type of what it is given."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight)
        out: Tensor = _CastLinear.apply(x, self.weight)
        return out


class _CastLinear(torch.autograd.Function):
    """x [..., I] times weight [O, I]^T, cast to x's type; the weight's gradient has the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad
        grad_x = grad_out @ weight.to(x.dtype) if want_x else None
        grad_weight = None
        if want_weight:
            rows = grad_out.flatten(0, -2)
            grad_weight = (rows.T @ x.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight


class Embedding(nn.Embedding):
    """Rows of words, in the type `compute_dtype`; None: in their own."""

    compute_dtype: torch.dtype | None = None

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.compute_dtype)
