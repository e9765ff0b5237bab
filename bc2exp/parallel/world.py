"""The ranks of a run, seen from one of them. With one rank every exchange is a no-op."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from bc2exp.hardware import HOST, get_backend
from bc2exp.hardware.base import Backend

_BESIDE = "beside"
"""What the group between hosts is called."""


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

    @cached_property
    def host_group(self) -> dist.ProcessGroup | None:
        """A second connection of all ranks, between their hosts' memories; None where there is one rank.

        Whoever uses it, from any thread, is in nobody's way on the devices. Every rank must ask for it, as
        the first time makes it, and it carries one conversation at a time.
        """
        if self.size == 1:
            return None
        return dist.new_group(backend=get_backend(HOST).collectives, group_desc=_BESIDE)

    def join(self) -> None:
        """Meet the other ranks. torchrun's environment says where; a single rank meets itself, so that every
        rank is in a process group."""
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


def exchanges_begun() -> dict[str, int]:
    """How many exchanges this rank has begun in each group of ranks, by the group's name.

    Alike on all ranks of a group that have met. Of groups whose ranks send to one another, as the stages of a
    pipeline and the hosts do, nothing is said: there every rank has its own number. Any thread may ask at any
    time. Empty where a device's groups do not count.
    """
    if not dist.is_initialized():
        return {}
    try:
        # torch's own count, which it compares in its debug mode; it has no public name
        return {
            name: group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            for group, name in dict(distributed_c10d._world.pg_names).items()
            if not group.group_desc.endswith(("pipeline", _BESIDE))
        }
    except (AttributeError, RuntimeError):  # not counted there, or this rank is just leaving
        return {}
