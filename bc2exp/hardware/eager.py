"""Every operation of `Ops` in plain torch: the reference that the fused answers are held to.

Clear and slow: attention builds the whole [B, N, S, K] score matrix, in fp32. Shapes as in `base`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bc2exp.hardware.base import Ops


def visible_keys(segment_ids: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Which key each query sees: bool [B or 1, num_queries, num_keys], causal from the bottom right."""
    key_positions = torch.arange(num_keys, device=device)
    query_positions = key_positions[num_keys - num_queries :]
    visible = (key_positions <= query_positions[:, None])[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, num_keys - num_queries :, None] == segment_ids[:, None, :])
    return visible


def alibi_bias(slopes: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """slope * (key - query) as fp32 [N, num_queries, num_keys], the queries being the last positions."""
    key_positions = torch.arange(num_keys, device=slopes.device, dtype=torch.float32)
    query_positions = key_positions[num_keys - num_queries :]
    return slopes.float()[:, None, None] * (key_positions - query_positions[:, None])


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None, slopes: Tensor | None, scale: float
) -> Tensor:
    """See `base.Attention`."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    scores = scale * (q.float() @ k.float().transpose(-1, -2))
    if slopes is not None:
        scores = scores + alibi_bias(slopes, num_queries, num_keys)
    visible = visible_keys(segment_ids, num_queries, num_keys, q.device)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return (scores.softmax(dim=-1) @ v.float()).to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `base.RmsNorm`."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `base.SwiGlu`."""
    return F.silu(gate) * up


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `base.Rotary`."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def exponentials(products: Tensor, scale: Tensor, shift: Tensor | None, wide: Tensor | None = None) -> Tensor:
    """See `base.Exponentials`. `wide` is fp32 of the shape of products, to work in; by default it is made."""
    if products.dtype == torch.float32:
        wide = products
    elif wide is None:
        wide = products.float()
    else:
        # A copy and arithmetic in fp32: arithmetic across types is much slower than both.
        wide.copy_(products)
    wide.mul_(scale)
    if shift is not None:
        wide.sub_(shift[:, None])
    sums = wide.exp_().sum(dim=1)
    wide.mul_(scale)
    if wide is not products:
        products.copy_(wide)
    return sums


HEAD_BLOCK_WORDS = 2**14
"""An eighth of the vocabulary: few blocks with small fp32 copies. Untimed: no accelerator was at hand."""

OPS = Ops(
    attention=attention,
    rms_norm=rms_norm,
    swiglu=swiglu,
    rotary=rotary,
    exponentials=exponentials,
    head_block_words=HEAD_BLOCK_WORDS,
    sparse_gradients=False,
)


def with_twins(ops: Ops, names: Collection[str]) -> Ops:
    """`ops` with the eager twin in place of each operation named, such as `rotary`."""
    return replace(ops, **{name: getattr(OPS, name) for name in names})
