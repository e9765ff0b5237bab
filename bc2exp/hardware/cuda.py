"""The GPU backend: torch's fused attention, FlexAttention where segments or ALiBi are asked for.

FlexAttention compiles a kernel around two small functions, the mask and the bias below: neither an
[S, K] mask nor a bias is ever in memory, and blocks that no query may see are skipped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bc2exp.config.errors import UserError
from bc2exp.hardware import eager
from bc2exp.hardware.base import Ops
from bc2exp.hardware.determinism import be_deterministic
from bc2exp.hardware.probe import count_devices

SMALLEST_HEAD = 16
"""FlexAttention's kernels take no smaller head dimension."""

# Packed samples have a few fixed lengths: a kernel for each is faster than one for all.
_compiled = torch.compile(flex_attention, dynamic=False)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None, slopes: Tensor | None, scale: float
) -> Tensor:
    """See `base.Attention`."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if segment_ids is None and slopes is None:
        return _causal(q, k, v, scale)
    if num_queries == 1 or q.shape[-1] < SMALLEST_HEAD:
        # One query has one row of scores; a kernel compiled for every length of a cache would cost more.
        return eager.attention(q, k, v, segment_ids=segment_ids, slopes=slopes, scale=scale)
    offset = num_keys - num_queries
    out: Tensor = (_compiled if q.is_cuda else flex_attention)(
        q,
        k,
        v,
        score_mod=None if slopes is None else alibi(slopes, offset),
        block_mask=_block_mask(segment_ids, num_queries, num_keys, q.device),
        scale=scale,
    )
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention without segments and ALiBi, aligned at the bottom right."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if num_queries in (num_keys, 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1, scale=scale)
    # `is_causal` aligns at the top left: the first of these queries would see the first key only.
    bias: Any = causal_lower_right(num_queries, num_keys)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def alibi(slopes: Tensor, offset: int) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's score function: adds slope * (key - query position) to scores, which it has in fp32.

    Args:
        slopes: fp32 [N].
        offset: the position of the first query among the keys.
    """

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (key - query - offset)

    return score_mod


def visible(segment_ids: Tensor | None, offset: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function: causal, and within a segment where `segment_ids` [B, K] are given."""

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + offset

    if segment_ids is None:
        return causal

    def within_segment(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segment_ids[batch, query + offset] == segment_ids[batch, key]
        return causal(batch, head, query, key) & same

    return within_segment


class _LastMask:
    """The block mask of the ids asked about last, as every layer of a forward pass asks for the same."""

    def __init__(self) -> None:
        self._ids: Callable[[], Tensor | None] = lambda: None
        self._key: tuple[Any, ...] = ()
        self._mask: BlockMask | None = None

    def get(self, segment_ids: Tensor | None, num_queries: int, num_keys: int, device: Any) -> BlockMask:
        """The mask of these ids (the same tensor, unchanged) and lengths."""
        version = None if segment_ids is None else segment_ids._version
        key = (segment_ids is None, version, num_queries, num_keys, device)
        if self._mask is None or key != self._key or self._ids() is not segment_ids:
            batch = None if segment_ids is None else segment_ids.shape[0]
            function = visible(segment_ids, num_keys - num_queries)
            self._mask = create_block_mask(function, batch, None, num_queries, num_keys, device)
            self._key = key
            self._ids = (lambda: None) if segment_ids is None else weakref.ref(segment_ids)
        return self._mask


_block_mask = _LastMask().get


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `base.RmsNorm`; torch's own takes the mean of bf16 in fp32, too."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class CudaBackend:
    """See `base.Backend`."""

    name = "cuda"
    packages: tuple[str, ...] = ()
    collectives = "nccl"
    pins_memory = True
    # No fused answer of torch's own for the other two: they stay as their twins.
    ops: Ops = replace(eager.OPS, attention=attention, rms_norm=rms_norm)

    def device(self, local_rank: int) -> torch.device:
        """A GPU a rank, in the order of CUDA_VISIBLE_DEVICES."""
        return torch.device("cuda", local_rank)

    def setup(self, local_rank: int, num_local_ranks: int, *, deterministic: bool = False) -> None:
        """Take the rank's GPU, and let fp32 be fp32: neither TF32 nor sums in bf16.

        Raises UserError where this torch sees fewer GPUs than there are ranks.
        """
        seen = torch.cuda.device_count()
        if seen < num_local_ranks:
            raise UserError(
                f"hardware.backend=cuda: torch {torch.__version__} sees {seen} GPUs and {num_local_ranks} "
                "are asked for; a torch built for CUDA and a driver that is new enough for it are needed"
            )
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if deterministic:
            be_deterministic()

    def synchronize(self) -> None:
        """Wait for the rank's GPU."""
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """The most that torch's allocator has held on the rank's GPU, free blocks of its own included."""
        return torch.cuda.max_memory_reserved()

    def peak_allocated_bytes(self) -> int | None:
        """The most that tensors have taken of it."""
        return torch.cuda.max_memory_allocated()

    def total_memory_bytes(self) -> int | None:
        """Memory of the rank's GPU."""
        return torch.cuda.mem_get_info()[1]

    def free_memory_bytes(self) -> int | None:
        """What is left of it."""
        return torch.cuda.mem_get_info()[0]

    def device_name(self) -> str:
        """The card."""
        return torch.cuda.get_device_name()

    def runtime(self) -> dict[str, str]:
        """The CUDA that torch was built with."""
        return {"CUDA": torch.version.cuda or "missing"}

    def count(self) -> int | None:
        """GPUs that this process may use."""
        return count_devices(self.name)


BACKEND = CudaBackend()
