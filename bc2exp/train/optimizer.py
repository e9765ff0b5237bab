"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW over every parameter; the norms' vectors do not decay.

    `fused`: one operator for all weights of a kind. torch's own has a kernel on every device, knows sharded
    parameters, and keeps each weight where it is; a device's own optimizer that moves them would not do.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_schedule(
    *,
    kind: str,
    lr: float,
    min_lr: float,
    steps: int,
    warmup_steps: int | None,
    warmup_fraction: float | None,
) -> Callable[[int], float]:
    """The learning rate of each step, counted from 1.

    Linear from 0 to `lr` over the warmup (its last step has `lr`), then `cosine` or `linear` down to `min_lr`
    at the last step, or `constant`. The course is Megatron's.

    Args:
        kind: `cosine`, `linear` or `constant`.
        warmup_steps: length of the warmup; None: `warmup_fraction` of all steps, rounded.
    """
    warmup = warmup_steps if warmup_steps is not None else round((warmup_fraction or 0.0) * steps)

    def lr_at(step: int) -> float:
        if step <= warmup:
            return lr * step / warmup
        if kind == "constant":
            return lr
        progress = (step - warmup) / max(1, steps - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
        return min_lr + (lr - min_lr) * shape

    return lr_at
