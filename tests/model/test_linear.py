"""Matrices whose weights are wider than what is computed in: autograd's numbers, less memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bc2exp.model.linear import Linear


def given(dtype: torch.dtype) -> tuple[torch.Tensor, Linear]:
    torch.manual_seed(0)
    layer = Linear(24, 40)
    return torch.randn(2, 7, 24, dtype=dtype).requires_grad_(), layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_numbers_are_those_of_a_cast_that_autograd_keeps(dtype):
    (x, layer), (plain_x, plain) = given(dtype), given(dtype)
    out, expected = layer(x), F.linear(plain_x, plain.weight.to(dtype))
    assert torch.equal(out, expected)
    gradient = torch.randn_like(expected)
    out.backward(gradient)
    expected.backward(gradient)
    assert x.grad.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, plain_x.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_no_cast_matrix_waits_for_the_backward_pass():
    x, layer = given(torch.bfloat16)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    matrices = [tensor for tensor in kept if tensor.shape == layer.weight.shape]
    assert [tensor.data_ptr() for tensor in matrices] == [layer.weight.data_ptr()]


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    x, layer = given(torch.bfloat16)
    {"x": x, "weight": layer.weight}[frozen].requires_grad_(False)
    layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (layer.weight.grad is None) == (frozen == "weight")
