"""Memory that stays, where taking it anew in every step would leave holes.

An allocator that moves nothing, as that of a CPU's tensors, lays short-lived tensors between those that are
kept for the backward pass; what is free then lies in pieces, too small for the next.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Room:
    """Memory for one tensor at a time."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor without values; the one before is no longer good for anything."""
        memory, size = self.memory, shape.numel()
        if memory is None or memory.numel() < size or (memory.dtype, memory.device) != (dtype, device):
            self.memory = memory = None  # freed before its successor is made
            self.memory = memory = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)
