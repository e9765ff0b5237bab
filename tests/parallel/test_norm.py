"""The norm of large gradients: one sum over all squares in fp32 is wrong where the layouts must agree."""

from __future__ import annotations

import torch
from torch import nn

from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import squared_norm
from tests.train.parts import ONE_RANK


class Head(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, rows, bias=False)


def test_the_norm_of_a_large_dense_gradient_is_exact_to_fp32() -> None:
    model = Head(60_000, 256)
    gradient = torch.randn(60_000, 256, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight.grad = gradient
    exact = gradient.double().square().sum().item()
    found = squared_norm(model, Mesh(ONE_RANK)).item()
    assert abs(found / exact - 1) < 1e-6


def test_the_norm_of_narrow_and_of_sparse_gradients_is_that_of_wide_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(50, 8), "lm_head": nn.Linear(8, 5000, bias=False)})
    rows, head = torch.randn(4, 8, generator=generator), torch.randn(5000, 8, generator=generator).bfloat16()
    sparse = torch.sparse_coo_tensor(torch.tensor([[3, 9, 3, 0]]), rows, (50, 8), check_invariants=True)
    for name, gradient in (("embed_tokens", sparse), ("lm_head", head)):
        model[name].weight.grad_dtype = None
        model[name].weight.grad = gradient
    exact = sparse.to_dense().double().square().sum() + head.double().square().sum()
    assert abs(squared_norm(model, Mesh(ONE_RANK)).item() / exact.item() - 1) < 1e-6
