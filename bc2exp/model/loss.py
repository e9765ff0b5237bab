"""Cross entropy under NormHead, in chunks, with the gradients computed on the way forward.

The logits are hidden @ normalize(weight)^T, one unit row a word (Yang et al. 2023, "Baichuan 2"). With
125,696 words the logits of a batch would outweigh the model, so only those of a few rows exist at a
time: they turn into loss and gradients at once, and backward has nothing left to do but scale.

Legend: T positions, C positions of a chunk, H hidden size, V words of the vocabulary held here (all
of them without a group). Softmax statistics and the sum of the weight's gradient are fp32, and so is
what is computed of logits; the three matrix products run in the inputs' type, and so are they kept.

The normalised weight never exists: with inv_v = 1 / |w_v|, logits are (hidden @ weight^T) * inv, and for
a gradient g_v with respect to the unit row, d/dw_v = inv_v g_v - (inv_v g_v . w_v) inv_v^2 w_v.
What becomes of the logits of a chunk stands in `chunk`.

A unit row can give no logit above the length of the hidden state. Where every length is at most
SAFE_LENGTH, no exponential can leave fp32, and softmax needs no largest logit to be taken off: one pass
over [C, V], and in shards one exchange a chunk, less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bc2exp.hardware import eager
from bc2exp.hardware.base import Ops
from bc2exp.model.chunk import ChunkLoss, Head, Logits, Shard
from bc2exp.model.room import Room

IGNORED_LABEL = -100
NORM_EPS = 1e-12  # as torch.nn.functional.normalize
CHUNK_BYTES = 128 * 2**20
PART_OF_GRADIENT = 1 / 2
"""What the logits of a chunk take in the type they are kept in, or the part of what the weight's gradient
takes, whichever is more, where the caller names no number of tokens.

Every chunk reads the weight and its gradient once, so larger chunks are faster, up to about 512 rows.
benchmarks/loss_memory.py, 2,048 x 512 x 125,696: 0.24 of the plain path's memory in fp32 and in bf16.
"""
SAFE_LENGTH = 60.0
"""exp(60) times a million words is 1e32, exp(-60) is 1e-26; fp32 holds 1e-38 to 3e38."""
CHUNK_MULTIPLE = 64  # odd numbers of rows leave matrix kernels on their slow edges
ROW_BLOCK = 1024
"""Rows of the vocabulary handled together where a temporary beside [V, H] is needed. It stays in cache."""


def norm_head_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    real: Tensor | None = None,
    z_loss_weight: float = 0.0,
    z_loss_ratio: float | None = None,
    chunk_tokens: int | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    every_row: bool = False,
    narrow_gradient: Room | None = None,
    ops: Ops = eager.OPS,
) -> Tensor:
    """Sum of the cross entropies of hidden @ normalize(weight)^T over the labels != -100, fp32 [1].

    hidden [T, H] and weight [V, H] have one floating type, or the weight is fp32: then it is cast to the
    other's, and its gradient is fp32. labels [T] are int64. Rows labelled -100 reach the head only if the
    z-loss wants them.

    The z-loss of the published 13B code, z_loss_weight * mean(max_logit^2) over all positions that are
    no padding (`real`, bool [T], default all), is stated there for a mean loss. Here a sum is returned,
    to be divided by the number of labels later, so what is added is
    z_loss_weight * z_loss_ratio * sum(max_logit^2), where z_loss_ratio is labels / real positions: of
    this call by default; give the ratio of the whole step where a step spans several calls.

    With `group`, weight holds the rows [vocab_start, vocab_start + V) of a vocabulary of `vocab_size`
    words; all ranks of the group pass the same hidden, labels and real, and return the same loss. The
    gradient of hidden is then THIS RANK'S PARTIAL SUM, to be added up over the group by the caller.

    `chunk_tokens` is C; by default see CHUNK_BYTES. With `every_row` no values are looked at beforehand:
    all rows reach the head, as if each had a label, and lengths are taken to be safe. `ops` are the device's.

    With `narrow_gradient`, where all rows are one chunk, so that nothing is added up, the weight's gradient
    comes in hidden's type, and lies there until the next call: over the logits, if it is as large.

    The graph can be walked back once: a second backward raises RuntimeError. Raises ValueError, naming
    it, for a label outside the vocabulary.
    """
    assert group is None or vocab_size is not None, "a shard does not know the size of the vocabulary"
    num_words = weight.shape[0] if vocab_size is None else vocab_size
    if every_row:
        rows, z_coefficient = torch.arange(labels.shape[0], device=labels.device), 0.0
    else:
        rows, z_coefficient = _select_rows(labels, real, num_words, z_loss_weight, z_loss_ratio)
    if chunk_tokens is None:
        # From the mean shard, not from this one: every rank has to take part in the same reductions.
        words_here = num_words if group is None else -(-num_words // group.size())
        chunk_tokens = _chunk_tokens(len(rows), words_here, hidden)
    shard = Shard(vocab_start, weight.shape[0], group)
    longest = _longest(hidden.detach(), rows, shard)
    is_safe = every_row or longest.item() <= SAFE_LENGTH  # not so for a NaN
    chunk_loss = ChunkLoss(ops.exponentials, ops.head_block_words, z_coefficient, is_safe)
    narrow_gradient = narrow_gradient if 0 < len(rows) <= chunk_tokens else None
    job = _Job(rows, labels[rows], chunk_tokens, shard, chunk_loss, narrow_gradient)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _NormHeadLoss.apply(hidden, weight, job)
        return loss
    return _loss_and_gradients(hidden, weight, job, False, False)[0]


def _chunk_tokens(num_rows: int, words_here: int, hidden: Tensor) -> int:
    """Rows of a chunk: as few chunks as may be, of about one size."""
    gradient_bytes = 4 * words_here * hidden.shape[1]
    row_bytes = hidden.element_size() * words_here
    most = max(1, int(max(CHUNK_BYTES, PART_OF_GRADIENT * gradient_bytes) / row_bytes) // CHUNK_MULTIPLE)
    multiples = max(1, -(-num_rows // CHUNK_MULTIPLE))
    chunks = -(-multiples // most)
    return CHUNK_MULTIPLE * -(-multiples // chunks)


@dataclass(frozen=True)
class _Job:
    """What to compute: the `rows` of hidden that the head sees, and their `labels`. `narrow_gradient` is only
    there where they are one chunk."""

    rows: Tensor
    labels: Tensor
    chunk_tokens: int
    shard: Shard
    chunk_loss: ChunkLoss
    narrow_gradient: Room | None


def _longest(hidden: Tensor, rows: Tensor, shard: Shard) -> Tensor:
    """Length of the longest of the `rows` of `hidden` [T, H], fp32 [1], the same on every rank."""
    longest = torch.zeros(1, dtype=torch.float32, device=hidden.device)
    if len(rows):
        lengths = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32)
        longest = lengths[rows].amax(dim=0, keepdim=True)
    shard.combine(longest, dist.ReduceOp.MAX)
    return longest


def _select_rows(
    labels: Tensor, real: Tensor | None, num_words: int, z_loss_weight: float, z_loss_ratio: float | None
) -> tuple[Tensor, float]:
    """Indices of the rows that the head has to see, and the factor of sum(max_logit^2)."""
    labelled = labels != IGNORED_LABEL
    wrong = labelled & ((labels < 0) | (labels >= num_words))
    if wrong.any():
        raise ValueError(f"label {int(labels[wrong][0])} is outside the vocabulary of {num_words} words")
    if z_loss_weight != 0.0:
        counted = torch.ones_like(labelled) if real is None else real
        assert not (labelled & ~counted).any(), "a padding position has a label"
        if z_loss_ratio is None:
            z_loss_ratio = int(labelled.sum()) / max(1, int(counted.sum()))
        if z_loss_ratio != 0.0:
            return counted.nonzero()[:, 0], z_loss_weight * z_loss_ratio
    return labelled.nonzero()[:, 0], 0.0


class _NormHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: _Job) -> Tensor:
        want_hidden, want_weight, _ = ctx.needs_input_grad
        loss, *ctx.gradients = _loss_and_gradients(hidden, weight, job, want_hidden, want_weight)
        ctx.compute_dtype = hidden.dtype
        ctx.save_for_backward(weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            # They were scaled in place the first time: a spare copy of [V, H] is what we cannot afford.
            raise RuntimeError("the NormHead loss can be walked back only once")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            (weight,) = ctx.saved_tensors
            _through_normalisation_(grad_weight, weight, ctx.compute_dtype, grad_loss)
            if grad_weight.dtype == torch.float32:
                grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, job: _Job, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss [1], its gradient for hidden [T, H], and inv * d/d(unit row) [V, H], fp32 or narrow (None unless
    wanted)."""
    num_rows = min(job.chunk_tokens, job.rows.shape[0])
    if num_rows < job.rows.shape[0]:
        weight = weight.to(hidden.dtype)  # once; the rows of a single chunk are cast where they are used
    head = Head(weight, row_norms(weight, hidden.dtype).clamp_min_(NORM_EPS).reciprocal_(), job.shard)
    loss = torch.zeros(1, dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden) if want_hidden else None
    buffer, grad_weight = _room(
        num_rows, hidden, weight, job.narrow_gradient if want_weight else None, want_weight=want_weight
    )
    chunks = (part.split(job.chunk_tokens) for part in (job.rows, job.labels))
    for number, (rows, labels) in enumerate(zip(*chunks, strict=True)):
        logits = Logits(buffer, len(rows), weight.shape[0], job.chunk_loss.block_words)
        chunk = job.chunk_loss(logits, hidden[rows], labels, head, want_hidden=want_hidden)
        loss += chunk.loss
        if grad_hidden is not None:
            grad_hidden[rows] = chunk.grad_hidden.to(hidden.dtype)
        if grad_weight is not None:
            for words, block in logits.blocks():
                if job.narrow_gradient is not None:
                    grad_weight[words] = block.T @ chunk.right  # not `out`: it may lie over the block
                else:
                    _add_product_(grad_weight[words], block, chunk.right, keep=number > 0)
    return loss, grad_hidden, grad_weight


def _room(
    num_rows: int, hidden: Tensor, weight: Tensor, narrow_gradient: Room | None, *, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Memory for the logits of a chunk, flat, and for the weight's gradient, which the first chunk writes.

    A narrow gradient with at least as many columns as the chunk has rows lies over the logits: they fill the
    end of it, so that the gradient of some words ends before the logits of the next ones begin.
    """
    num_words, width = weight.shape
    gradient = None
    if narrow_gradient is not None:
        gradient = narrow_gradient.take(weight.shape, hidden.dtype, hidden.device)
        if num_rows <= width:
            return gradient.view(-1)[num_words * (width - num_rows) :], gradient
    elif want_weight:
        make = torch.empty_like if num_rows else torch.zeros_like
        gradient = make(weight, dtype=torch.float32)
    return hidden.new_empty(num_rows * num_words), gradient


def _add_product_(total: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
    """Adds left^T right to `total`, fp32 [V, H], or writes it there; left is [C, V] and right [C, H], of one
    type."""
    if left.dtype != total.dtype:
        product = left.T @ right
        if keep:
            total.add_(product.float())
        else:
            total.copy_(product)
    elif keep:
        total.addmm_(left.T, right)
    else:
        torch.mm(left.T, right, out=total)


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths of the rows of [V, H] when cast to `dtype`, fp32 [V]."""
    # torch's own norm of bf16 in fp32 took five times as long as a norm of fp32 copies of blocks.
    # All norms in one tensor from the start: those of a block would lie behind its copies, and what these
    # leave be too small for the next block's. With glibc's allocator the holes were as large as the weight.
    norms = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for words in _blocks(weight.shape[0]):
        norms[words] = torch.linalg.vector_norm(weight[words].to(dtype).float(), dim=1)
    return norms


def _through_normalisation_(gradient: Tensor, weight: Tensor, dtype: torch.dtype, factor: Tensor) -> None:
    """Turns inv * d/d(unit row) [V, H] into d/d(row) times `factor` [1], in place, computed in fp32, in one
    pass over gradient and weight. `dtype`: what the rows were cast to."""
    for words in _blocks(weight.shape[0]):
        rows = weight[words].to(dtype).float()
        inverse = torch.linalg.vector_norm(rows, dim=1).clamp_min_(NORM_EPS).reciprocal_()
        scaled = gradient[words].float().mul_(factor)
        along = (scaled * rows).sum(dim=1) * inverse.square()
        # A row shorter than the epsilon is divided by the epsilon, a constant.
        along *= inverse < 1.0 / NORM_EPS
        scaled.addcmul_(rows, along[:, None], value=-1)
        if gradient.dtype != scaled.dtype:
            gradient[words] = scaled


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, ROW_BLOCK):
        yield slice(start, start + ROW_BLOCK)
