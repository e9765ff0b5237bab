"""The same function on the CPU in fp32 and on a rehearsed NPU, values and gradients side by side."""

from __future__ import annotations

from tests.hardware import npu_device

npu_device.require()

import pytest  # noqa: E402
import torch  # noqa: E402

TYPES = [
    pytest.param((torch.float32, 1e-5), id="fp32"),
    pytest.param((torch.bfloat16, 4e-2), id="bf16"),
]
"""Types, and what rounding may cost in them."""
EXACT = (torch.float32, 1e-5)


def same(found, expected, tolerance, what=""):
    torch.testing.assert_close(
        found.float().cpu(), expected.float(), rtol=tolerance, atol=tolerance, msg=lambda text: what + text
    )


def compare(on_cpu, on_npu, *inputs, kind=EXACT, convert=lambda x: x):
    """Outputs and gradients of `on_npu` are those of `on_cpu`, whose input has the same numbers.

    `convert` changes the layout of what the CPU has as [B, N, S, D].
    """
    dtype, tolerance = kind
    inputs = [x.to(dtype).float() for x in inputs]
    here = [x.clone().requires_grad_() for x in inputs]
    there = [x.to(dtype).npu().requires_grad_() for x in inputs]
    expected, found = convert(on_cpu(*here)), on_npu(*(convert(x) for x in there))
    same(found.reshape(expected.shape), expected, tolerance, "output: ")
    weight = torch.randn(expected.shape).to(dtype)
    expected.backward(weight.float())
    found.backward(weight.npu().reshape(found.shape))
    for i, (x, y) in enumerate(zip(here, there, strict=True)):
        same(y.grad, x.grad, tolerance * max(1.0, x.grad.abs().max().item()), f"gradient {i}: ")
