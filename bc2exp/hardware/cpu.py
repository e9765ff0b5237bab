"""The CPU backend, and what of a model a CPU does in fewer passes than the eager twins."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch
from torch import Tensor

from bc2exp.hardware import cpu_pointwise, eager
from bc2exp.hardware.base import Ops
from bc2exp.hardware.cpu_attention import attention
from bc2exp.hardware.determinism import be_deterministic
from bc2exp.hardware.probe import count_devices

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
