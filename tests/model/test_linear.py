"""Matrices and embeddings with weights wider than what is computed in: autograd's numbers, less memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from bc2exp.hardware import eager
from bc2exp.model.linear import Embedding, Linear
from bc2exp.model.room import Room


def given(dtype: torch.dtype) -> tuple[torch.Tensor, Linear]:
    torch.manual_seed(0)
    layer = Linear(24, 40, Room())
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_an_activation_makes_is_computed_again_with_the_same_numbers(dtype):
    torch.manual_seed(0)
    layer = Linear(24, 40, Room())
    pairs = [torch.randn(2, 2, 7, 24).to(dtype)] * 2
    (gate, up), (plain_gate, plain_up) = ([half.clone().requires_grad_() for half in pair] for pair in pairs)
    plain = torch.nn.Parameter(layer.weight.detach().clone())
    out = layer.of_gated(eager.swiglu, gate, up)
    expected = F.linear(eager.swiglu(plain_gate, plain_up), plain.to(dtype))
    assert torch.equal(out, expected)
    gradient = torch.randn_like(expected)
    out.backward(gradient)
    expected.backward(gradient)
    for mine, their in ((gate, plain_gate), (up, plain_up), (layer.weight, plain)):
        assert mine.grad.dtype == their.grad.dtype
        torch.testing.assert_close(mine.grad, their.grad)


def test_of_a_gated_matrix_only_what_the_activation_was_given_is_kept():
    layer = Linear(24, 40, Room())
    gate, up = (torch.randn(7, 24).bfloat16().requires_grad_() for _ in range(2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer.of_gated(eager.swiglu, gate, up)
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in (gate, up, layer.weight))


def test_matrices_that_are_cast_in_one_place_do_not_meet():
    """Forward in one order, backward in the other, of different sizes."""
    torch.manual_seed(0)
    casts, sizes = Room(), (24, 16, 40, 40)
    shared = [Linear(*pair, casts) for pair in pairwise(sizes)]
    own = [Linear(*pair, Room()) for pair in pairwise(sizes)]
    for mine, their in zip(shared, own, strict=True):
        their.load_state_dict(mine.state_dict())
    x = torch.randn(7, 24).bfloat16()
    for layers in (shared, own):
        out = x
        for layer in layers:
            out = layer(out)
        out.sum().backward()
    for mine, their in zip(shared, own, strict=True):
        assert torch.equal(mine.weight.grad, their.weight.grad)


def test_a_sparse_gradient_has_the_rows_of_the_dense_one():
    torch.manual_seed(0)
    ids = torch.tensor([[3, 0, 7, 3], [9, 3, 0, 1]])
    layers = [Embedding(10, 6, padding_idx=0) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    factors = torch.randn(2, 4, 6)
    for layer in layers:
        layer.compute_dtype = torch.bfloat16
    layers[1].sparse = True
    outs = [layer(ids) for layer in layers]
    assert torch.equal(*outs)
    for out in outs:
        (out * factors).sum().backward()
    dense, sparse = (layer.weight.grad for layer in layers)
    assert sparse.is_sparse
    assert sparse._nnz() == ids.numel()
    torch.testing.assert_close(sparse.to_dense(), dense)
    assert not sparse.to_dense()[0].any()
