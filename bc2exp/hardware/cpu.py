"""The CPU backend: torch's fused attention, and what else a CPU does in fewer passes than the eager twins.

torch's CPU attention has a causal mode but knows neither segments nor ALiBi, and a ready bias for
13B at 4096 positions would be 2.7 GB. So where either is asked for, the bias is built for a block of
query rows at a time, for the keys that block sees, and is rebuilt in backward instead of kept.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bc2exp.hardware import cpu_pointwise, eager
from bc2exp.hardware.base import Ops
from bc2exp.hardware.determinism import be_deterministic
from bc2exp.hardware.probe import count_devices

QUERY_BLOCK = 64
"""Query rows whose bias exists at one time.

Of 64, 128, 256 and 512 the fastest from 256 to 2048 positions (2 cores, forward and backward): the bias
stays in the processor's cache, and fewer keys are computed that no row of the block may see.
"""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None, slopes: Tensor | None, scale: float
) -> Tensor:
    """See `base.Attention`."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if segment_ids is None and slopes is None and num_queries in (num_keys, 1):
        # One query at the last position sees every key: no mask at all.
        return F.scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1, scale=scale)
    out: Tensor = _BlockedAttention.apply(q, k, v, segment_ids, slopes, scale)
    return out


class _BlockedAttention(torch.autograd.Function):
    """Attention by blocks of query rows; keeps q, k, v and recomputes each block in backward.

    torch's own autograd would keep the bias of every block, which together are the [N, S, K] tensor
    that the blocks are there to avoid.
    """

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
        out = torch.empty_like(q)
        for rows, keys, bias in _blocks(q, k, segment_ids, slopes):
            out[:, :, rows] = F.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=bias, scale=scale
            )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, segment_ids, slopes = ctx.saved_tensors
        # Keys gather gradient from every block: sum in fp32, or bf16 would round once a block.
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k, dtype=torch.float32)
        grad_v = torch.zeros_like(v, dtype=torch.float32)
        for rows, keys, bias in _blocks(q, k, segment_ids, slopes):
            block_q, block_k, block_v = (
                part.detach().requires_grad_() for part in (q[:, :, rows], k[:, :, keys], v[:, :, keys])
            )
            with torch.enable_grad():
                out = F.scaled_dot_product_attention(
                    block_q, block_k, block_v, attn_mask=bias, scale=ctx.scale
                )
            out.backward(grad_out[:, :, rows])
            grad_q[:, :, rows] = block_q.grad
            grad_k[:, :, keys].add_(block_k.grad)
            grad_v[:, :, keys].add_(block_v.grad)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _blocks(
    q: Tensor, k: Tensor, segment_ids: Tensor | None, slopes: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of query rows, the range of keys each can see, and the mask or bias between the two.

    The third is bool [B or 1, 1, rows, keys] without slopes, fp32 [B or 1, N, rows, keys] with them
    (torch adds an fp32 bias to bf16 scores in fp32).
    """
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    for start in range(0, num_queries, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, num_queries))
        stop = num_keys - num_queries + rows.stop
        seen = None if segment_ids is None else segment_ids[:, :stop]
        visible = eager.visible_keys(seen, rows.stop - rows.start, stop, q.device)
        first = 0
        if segment_ids is not None:
            # Keys before the oldest segment of this block are seen by none of its rows.
            first = int(visible.any(dim=1).any(dim=0).to(torch.uint8).argmax())
        keys, visible = slice(first, stop), visible[:, None, :, first:]
        if slopes is None:
            yield rows, keys, visible
        else:
            bias = eager.alibi_bias(slopes, rows.stop - rows.start, stop - first)
            yield rows, keys, bias[None].masked_fill(~visible, float("-inf"))


EXPONENTIALS_BYTES = 2**21
"""What the fp32 copy of the rows takes that are worked on at one time: all passes over it stay in the
processor's cache. One and four MiB took as long on two cores, all rows of all words 1.6 times as long (one
core)."""


HEAD_BLOCK_WORDS = 2048
"""The exponentials and the next product then find a block in the processor's cache. 1,024 words were 4 % of
the loss slower, 4,096 words 2 to 5 % (256 wide, two cores)."""


def exponentials(products: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """See `base.Exponentials`."""
    rows = max(1, EXPONENTIALS_BYTES // (4 * products.shape[1]))
    blocks = products.split(rows)
    shifts = [None] * len(blocks) if shift is None else shift.split(rows)
    # One for all blocks: memory that is new to the process costs more than all that is done in it.
    wide = torch.empty_like(blocks[0], dtype=torch.float32)
    each = zip(blocks, shifts, strict=True)
    return torch.cat([eager.exponentials(block, scale, its, wide[: len(block)]) for block, its in each])


class CpuBackend:
    """See `base.Backend`."""

    name = "cpu"
    packages: tuple[str, ...] = ()
    collectives = "gloo"
    pins_memory = False
    ops: Ops = Ops(
        attention=attention,
        rms_norm=cpu_pointwise.rms_norm,
        swiglu=eager.swiglu,
        rotary=cpu_pointwise.rotary,
        exponentials=exponentials,
        head_block_words=HEAD_BLOCK_WORDS,
        sparse_gradients=True,
    )

    def device(self, local_rank: int) -> torch.device:
        """Every rank of a host shares its one CPU device."""
        return torch.device("cpu")

    def setup(self, local_rank: int, num_local_ranks: int, *, deterministic: bool = False) -> None:
        """Give this rank its share of the cores that the process may run on, at least one."""
        torch.set_num_threads(max(1, _num_available_cores() // num_local_ranks))
        if deterministic:
            be_deterministic()

    def synchronize(self) -> None:
        """Nothing is ever queued."""

    def peak_memory_bytes(self) -> int:
        """The high-water mark of the whole process, the interpreter and torch included."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

    def peak_allocated_bytes(self) -> int | None:
        """torch counts nothing on the CPU."""
        return None

    def total_memory_bytes(self) -> int | None:
        """Ranks share what the host has."""
        return None

    def free_memory_bytes(self) -> int | None:
        """See above."""
        return None

    def device_name(self) -> str:
        """The processor's architecture, and the cores and the memory that the ranks share."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        cores = _num_available_cores()
        return f"{platform.machine()}, {cores} core{'s' * (cores > 1)} and {memory:.1f} GiB for all ranks"

    def runtime(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def count(self) -> int | None:
        """No limit: ranks may share cores."""
        return count_devices(self.name)


def _num_available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


BACKEND = CpuBackend()
