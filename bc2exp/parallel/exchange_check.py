"""Collectives of a run's groups: are they right, and how fast?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bc2exp.config.parallelism import AXES
from bc2exp.parallel.mesh import Mesh

_ROUNDS = 5


class Measured(NamedTuple):
    """One collective of one group.

    Attributes:
        name: axis and collective.
        ranks: that took part.
        passed: whether the values are right.
        gb_s: GB/s that left a rank, ring counting; the median of some rounds. None where it was not timed.
    """

    name: str
    ranks: int
    passed: bool
    gb_s: float | None


def measure(mesh: Mesh, num_elements: int, *, timed: bool = True) -> list[Measured]:
    """Every collective of training on every axis of the mesh with more than one rank; all ranks must call it.

    `num_elements` of fp32 a rank, a multiple of the number of ranks. `timed`: say how fast they are, which
    nobody knows where the devices are played.
    """
    found = []
    for axis in AXES:
        if getattr(mesh, axis) > 1 and axis != "pipeline":
            group = mesh.group(axis)
            found += [
                _measure(f"{axis}, {name}", mesh, group, num_elements, do, timed)
                for name, do in _KINDS.items()
            ]
    return found


def _all_reduce(group: dist.ProcessGroup, given: Tensor) -> tuple[bool, float]:
    size, rank = group.size(), dist.get_rank(group)
    total = given + rank
    dist.all_reduce(total, group=group)
    expected = size * given + size * (size - 1) / 2
    return torch.equal(total, expected), 2 * (size - 1) / size


def _all_gather(group: dist.ProcessGroup, given: Tensor) -> tuple[bool, float]:
    size, rank = group.size(), dist.get_rank(group)
    whole = given.new_empty(size * given.numel())
    dist.all_gather_into_tensor(whole, given + rank, group=group)
    expected = given.repeat(size) + torch.arange(size, device=given.device).repeat_interleave(given.numel())
    return torch.equal(whole, expected), size - 1


def _reduce_scatter(group: dist.ProcessGroup, given: Tensor) -> tuple[bool, float]:
    size, rank = group.size(), dist.get_rank(group)
    part = given.new_empty(given.numel() // size)
    dist.reduce_scatter_tensor(part, given + rank, group=group)
    mine = given.view(size, -1)[rank]
    return torch.equal(part, size * mine + size * (size - 1) / 2), (size - 1) / size


_KINDS: dict[str, Callable[[dist.ProcessGroup, Tensor], tuple[bool, float]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
}


def _measure(
    name: str,
    mesh: Mesh,
    group: dist.ProcessGroup,
    num_elements: int,
    do: Callable[[dist.ProcessGroup, Tensor], tuple[bool, float]],
    timed: bool,
) -> Measured:
    # small whole numbers: their sums are exact in any order
    given = torch.arange(num_elements, device=mesh.world.device, dtype=torch.float32) % 1000
    passed, factor = do(group, given)
    seconds = []
    for _ in range(_ROUNDS if timed else 1):
        mesh.world.backend.synchronize()
        begin = time.perf_counter()
        right, _ = do(group, given)
        mesh.world.backend.synchronize()
        seconds.append(time.perf_counter() - begin)
        passed = passed and right
    rate = factor * given.numel() * given.element_size() / sorted(seconds)[len(seconds) // 2] / 1e9
    return Measured(name, group.size(), all(mesh.world.gather(passed)), rate if timed else None)
