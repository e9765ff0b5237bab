"""The complete list of questions the rest of the house may ask of a device backend.

Legend for the shapes below: B batch, N heads on this rank, S query positions, K key positions
(K = S, or K > S when keys of earlier calls come from a cache), D head dimension, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Attention(Protocol):
    """Causal softmax attention over explicit positions, never over a ready mask or bias."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        segment_ids: Tensor | None,
        slopes: Tensor | None,
        scale: float,
    ) -> Tensor:
        """softmax(scale * q k^T + bias) v, of shape [B, N, S, D] and in q's type.

        q is [B, N, S, D]; k and v are [B, N, K, D] with K >= S, aligned at the bottom right: query s
        stands at key position K - S + s and sees no later key. `segment_ids` [B, K] (integers) lets a
        query see keys of its own id only; id 0 marks padding, which sees padding, so that no row is
        empty. `slopes` [N] (fp32) adds the ALiBi bias slope * (key position - query position), which
        is computed and added in fp32 whatever q's type. The softmax is in fp32.
        """
        ...


class RmsNorm(Protocol):
    """Root mean square normalisation of the last dim."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps) of x [..., H] and weight [H]; the mean is taken in fp32."""
        ...


class SwiGlu(Protocol):
    """The gated activation of the feed-forward block."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up for two tensors of one shape."""
        ...


class Rotary(Protocol):
    """Rotary position embedding, half rotation (the layout of Llama and Baichuan2)."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x * cos + concat(-x2, x1) * sin, where x1, x2 are the halves of x [B, N, S, D]'s last dim.

        cos and sin are fp32 [B or 1, 1, S, D]; the product is computed in fp32 and cast to x's type.
        """
        ...


class Exponentials(Protocol):
    """What softmax does to the logits of a chunk of positions, and its gradient needs of them."""

    def __call__(self, products: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """Sums of exp(scale * products - shift) over the last dim, fp32 [C], of products [C, V].

        In their place, and in their type, come scale * exp(scale * products - shift). scale is fp32 [V],
        shift fp32 [C], nothing by default. All is computed in fp32.
        """
        ...


@dataclass(frozen=True)
class Ops:
    """The operations a model asks of its device; each fused answer has a twin in `eager`.

    `head_block_words`: words of the vocabulary whose logits, of a chunk of positions, are worked on at once.
    `sparse_gradients`: whether the device has sparse tensors, for the gradient of an embedding.
    """

    attention: Attention
    rms_norm: RmsNorm
    swiglu: SwiGlu
    rotary: Rotary
    exponentials: Exponentials
    head_block_words: int
    sparse_gradients: bool


class Backend(Protocol):
    """One kind of device. `get_backend(name)` returns the instance."""

    @property
    def name(self) -> str:
        """The name that `get_backend` knows it by."""
        ...

    @property
    def ops(self) -> Ops:
        """The operations of this device."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages beside torch that it needs, as they are installed."""
        ...

    @property
    def collectives(self) -> str:
        """Name of the torch.distributed backend that joins several such devices."""
        ...

    @property
    def pins_memory(self) -> bool:
        """Whether copies to the host are faster into memory of it that is locked to its place."""
        ...

    def device(self, local_rank: int) -> torch.device:
        """The device of the rank `local_rank` of this host."""
        ...

    def setup(self, local_rank: int, num_local_ranks: int, *, deterministic: bool = False) -> None:
        """Prepare this process to be rank `local_rank` of `num_local_ranks` on this host; call once.

        `deterministic`: the same input gives the same bits every time, or an error names what cannot.
        """
        ...

    def synchronize(self) -> None:
        """Wait until all work queued on this rank's device is done (before reading a clock)."""
        ...

    def peak_memory_bytes(self) -> int:
        """The largest amount of memory, in bytes, that this rank has held so far."""
        ...

    def peak_allocated_bytes(self) -> int | None:
        """The part of it that tensors took at one time; None where no allocator of the device counts."""
        ...

    def total_memory_bytes(self) -> int | None:
        """Memory of this rank's device; None where ranks have no memory of their own."""
        ...

    def free_memory_bytes(self) -> int | None:
        """What of it nobody has taken, this process and others; None as above."""
        ...

    def device_name(self) -> str:
        """What kind of device this rank has, as its driver says it."""
        ...

    def runtime(self) -> dict[str, str]:
        """Versions of what lies between torch and the device, by name."""
        ...

    def count(self) -> int | None:
        """Devices present on this host, None for no limit; the same answer as `count_devices(name)`."""
        ...
