"""Attention on a CPU, by blocks of query rows and of heads whose scores stay in the processor's cache.

torch's own has a causal mode but knows neither segments nor ALiBi, computes in bf16 what no row may see, and
takes twice as long as the products and passes below, but where the processor multiplies tiles of bf16 (AMX).
Scores and what comes of them are fp32: products of bf16 numbers are exact in it, which torch calls fp32
products of bf16 precision.

Legend as in `base`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bc2exp.hardware import eager

SCORES_BYTES = 2**23
"""What the scores of a block take, of as many heads, or of as many samples, as that allows."""

TILED_QUERIES = 256
"""From how many queries torch's own kernel is the faster one where the processor has tiles: 0.8 of the time
of ours with 256, 0.4 with 2,048, but 1.5 with 128 (both passes on a Xeon, 16 heads of 64; docs/LOG.md)."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None, slopes: Tensor | None, scale: float
) -> Tensor:
    """See `base.Attention`."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    plain = segment_ids is None and slopes is None
    if plain and (num_queries == 1 or (num_queries == num_keys and _is_torch_faster(q.dtype, num_queries))):
        # One query at the last position sees every key: no mask at all.
        return F.scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1, scale=scale)
    out: Tensor = _BlockedAttention.apply(q, k, v, segment_ids, slopes, scale)
    return out


def _is_torch_faster(dtype: torch.dtype, num_queries: int) -> bool:
    if dtype == torch.float32:
        return True
    return num_queries >= TILED_QUERIES and torch.cpu.get_capabilities().get("amx_bf16", False)


class _BlockedAttention(torch.autograd.Function):
    """Keeps q, k and v, and computes the probabilities of each block again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment_ids: Tensor | None,
        slopes: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, segment_ids, slopes)
        ctx.scale = scale
        out = _positions_first(q)
        v = v.contiguous()  # once, not in every block
        for rows, keys, hidden, bias in _blocks(q, k, segment_ids, slopes):
            for part in _parts(q, rows, keys):
                scores = _scores(q[part][:, :, rows], k[part][:, :, keys], scale)
                probabilities = _probabilities(scores, hidden, bias, part)
                out[part][:, :, rows] = probabilities.to(v.dtype) @ v[part][:, :, keys]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, segment_ids, slopes = ctx.saved_tensors
        # Keys gather gradient from every block: sum in fp32, or bf16 would round once a block.
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k, dtype=torch.float32)
        grad_v = torch.zeros_like(v, dtype=torch.float32)
        v, grad_out = v.contiguous(), grad_out.contiguous()
        for rows, keys, hidden, bias in _blocks(q, k, segment_ids, slopes):
            for part in _parts(q, rows, keys):
                scores = _scores(q[part][:, :, rows], k[part][:, :, keys], ctx.scale)
                probabilities = _probabilities(scores, hidden, bias, part)
                transposed = probabilities.to(q.dtype).transpose(-1, -2)
                grad_v[part][:, :, keys] += transposed @ grad_out[part][:, :, rows]
                grad_scores = _scores(grad_out[part][:, :, rows], v[part][:, :, keys], 1.0)
                # probabilities * (gradient - sum(gradient * probabilities)), in one pass
                grad_scores = torch.ops.aten._softmax_backward_data(
                    grad_scores, probabilities, -1, torch.float32
                )
                narrow = grad_scores.mul_(ctx.scale).to(q.dtype)
                grad_q[part][:, :, rows] = narrow @ k[part][:, :, keys]
                grad_k[part][:, :, keys] += narrow.transpose(-1, -2) @ q[part][:, :, rows]
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _positions_first(like: Tensor) -> Tensor:
    """Memory [B, N, S, D] in which the heads of a position lie side by side, as a matrix takes them next."""
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _scores(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right^T, fp32 [..., rows, keys], of left [..., rows, D] and right [..., keys, D]."""
    with _exact_products(left.dtype):
        scores = left.float() @ right.float().transpose(-1, -2)
    return scores if scale == 1.0 else scores.mul_(scale)


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products of numbers that came from `dtype`: in one bf16 product each, where they are that."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        setting.fp32_precision = before


def _probabilities(scores: Tensor, hidden: Tensor, bias: Tensor | None, part: tuple[slice, slice]) -> Tensor:
    """softmax(scores + bias) where `hidden` does not forbid it; the scores are then no longer good."""
    if bias is not None:
        scores += _of_part(bias, part)
    # of the last keys
    scores[..., scores.shape[-1] - hidden.shape[-1] :].masked_fill_(_of_part(hidden, part), float("-inf"))
    return scores.softmax(dim=-1)


def _of_part(tensor: Tensor, part: tuple[slice, slice]) -> Tensor:
    """Of [B or 1, N or 1, rows, keys]."""
    samples, heads = (
        slice(None) if size == 1 else its for size, its in zip(tensor.shape, part, strict=False)
    )
    return tensor[samples, heads]


def _parts(q: Tensor, rows: slice, keys: slice) -> Iterator[tuple[slice, slice]]:
    """Samples and heads that are worked on at one time."""
    batch, heads = q.shape[:2]
    most = max(1, SCORES_BYTES // (4 * (rows.stop - rows.start) * (keys.stop - keys.start)))
    if most >= heads:
        for first in range(0, batch, most // heads):
            yield slice(first, first + most // heads), slice(None)
    else:
        for sample in range(batch):
            for first in range(0, heads, most):
                yield slice(sample, sample + 1), slice(first, first + most)


def query_block(num_queries: int) -> int:
    """Query rows of a block. The fewer, the fewer keys are computed that none of them may see; but every
    block reads its keys, so long sequences have 16 blocks and not more."""
    wanted = max(min(num_queries // 4, 128), num_queries // 16)
    return 64 * max(1, wanted // 64)


def _blocks(
    q: Tensor, k: Tensor, segment_ids: Tensor | None, slopes: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Blocks of query rows, the range of keys each can see, which of the last of these each row may not see,
    bool [B or 1, 1, rows, last keys], and fp32 [1, N, rows, keys] with slopes."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    size = query_block(num_queries)
    for start in range(0, num_queries, size):
        rows = slice(start, min(start + size, num_queries))
        count, stop = rows.stop - rows.start, num_keys - num_queries + rows.stop
        first = 0
        if segment_ids is None:
            visible = eager.visible_keys(None, count, count, q.device)
        else:
            visible = eager.visible_keys(segment_ids[:, :stop], count, stop, q.device)
            # Keys before the oldest segment of this block are seen by none of its rows.
            first = int(visible.any(dim=1).any(dim=0).to(torch.uint8).argmax())
            visible = visible[:, :, first:]
        bias = None if slopes is None else eager.alibi_bias(slopes, count, stop - first)[None]
        yield rows, slice(first, stop), ~visible[:, None], bias
