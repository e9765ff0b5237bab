"""What the doctor compares: right operations pass, and each wrong one is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bc2exp.hardware import eager, get_backend
from bc2exp.hardware.base import Ops
from bc2exp.hardware.checkup import Comparison, Shapes, compare, compare_adamw

CPU = torch.device("cpu")
SHAPES = Shapes(batch=2, length=48, num_heads=3, head_dim=16, inner=40)
SLOPES = torch.tensor([0.5, 0.25, 0.125])


def checked(ops: Ops) -> dict[str, Comparison]:
    return {
        f"{', '.join(filter(None, (found.name, found.case)))}/{found.dtype}": found
        for found in compare(ops, CPU, SHAPES, SLOPES, seed=1)
    }


def test_the_host_passes() -> None:
    found = checked(get_backend("cpu").ops)
    assert len(found) == 2 * 7
    assert all(result.passed for result in found.values())


def late(q: Any, k: Any, v: Any, *, segment_ids: Any, slopes: Any, scale: float) -> torch.Tensor:
    """Sees every key: causality is lost."""
    return torch.softmax(scale * q @ k.transpose(-1, -2), -1) @ v


def scaled(q: Any, k: Any, v: Any, *, segment_ids: Any, slopes: Any, scale: float) -> torch.Tensor:
    """The bias is scaled as the scores are."""
    slopes = None if slopes is None else slopes * scale
    return eager.OPS.attention(q, k, v, segment_ids=segment_ids, slopes=slopes, scale=scale)


def blind(q: Any, k: Any, v: Any, *, segment_ids: Any, slopes: Any, scale: float) -> torch.Tensor:
    """Segments are not looked at."""
    return eager.OPS.attention(q, k, v, segment_ids=None, slopes=slopes, scale=scale)


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbours are turned, not halves."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def refusing(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    raise RuntimeError("no kernel for this\nand a trace")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"attention": late}, {"attention, causal", "attention, segments", "attention, ALiBi"}),
        ({"attention": scaled}, {"attention, ALiBi", "attention, ALiBi and segments"}),
        ({"attention": blind}, {"attention, segments", "attention, ALiBi and segments"}),
        ({"rotary": interleaved}, {"rotary"}),
        ({"rms_norm": refusing}, {"rms_norm"}),
        ({"swiglu": lambda gate, up: gate * torch.nn.functional.silu(up)}, {"swiglu"}),
        (
            {"rms_norm": lambda x, weight, eps: eager.OPS.rms_norm(x, weight, eps).detach() + 0 * x},
            {"rms_norm"},
        ),
    ],
)
def test_a_wrong_operation_is_named(wrong: dict[str, Callable[..., Any]], named: set[str]) -> None:
    found = checked(replace(eager.OPS, **wrong))
    failed = {key.partition("/")[0] for key, result in found.items() if not result.passed}
    assert named <= failed
    kind = next(iter(wrong))
    assert all(name.startswith(kind) for name in failed)
    if wrong == {"rms_norm": refusing}:
        assert found["rms_norm/torch.float32"].problem == "RuntimeError: no kernel for this\nand a trace"


def test_the_fused_optimizer_passes_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare_adamw(CPU, 1000, seed=1, fused=True)
    assert found.passed
    assert (found.name, found.dtype) == ("adamw", torch.float32)
    right = torch.optim.AdamW.step

    def without_decay(self: torch.optim.AdamW) -> Any:
        for group in self.param_groups:
            group["weight_decay"] = 0.0 if group["fused"] else group["weight_decay"]
        return right(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", without_decay)
    found = compare_adamw(CPU, 1000, seed=1, fused=True)
    assert not found.passed
    assert found.forward > 100 * found.allowed > found.backward
    assert compare_adamw(CPU, 1000, seed=1, fused=False).passed


def test_an_optimizer_without_a_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.optim.AdamW.step

    def refusing_step(self: torch.optim.AdamW) -> Any:
        if self.defaults["fused"]:
            raise NotImplementedError("no kernel for this")
        return right(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", refusing_step)
    found = compare_adamw(CPU, 10, seed=1, fused=True)
    assert not found.passed
    assert found.problem == "NotImplementedError: no kernel for this"
