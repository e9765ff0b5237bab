"""A device's operations beside their eager twins on the host, on random input of a model's shapes.

Errors are relative to the largest value of the twin, whose input is the device's, in fp32 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bc2exp.hardware import eager
from bc2exp.hardware.base import Ops

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative errors that rounding explains: sums of some hundred terms in fp32, 8 bits of a value in bf16."""
_ADAMW_STEPS = 3


class Comparison(NamedTuple):
    """One operation in one type.

    Attributes:
        name: of the operation, as `Ops` and the configuration have it.
        case: what of it, "" where there is one case only.
        dtype: type of its input.
        forward, backward: largest relative error of the output, and of the gradients of all its inputs; of
            the optimizer, of the weights' change and of the moments.
        allowed: both may be so large.
        problem: what was raised instead, "" where nothing was.
    """

    name: str
    case: str
    dtype: torch.dtype
    forward: float
    backward: float
    allowed: float
    problem: str

    @property
    def passed(self) -> bool:
        """Whether the operation is its twin."""
        return not self.problem and max(self.forward, self.backward) <= self.allowed


class Shapes(NamedTuple):
    """Sizes of the input: those of one rank's part of a model."""

    batch: int
    length: int
    num_heads: int
    head_dim: int
    inner: int


def compare(
    ops: Ops, device: torch.device, shapes: Shapes, slopes: Tensor, seed: int
) -> Iterator[Comparison]:
    """Every operation of `ops` in every type; `slopes` [heads] are ALiBi's."""
    for dtype in TOLERANCES:
        generator = torch.Generator().manual_seed(seed)
        for name, case, inputs, call in _cases(shapes, slopes, generator):
            yield _compare(name, case, ops, device, dtype, inputs, call)


def compare_adamw(device: torch.device, num_weights: int, seed: int, *, fused: bool) -> Comparison:
    """Three steps of torch's AdamW on the device beside the plain one on the host, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(num_weights, generator=generator)
    gradients = [torch.randn(num_weights, generator=generator) for _ in range(_ADAMW_STEPS)]
    allowed = TOLERANCES[torch.float32]
    expected = _adamw(weight, gradients, torch.device("cpu"), fused=False)
    try:
        found = _adamw(weight, gradients, device, fused=fused)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as below
        return Comparison("adamw", "", torch.float32, nan, nan, allowed, f"{type(error).__name__}: {error}")
    errors = [_error(mine, twin) for mine, twin in zip(found, expected, strict=True)]
    return Comparison("adamw", "", torch.float32, errors[0], max(errors[1:]), allowed, "")


def _adamw(weight: Tensor, gradients: list[Tensor], device: torch.device, *, fused: bool) -> list[Tensor]:
    """The change of the weights and both moments, on the host."""
    parameter = torch.nn.Parameter(weight.to(device, copy=True))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    for gradient in gradients:
        parameter.grad = gradient.to(device)
        optimizer.step()
    state = optimizer.state[parameter]
    return [parameter.detach().cpu() - weight, state["exp_avg"].cpu(), state["exp_avg_sq"].cpu()]


def _cases(
    shapes: Shapes, slopes: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, str, list[Tensor], Callable[..., Tensor]]]:
    batch, length, heads, dim, inner = shapes

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def attention(segment_ids: Tensor | None, with_slopes: bool) -> Callable[..., Tensor]:
        def call(ops: Ops, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(
                q,
                k,
                v,
                segment_ids=None if segment_ids is None else segment_ids.to(q.device),
                slopes=slopes.to(q.device) if with_slopes else None,
                scale=dim**-0.5,
            )

        return call

    segments = torch.arange(length).div(max(1, length // 3), rounding_mode="floor").expand(batch, -1) + 1
    for case, ids, with_slopes in (
        ("causal", None, False),
        ("segments", segments.contiguous(), False),
        ("ALiBi", None, True),
        ("ALiBi and segments", segments.contiguous(), True),
    ):
        qkv = [random(batch, heads, length, dim) for _ in range(3)]
        yield "attention", case, qkv, attention(ids, with_slopes)
    hidden = heads * dim
    norm = [random(batch, length, hidden), random(hidden)]
    yield "rms_norm", "", norm, lambda ops, x, weight: ops.rms_norm(x, weight, 1e-6)
    yield (
        "swiglu",
        "",
        [random(batch, length, inner) for _ in range(2)],
        lambda ops, gate, up: ops.swiglu(gate, up),
    )
    angles = random(1, 1, length, dim // 2)
    cos, sin = (function(torch.cat((angles, angles), -1)) for function in (torch.cos, torch.sin))
    yield (
        "rotary",
        "",
        [random(batch, heads, length, dim)],
        lambda ops, x: ops.rotary(x, cos.to(x.device), sin.to(x.device)),
    )


def _compare(
    name: str,
    case: str,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    inputs: list[Tensor],
    call: Callable[..., Any],
) -> Comparison:
    rounded = [tensor.to(dtype) for tensor in inputs]
    allowed = TOLERANCES[dtype]
    expected = _run(eager.OPS, call, [tensor.float() for tensor in rounded])
    try:
        found = _run(ops, call, [tensor.to(device) for tensor in rounded])
    except torch.OutOfMemoryError:
        raise  # no fault of the operation's
    except Exception as error:  # whatever a device raises is what a person has to see
        return Comparison(name, case, dtype, nan, nan, allowed, f"{type(error).__name__}: {error}")
    if len(found) != len(expected):
        return Comparison(name, case, dtype, nan, nan, allowed, "an input has no gradient")
    errors = [_error(mine, twin) for mine, twin in zip(found, expected, strict=True)]
    return Comparison(name, case, dtype, errors[0], max(errors[1:]), allowed, "")


def _run(ops: Ops, call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of the inputs, fp32 on the host."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = call(ops, *inputs)
    # a gradient that differs from place to place, the same on every device
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    output.backward(weight)
    gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
    return [tensor.detach().float().cpu() for tensor in (output, *gradients)]


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-12) if difference == difference else float("inf")
