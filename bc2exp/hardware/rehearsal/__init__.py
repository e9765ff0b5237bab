"""The real torch_npu on a machine without an NPU: a rehearsal of a run.

CANN's runtime and HCCL are replaced by host memory and shared memory (the C files in `native`), and the
kernels by CPU kernels that work on this memory (`host_kernels`, `fused_kernels`). All of torch_npu in
between is the real one: dispatch, autograd formulas, allocator, process groups, DTensor rules.

    from bc2exp.hardware import rehearsal
    rehearsal.activate(num_devices=8, memory_bytes=64 * 2**30)    # before anything imports torch
    import torch
    torch.ones(2, device="npu:7") + 1

It shows that a program is correct PyTorch for these devices, and what memory its tensors take. It says
nothing of an NPU's numerics and speed. What is not covered is refused by name. Loads no torch at import.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from bc2exp.hardware.rehearsal.record import LABEL, clear, merge, write_rank

__all__ = [
    "DEFAULTS",
    "ENVIRONMENT",
    "LABEL",
    "MEMORY_GIB",
    "activate",
    "clear",
    "is_active",
    "leave_count",
    "merge",
    "prepare",
    "snapshot",
]

MEMORY_GIB = 64
"""Memory of a device whose hardware file names none."""

ENVIRONMENT = {
    # With a task queue torch_npu launches from a second thread, which host kernels would race with.
    "TASK_QUEUE_ENABLE": "0",
    # torch would load torch_npu in the midst of its own import, before there are host kernels.
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}
"""What holds in a rehearsal, whatever is set."""
DEFAULTS = {
    # The kernels are CPU kernels of processes that share few cores: one thread each, idle ones do not spin.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What holds where nothing else is set."""

_libraries: list[ctypes.CDLL] = []
_installed = False


def is_active() -> bool:
    """Whether the devices of this process are host memory."""
    return bool(_libraries)


def activate(num_devices: int = 8, memory_bytes: int = MEMORY_GIB * 2**30) -> None:
    """Load the libraries under the names of CANN's, import torch and torch_npu, and give them host kernels.

    A second call changes nothing.

    Args:
        num_devices: devices of this machine, at most 64.
        memory_bytes: memory of each device and process, in bytes; beyond it allocations fail as on a device.
            Pages that are never written cost the host nothing.

    Raises:
        UserError: torch_npu or a C compiler is missing, or torch and torch_npu do not pair.
        RuntimeError: torch has been imported already.
    """
    _preload(num_devices, memory_bytes)
    _install()


def _preload(num_devices: int, memory_bytes: int) -> None:
    if _libraries:
        return
    if "torch" in sys.modules:
        raise RuntimeError("a rehearsal must be activated before torch is imported")
    from bc2exp.hardware.rehearsal.build import libraries

    paths = libraries()
    os.environ["BC2EXP_REHEARSAL_DEVICES"] = str(num_devices)
    os.environ["BC2EXP_REHEARSAL_BYTES"] = str(memory_bytes)
    os.environ.update({**DEFAULTS, **os.environ, **ENVIRONMENT})
    _libraries.extend(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths)


def _install() -> None:
    global _installed
    if _installed:
        return
    import torch_npu

    from bc2exp.hardware.rehearsal import fused_kernels, host_kernels

    host_kernels.install()
    fused_kernels.install()
    name_of = torch_npu.npu.get_device_name
    torch_npu.npu.get_device_name = lambda device=None: f"{name_of(device)} (rehearsal on host memory)"
    _installed = True


def prepare() -> None:
    """Compile what `activate` loads, so that the ranks of a run need not. Takes seconds once, then nothing.

    Raises UserError as `activate` does.
    """
    from bc2exp.hardware.rehearsal.build import libraries

    libraries()


def snapshot() -> dict[str, Any]:
    """What this process asked of its devices so far; see `census.snapshot`."""
    from bc2exp.hardware.rehearsal import census

    return census.snapshot(_libraries[0])


def leave_count(folder: Path, rank: int) -> None:
    """Leave in the run folder what this rank asked of its devices; nothing where no rehearsal is active."""
    if _installed:
        write_rank(folder, rank, snapshot())
