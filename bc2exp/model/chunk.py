"""The logits of a chunk of positions under NormHead: their softmax, its loss and its gradients.

They lie in blocks of words, so that on a CPU a block is still in the cache when the product that made it has
become exponentials and these go into the next product. The softmax is divided by its sums last, in the
[C, H] factors, when all blocks and all shards have been seen.

Legend as in `loss`: C positions, H hidden size, V words held here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bc2exp.hardware.base import Exponentials


@dataclass(frozen=True)
class Shard:
    """The words [start, start + size) that this rank holds, and whom to ask about the others."""

    start: int
    size: int
    group: dist.ProcessGroup | None

    def combine(self, values: Tensor, how: Any) -> None:
        """Reduce `values` over the group, in place."""
        if self.group is not None:
            dist.all_reduce(values, op=how, group=self.group)

    def local(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each word [C] in this shard, and whether it is held here (else the column is any)."""
        columns = words - self.start
        held = (columns >= 0) & (columns < self.size)
        return columns.clamp(0, self.size - 1), held


@dataclass(frozen=True)
class Head:
    """The weight [V, H], the inverse lengths of its rows, fp32 [V], and the words it is for."""

    weight: Tensor
    inverse_norms: Tensor
    shard: Shard

    def rows(self, words: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight as they are computed with."""
        return self.weight[words].to(dtype)


class Logits:
    """[C, V], as contiguous blocks [C, `block_words`] (the last may be narrower), one after the other.

    `buffer` has room for as many elements, or more.
    """

    def __init__(self, buffer: Tensor, num_rows: int, num_words: int, block_words: int) -> None:
        self.num_rows, self.num_words, self.block_words = num_rows, num_words, block_words
        self.buffer = buffer[: num_rows * num_words]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The words of each block, and the block."""
        for start in range(0, self.num_words, self.block_words):
            stop = min(start + self.block_words, self.num_words)
            block = self.buffer[self.num_rows * start : self.num_rows * stop]
            yield slice(start, stop), block.view(self.num_rows, stop - start)

    def places(self, columns: Tensor) -> Tensor:
        """Where in the buffer the column [C] of each row lies."""
        starts = columns // self.block_words * self.block_words
        widths = (self.num_words - starts).clamp(max=self.block_words)
        rows = torch.arange(self.num_rows, device=columns.device)
        return self.num_rows * starts + rows * widths + (columns - starts)


@dataclass(frozen=True)
class ChunkResult:
    """What a chunk comes to.

    Attributes:
        loss: sum over its positions, fp32 [1].
        grad_hidden: its gradient for the hidden states, fp32 [C, H] (no numbers unless wanted).
        right: [C, H]; what the logits hold now, transposed, times this is inv * d/d(unit row).
    """

    loss: Tensor
    grad_hidden: Tensor
    right: Tensor


@dataclass(frozen=True)
class ChunkLoss:
    """Cross entropy and z-loss of chunks.

    Attributes:
        exponentials, block_words: the device's, see `Ops`.
        z_coefficient: factor of sum(max_logit^2).
        is_safe: no exponential leaves fp32 if no largest logit is taken off.
    """

    exponentials: Exponentials
    block_words: int
    z_coefficient: float
    is_safe: bool

    def __call__(
        self, logits: Logits, hidden: Tensor, labels: Tensor, head: Head, *, want_hidden: bool
    ) -> ChunkResult:
        """Of hidden [C, H] and labels [C] (negative: none). What the logits hold before does not matter.

        With p = hidden . w_v, the logit inv_v p, its exponential e_v and their sum S, d loss / dp is
        inv_v (e_v / S - [v is the label]). The label's own e is kept apart: e / S - 1 is minus the sum of
        the others over S, which is no rounding error for a word that is all but certain, too.
        """
        columns, held = head.shard.local(labels)
        labelled = labels >= 0
        held &= labelled
        shift, largest = None, None
        if self.z_coefficient != 0.0 or not self.is_safe:
            for words, block in logits.blocks():
                torch.mm(hidden, head.rows(words, hidden.dtype).T, out=block)
            shift, largest = _largest(logits, head, with_words=self.z_coefficient != 0.0)
        own, others, grad_hidden = self._exponentials(
            logits, hidden, columns.where(held, -1), head, shift, want_hidden=want_hidden
        )
        inverse = head.inverse_norms[columns]
        statistics = torch.stack((others, own * inverse))
        head.shard.combine(statistics, dist.ReduceOp.SUM)
        others, own = statistics
        if shift is None:
            shift = torch.zeros_like(own)
        sums = others + (own - shift).exp()
        loss = ((sums.log() + shift - own) * labelled).sum()
        of_words = [(columns, -others * inverse * held)]
        if largest is not None:
            loss = loss + self.z_coefficient * shift.square().sum()
            # Positions without a label are here for the z-loss alone.
            grad_hidden = grad_hidden * labelled[:, None]
            for _, block in logits.blocks():
                block.mul_(labelled[:, None])
            columns, held = head.shard.local(largest)
            slopes = 2 * self.z_coefficient * shift * sums
            of_words.append((columns, slopes * head.inverse_norms[columns] * held))
        for columns, gradient in of_words:
            # Neither scatter_ nor scatter_add_: on a CPU they copy all of [C, V] for one element a row.
            logits.buffer[logits.places(columns)] += gradient.to(hidden.dtype)
            if want_hidden:
                grad_hidden.addcmul_(head.rows(columns, hidden.dtype), gradient[:, None])
        return ChunkResult(loss, grad_hidden / sums[:, None], (hidden / sums[:, None]).to(hidden.dtype))

    def _exponentials(
        self,
        logits: Logits,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        shift: Tensor | None,
        *,
        want_hidden: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turns logits into inv * exp(logit - shift), computing them first if there is no shift.

        `targets` [C] are columns, or -1; their places become zero. Returns, all fp32: hidden @ weight^T of
        the targets [C] (else zero), the sums of the others' exponentials [C], and what the logits hold now
        times the weight, [C, H] (zero unless wanted).
        """
        rows = torch.arange(len(targets), device=targets.device)
        own = torch.zeros_like(rows, dtype=hidden.dtype)
        others = torch.zeros_like(rows, dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        for words, block in logits.blocks():
            weight = head.rows(words, hidden.dtype)
            if shift is None:
                torch.mm(hidden, weight.T, out=block)
            here = (targets >= words.start) & (targets < words.stop)
            columns = (targets - words.start).clamp_(0, block.shape[1] - 1)
            found = block[rows, columns]
            own = found.where(here, own)
            block[rows, columns] = found.masked_fill(here, float("-inf"))
            others += self.exponentials(block, head.inverse_norms[words], shift)
            if want_hidden:
                grad_hidden += block @ weight
        return own.float(), others, grad_hidden


def _largest(logits: Logits, head: Head, *, with_words: bool) -> tuple[Tensor, Tensor | None]:
    """The largest logit [C], fp32, and if wanted its word [C]: of several with that logit, the lowest."""
    shard, device = head.shard, logits.buffer.device
    largest = torch.full((logits.num_rows,), float("-inf"), device=device)
    words = torch.zeros(logits.num_rows, dtype=torch.int64, device=device)
    for held, block in logits.blocks():
        wide = block.float() * head.inverse_norms[held]
        of_block = wide.amax(dim=1)
        if with_words:
            words = (shard.start + held.start + wide.argmax(dim=1)).where(of_block > largest, words)
        largest = torch.maximum(largest, of_block)
    here = largest.clone()
    shard.combine(largest, dist.ReduceOp.MAX)
    if not with_words:
        return largest, None
    words[here != largest] = torch.iinfo(words.dtype).max
    shard.combine(words, dist.ReduceOp.MIN)
    return largest, words
