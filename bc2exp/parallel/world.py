"""The ranks of a run, seen from one of them. With one rank every exchange is a no-op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bc2exp.hardware.base import Backend


@dataclass(frozen=True)
class World:
    """This rank among all.

    Attributes:
        rank: from 0; rank 0 keeps the journal.
        size: ranks of the run.
        local_rank: this rank's number on its machine.
        local_size: ranks on this machine.
        backend: what the ranks compute on.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    backend: Backend

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
        return self.backend.device(self.local_rank)

    def join(self) -> None:
        """Meet the other ranks. torchrun's environment says where; a single rank meets itself, because
        the mixed precision of `shard` needs a process group of any size."""
        if self.size > 1:
            dist.init_process_group(self.backend.collectives)
        else:
            store = dist.HashStore()
            dist.init_process_group(self.backend.collectives, store=store, rank=0, world_size=1)

    def leave(self) -> None:
        """End the exchange with the other ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A small Python value of every rank, by rank. Only plain data of our own passes here."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
