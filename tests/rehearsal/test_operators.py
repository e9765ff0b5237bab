"""Fused and plain operators on rehearsed NPUs against the CPU, forward and backward."""

# ruff: noqa: I001  (the devices come before torch)
from __future__ import annotations

from tests.rehearsal.against_cpu import TYPES, compare, same

import pytest
import torch
import torch_npu
from torch.nn import functional as F

B, N, S, D = 2, 4, 24, 16
R = torch.randn
LABELS = torch.randint(0, 9, (12,), generator=torch.Generator().manual_seed(0))
IGNORING = LABELS.masked_fill(torch.arange(12) % 3 == 0, -100)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", TYPES)
def test_rms_norm(kind):
    def fused(x, weight):
        return torch_npu.npu_rms_norm(x, weight, 1e-6)[0]

    compare(lambda x, g: F.rms_norm(x, (64,), g, 1e-6), fused, R(3, 5, 64), R(64), kind=kind)


@pytest.mark.parametrize("kind", TYPES)
def test_swiglu(kind):
    compare(lambda x: F.silu(x[..., :32]) * x[..., 32:], torch_npu.npu_swiglu, R(3, 5, 64), kind=kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary(mode, kind):
    def plain(x, cos, sin):
        pairs = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        halves = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
        return x * cos + (pairs if mode == "interleave" else halves) * sin

    def fused(x, cos, sin):
        return torch_npu.npu_rotary_mul(x, cos, sin, mode)

    compare(plain, fused, R(B, N, S, D), R(1, 1, S, D), R(1, 1, S, D), kind=kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, kind):
    def fused(x):
        return torch_npu.npu_cross_entropy_loss(x, LABELS.npu(), reduction=reduction)[0]

    compare(lambda x: F.cross_entropy(x, LABELS, reduction=reduction), fused, R(12, 9), kind=kind)
    with pytest.raises(ValueError, match="outside"):
        torch_npu.npu_cross_entropy_loss(R(12, 9).npu(), IGNORING.npu())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        pytest.param(F.linear, [(3, 5, 16), (8, 16), (8,)], id="linear"),
        pytest.param(torch.matmul, [(2, 3, 5, 16), (2, 3, 16, 5)], id="matmul"),
        pytest.param(lambda w: F.embedding(LABELS.to(w.device), w), [(9, 16)], id="embedding"),
        pytest.param(lambda x, g: F.rms_norm(x, (16,), g, 1e-6), [(5, 16), (16,)], id="rms_norm"),
        pytest.param(lambda x, g, b: F.layer_norm(x, (16,), g, b), [(5, 16), (16,), (16,)], id="layer_norm"),
        pytest.param(lambda x: x.softmax(-1), [(5, 16)], id="softmax"),
        pytest.param(F.silu, [(5, 16)], id="silu"),
        pytest.param(lambda x: F.cross_entropy(x, IGNORING.to(x.device)), [(12, 9)], id="cross_entropy"),
        pytest.param(F.normalize, [(9, 16)], id="normalize"),
        pytest.param(
            lambda x, y: torch.cat((x, y), -1).chunk(4, -1)[1].transpose(0, 1),
            [(5, 8), (5, 8)],
            id="cat-chunk-transpose",
        ),
    ],
)
def test_plain_operators(function, shapes, kind):
    compare(function, function, *map(R, shapes), kind=kind)


def test_add_rms_norm_has_a_forward_only():
    x, y, g = R(3, 64), R(3, 64), R(64)
    out, _, total = torch_npu.npu_add_rms_norm(x.npu(), y.npu(), g.npu(), 1e-6)
    same(total, x + y, 1e-6)
    same(out, F.rms_norm(x + y, (64,), g, 1e-6), 1e-5)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch_npu.npu_add_rms_norm(x.npu().requires_grad_(), y.npu(), g.npu(), 1e-6)[0].sum().backward()


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_adamw(options):
    def train(device, **options):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1, **options)
        for i in range(4):
            layer(torch.full((2, 8), i + 1.0, device=device)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach().cpu()

    same(train("npu", **options), train("cpu"), 1e-6)
