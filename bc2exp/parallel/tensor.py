"""Tensor parallelism: the ranks of a group share every layer, and see the same samples.

Parameters become plain tensors, this rank's parts as `model.plan` says, and what runs between modules are
plain tensors too: fused operators of a device meet nothing else. The exchanges are put around the modules'
`forward`; the model itself is as before. A pair of matrices (q, k, v and o; gate, up and down) needs one
exchange before it and one behind it, forward and backward:

- plain: every rank holds the whole sequence between the pairs. Nothing before the pair, a sum over the
  group behind it; backward the other way round.
- sequence parallel: each rank holds its part of the sequence between the pairs, where norms and residual sums
  are computed. The parts are gathered before the pair; behind it the sums are scattered. As much traffic, and
  what lies between the pairs takes 1/n of the memory. The weight gradients of the norms are then sums over a
  part of the sequence: `shard.complete_gradients` adds them up once a step.

After Shoeybi et al. 2019, "Megatron-LM", and Korthikanti et al. 2022, "Reducing activation recomputation".

Legend: B batch, S sequence, H hidden size, n ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bc2exp.model.baichuan2 import PADDING_ID, Baichuan2, DecoderLayer
from bc2exp.model.plan import span, tensor_cut
from bc2exp.parallel.mesh import Mesh


def cut_layers(model: Baichuan2, mesh: Mesh, *, sequence_parallel: bool) -> None:
    """Leave this rank its part of every weight, and put the exchanges around the modules, in place."""
    group = TensorGroup(mesh.group("tensor"), mesh.tensor, sequence_parallel)
    shape = model.shape
    for name, parameter in list(model.named_parameters()):
        dim = tensor_cut(name).dim
        if dim is not None:
            rows = span(parameter.shape[dim], mesh.tensor, mesh.tensor_rank)
            part = parameter.detach().narrow(dim, rows.start, rows.stop - rows.start).clone()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(part))
    for layer in cast(Iterable[DecoderLayer], model.layers.values()):
        layer.self_attn.first_head = mesh.tensor_rank * shape["num_heads"] // mesh.tensor
        for pair in (layer.self_attn, layer.mlp):
            pair.forward = partial(_exchanging, pair.forward, group)  # type: ignore[method-assign]
    start = span(shape["vocab_size"], mesh.tensor, mesh.tensor_rank).start
    if model.embed_tokens is not None:
        lookup = partial(_look_up, model.embed_tokens, start, group)
        model.embed_tokens.forward = lookup  # type: ignore[method-assign]
    if model.lm_head is not None:
        model.lm_head.vocab_start, model.lm_head.group = start, group.ranks
        head = partial(_entering, model.lm_head.forward, group)
        model.lm_head.forward = head  # type: ignore[method-assign]


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share every layer, and what they exchange at the edges of a pair of matrices."""

    ranks: dist.ProcessGroup
    size: int
    sequence_parallel: bool

    def enter(self, x: Tensor) -> Tensor:
        """What every rank has of the sequence, to the whole, [B, S, H]; a gradient that comes back is this
        rank's partial sum."""
        out: Tensor = (_GatherSequence if self.sequence_parallel else _SumGradient).apply(x, self)
        return out

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums [B, S, H] to their sum over the ranks: what this rank has of the sequence."""
        out: Tensor = (_ScatterSum if self.sequence_parallel else _Sum).apply(x, self)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self.ranks)
        return total

    def gather(self, part: Tensor) -> Tensor:
        """[B, S/n, H] to [B, S, H]."""
        batch, length, hidden = part.shape
        whole = part.new_empty(self.size * batch, length, hidden)
        dist.all_gather_single(whole, part.contiguous(), group=self.ranks)
        return whole.view(self.size, batch, length, hidden).transpose(0, 1).reshape(batch, -1, hidden)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Partial sums [B, S, H] to this rank's part of their sum, [B, S/n, H]."""
        batch, length, hidden = x.shape
        parts = x.view(batch, self.size, length // self.size, hidden).transpose(0, 1).contiguous()
        part = x.new_empty(parts.shape[1:])
        dist.reduce_scatter_single(part, parts.flatten(0, 1), group=self.ranks)
        return part


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.gather(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.scatter_sum(grad), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.scatter_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.gather(grad), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grad), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _exchanging(forward: Callable[..., Tensor], group: TensorGroup, x: Tensor, *rest: Any) -> Tensor:
    return group.leave(forward(group.enter(x), *rest))


def _entering(forward: Callable[..., Tensor], group: TensorGroup, x: Tensor, *rest: Any) -> Tensor:
    return forward(group.enter(x), *rest)


def _look_up(embedding: nn.Embedding, start: int, group: TensorGroup, ids: Tensor) -> Tensor:
    """The rows of the words [B, S], each from the rank that holds it: zeros of all others in the sum."""
    weight = embedding.weight
    rows = ids - start
    held = (rows >= 0) & (rows < weight.shape[0])
    # The padding word gets no gradient; the other ranks' row 0 is an ordinary word.
    padding = PADDING_ID if start == 0 else None
    found = F.embedding(rows * held, weight, padding_idx=padding)
    return group.leave(found * held[..., None])
