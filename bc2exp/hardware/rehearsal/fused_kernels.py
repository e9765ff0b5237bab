"""The `npu::` fused operators of a llama-like training run, on host memory.

After their public documentation: computed in fp32 and rounded once to the argument's type. They stand below
autograd, so that torch_npu's own derivatives, fake kernels and DTensor rules run on top. Every other operator
of the namespace refuses by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bc2exp.hardware.rehearsal import attention, census
from bc2exp.hardware.rehearsal.host_kernels import refuser
from bc2exp.hardware.rehearsal.memory import gradients, host_alias, to_device

# ---------------------------------------------------------------- normalisation


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    axes = tuple(range(-gamma.dim(), 0))
    wide = host_alias(x).float()
    rstd = torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + epsilon)
    y = wide * rstd * host_alias(gamma).float()
    return to_device(y.to(x.dtype), x.device), to_device(rstd, x.device)


def _rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    axes = tuple(range(-gamma.dim(), 0))
    dy_, rstd_ = host_alias(dy).float(), host_alias(rstd)
    normal = host_alias(x).float() * rstd_
    scaled = dy_ * host_alias(gamma).float()
    dx = rstd_ * (scaled - normal * (scaled * normal).mean(axes, keepdim=True))
    dgamma = (dy_ * normal).sum_to_size(gamma.shape)
    return to_device(dx.to(x.dtype), x.device), to_device(dgamma.to(gamma.dtype), x.device)


def _add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    total = to_device(host_alias(x1) + host_alias(x2), x1.device)
    return (*_rms_norm(total, gamma, epsilon), total)


# ---------------------------------------------------------------- activation and rotary embedding


def _swiglu_on_host(x: Tensor, dim: int) -> Tensor:
    gate, up = x.float().chunk(2, dim)
    return (F.silu(gate) * up).to(x.dtype)


def _swiglu(x: Tensor, dim: int = -1) -> Tensor:
    return to_device(_swiglu_on_host(host_alias(x), dim), x.device)


def _swiglu_backward(dy: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    (dx,) = gradients(lambda value: _swiglu_on_host(value, dim), (host_alias(x),), host_alias(dy))
    return to_device(dx, x.device)


def _rotary_on_host(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.float().chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
    elif mode == "interleave":
        first, second = x.float()[..., 0::2], x.float()[..., 1::2]
        rotated = torch.stack((-second, first), -1).flatten(-2)
    else:
        raise ValueError(f"npu::npu_rotary_mul: unknown rotary_mode {mode!r}")
    return (x.float() * cos.float() + rotated * sin.float()).to(x.dtype)


def _rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    if rotate is not None:
        raise census.refuse("npu::npu_rotary_mul", "rotate")
    return to_device(_rotary_on_host(host_alias(x), host_alias(r1), host_alias(r2), rotary_mode), x.device)


def _rotary_mul_backward(
    dy: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, ...]:
    host = [host_alias(part) for part in (x, r1, r2)]
    found = gradients(lambda x, cos, sin: _rotary_on_host(x, cos, sin, rotary_mode), host, host_alias(dy))
    return tuple(to_device(part, x.device) for part in found)


# ---------------------------------------------------------------- cross entropy


def _check_cross_entropy(
    classes: int,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    zloss_scale: float,
    return_zloss: bool,
) -> None:
    name = "npu::npu_cross_entropy_loss"
    if weight is not None or label_smoothing or zloss_scale or return_zloss or ignore_index >= 0:
        raise census.refuse(name, "weight, label_smoothing, zloss or ignore_index >= 0")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: unknown reduction {reduction!r}")
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
        # A negative ignore_index ignores nothing in this operator: a label of -100 would index out of bounds.
        raise ValueError(f"{name}: target {int(target.min())}..{int(target.max())} outside 0..{classes - 1}")


def _cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
) -> tuple[Tensor, ...]:
    scores, labels = host_alias(x).float(), host_alias(target)
    _check_cross_entropy(
        x.shape[1],
        labels,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        lse_square_scale_for_zloss,
        return_zloss,
    )
    log_prob = scores.log_softmax(-1)
    loss = F.nll_loss(log_prob, labels, reduction=reduction)
    loss = loss if reduction == "none" else loss.reshape(1)
    zloss = torch.zeros(1)
    results = [to_device(part.to(x.dtype), x.device) for part in (loss, log_prob, zloss)]
    return (*results, to_device(scores.logsumexp(-1), x.device))


def _cross_entropy_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_zloss: Tensor | None = None,
    lse_for_zloss: Tensor | None = None,
    reduction: str = "mean",
    **_: Any,
) -> Tensor:
    scores = host_alias(log_prob).float()
    difference = scores.exp() - F.one_hot(host_alias(target), scores.shape[1])
    scale = host_alias(grad_loss).float().reshape(-1, 1) / (len(scores) if reduction == "mean" else 1)
    return to_device((difference * scale).to(log_prob.dtype), log_prob.device)


# ---------------------------------------------------------------- registration

KERNELS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": _rms_norm,
    "npu_rms_norm_backward": _rms_norm_backward,
    "npu_add_rms_norm": _add_rms_norm,
    "npu_swiglu": _swiglu,
    "npu_swiglu_backward": _swiglu_backward,
    "npu_rotary_mul": _rotary_mul,
    "npu_rotary_mul_backward": _rotary_mul_backward,
    "npu_cross_entropy_loss": _cross_entropy,
    "npu_cross_entropy_loss_backward": _cross_entropy_backward,
}

# These ask for nothing but what torch_npu itself keeps of a tensor.
KEPT_FROM_TORCH_NPU = frozenset(
    ["get_npu_format", "get_storage_size", "copy_memory_", "npu_change_data_ptr", "set_op_timeout_ms"]
)

_library: torch.library.Library | None = None


def _counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def counting(*args: Any, **kwargs: Any) -> Any:
        census.count_operator(name, (*args, *kwargs.values()))
        return kernel(*args, **kwargs)

    return counting


def install() -> None:
    """Register the kernels and the refusals; once, after torch_npu was imported."""
    global _library
    _library = torch.library.Library("npu", "IMPL")
    kernels = {**KERNELS, **attention.kernels()}
    for full_name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, name = full_name.partition("::")
        if namespace == "npu" and name not in KEPT_FROM_TORCH_NPU and name not in kernels:
            _library.impl(name, refuser(full_name), "PrivateUse1", allow_override=True)
    for name, kernel in kernels.items():
        _library.impl(name, _counted(f"npu::{name}", kernel), "PrivateUse1", allow_override=True)
