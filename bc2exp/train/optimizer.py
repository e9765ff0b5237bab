"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bc2exp.parallel.shard import local

BLOCK = 2**20
"""Elements of a weight that are stepped together where its gradient has to be widened first."""


class AdamW(torch.optim.AdamW):
    """torch's, for gradients that may be narrower than their weights, or of some rows of them only.

    Such gradients (see `Baichuan2.hold_gradients`) are widened a block at a time, so that there is never a
    wide copy of all; what is computed of them is what torch's operator computes of wide ones.

    Without the wrappers that keep torch's compiler out of the optimizer: they import it to do so, which takes
    nearly as long as the rest of torch, and nothing here is compiled.
    """

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    _torch_step = unwrap(torch.optim.AdamW.step)

    def take_storage(self) -> None:
        """Make the moments now, zero, and not in the first step: what that one leaves free between them would
        be in pieces too small for the next."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state, moment = self.state[parameter], torch.zeros_like(parameter, requires_grad=False)
                state["step"] = torch.zeros((), device=parameter.device if group["fused"] else None)
                state["exp_avg"], state["exp_avg_sq"] = moment, moment.clone()

    @torch.no_grad()
    def step(self, closure: None = None, *, factor: float = 1.0) -> None:  # type: ignore[override]
        """One step with all gradients times `factor`; they are then no longer good for anything.

        `closure` is not supported.
        """
        assert closure is None
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(p.grad.dtype == p.dtype and not p.grad.is_sparse for p in given):
            if factor != 1.0:
                torch._foreach_mul_([local(p.grad) for p in given], factor)
            self._torch_step()
            return
        room = torch.empty(
            max(min(p.numel(), max(BLOCK, p[0].numel())) for p in given), device=given[0].device
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_in_blocks(parameter, group, factor, room)

    def _step_in_blocks(self, parameter: Tensor, group: dict[str, Any], factor: float, room: Tensor) -> None:
        """`room`: fp32, for the gradient of a block."""
        state = self.state[parameter]
        for rows, gradient in _wide_blocks(parameter, room):
            step = state["step"].clone()  # the operator counts it up
            adamw(
                [parameter[rows]],
                [gradient.mul_(factor)],
                [state["exp_avg"][rows]],
                [state["exp_avg_sq"][rows]],
                [],
                [step],
                fused=group["fused"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        state["step"] += 1


def _wide_blocks(parameter: Tensor, room: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a parameter at a time, and their gradient, fp32, in `room`: good until the next."""
    gradient = parameter.grad
    assert gradient is not None
    num_rows, row_size = len(parameter), parameter[0].numel()
    size = max(1, BLOCK // row_size)
    starts = range(0, num_rows, size)
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        used, values = gradient.indices()[0], gradient.values()
        borders = torch.searchsorted(used, torch.tensor([*starts, num_rows], device=used.device)).tolist()
    for number, start in enumerate(starts):
        rows = slice(start, min(start + size, num_rows))
        wide = room[: (rows.stop - start) * row_size].view(-1, *parameter.shape[1:])
        if gradient.is_sparse:
            here = slice(borders[number], borders[number + 1])
            wide.zero_().index_copy_(0, used[here] - start, values[here].float())
        else:
            wide.copy_(gradient[rows])
        yield rows, wide


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    fused: bool = True,
) -> AdamW:
    """AdamW over every parameter, which have storage; the norms' vectors do not decay.

    `fused`: one operator for all weights of a kind. torch's own has a kernel on every device, knows sharded
    parameters, and keeps each weight where it is; a device's own optimizer that moves them would not do.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=fused)
    optimizer.take_storage()
    return optimizer


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
