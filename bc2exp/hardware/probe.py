"""How many devices this host has, answered without importing torch.

The parent process refuses an impossible run before it pays for a torch import, so every probe here
reads the operating system only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from bc2exp.hardware import npu_environment
from bc2exp.hardware.rehearsal import DEFAULTS, ENVIRONMENT


def _count_cpu() -> int | None:
    # Several ranks may share one core: slow, but right, and how every layout is tested on a laptop.
    return None


def _count_cuda(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int | None:
    """GPUs of NVIDIA's driver that CUDA_VISIBLE_DEVICES leaves; of slices (MIG), those it names."""
    # A container may see the driver's list of all cards, but has the device files of its own.
    cards = len([file for file in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", file.name)])
    cards = cards or len(list(root.glob("proc/driver/nvidia/gpus/*")))
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not cards:
        return cards
    count = 0
    for name in map(str.strip, chosen.split(",")):
        number = int(name) if re.fullmatch(r"\d+", name) else None
        # The driver ends the list at the first name that it does not know, such as -1.
        if not (name.startswith(("GPU-", "MIG-")) if number is None else number < cards):
            break
        count += 1
    return count


def _count_npu(root: Path = Path("/")) -> int | None:
    """NPUs that the driver shows to this machine or container."""
    return len([file for file in root.glob("dev/davinci*") if re.fullmatch(r"davinci\d+", file.name)])


_PROBES: dict[str, Callable[[], int | None]] = {"cpu": _count_cpu, "cuda": _count_cuda, "npu": _count_npu}

KNOWN_BACKENDS: tuple[str, ...] = tuple(_PROBES)
"""Names of the backends; each has a module of that name in this package holding a `BACKEND`."""


def count_devices(backend: str) -> int | None:
    """Number of devices present for `backend`; None where there is no limit on ranks a host.

    Raises ValueError, naming the known backends, for an unknown name.
    """
    if backend not in _PROBES:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(KNOWN_BACKENDS)}")
    return _PROBES[backend]()


def rank_environment(
    backend: str,
    num_ranks: int,
    interface: str | None = None,
    *,
    deterministic: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Environment variables for each of `num_ranks` ranks of a host, as they will hold.

    What the person has set in `environment` comes first.
    `interface` is the network interface that leads to the other hosts of the run, where there are any.
    """
    if backend == "npu":
        return npu_environment.variables(environment, interface=interface, deterministic=deterministic)
    wanted = _wanted(backend, num_ranks, interface, deterministic)
    if "OMP_WAIT_POLICY" in environment:
        wanted.pop("GOMP_SPINCOUNT", None)  # it would overrule that
    return {name: environment.get(name, value) for name, value in wanted.items()}


def _wanted(backend: str, num_ranks: int, interface: str | None, deterministic: bool) -> dict[str, str]:
    if backend == "cuda":
        # Without a workspace of its own for each stream cuBLAS sums in any order.
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {}
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": _SPINS, "GLIBC_TUNABLES": _KEEP_MEMORY}
    if num_ranks > 1:
        environment["OMP_NUM_THREADS"] = "1"
    if interface is not None:
        # Left alone, gloo takes the address that the host's own name has, often the loopback's.
        environment["GLOO_SOCKET_IFNAME"] = interface
    return environment


_SPINS = "10000"
"""How often an idle thread of GNU OpenMP looks for work before it sleeps.

By default it spins so long that with several processes on few cores idle threads keep the busy ones out. If
it sleeps at once, as the policy alone says, each short operation waits for it to wake: the loss of 4,096
positions took 1.9 s in place of 1.45 on two cores. 3,000 and 20,000 were as fast as the default.
"""
_KEEP_MEMORY = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.trim_threshold={2**34}",
        f"glibc.malloc.mmap_threshold={2**34}",
    )
)
"""glibc gives freed tensors back to the system at once, and takes them anew page by page, zeroed: a third of
a training step on a virtual machine. So it keeps what is freed, however large (kept up to 64 MiB only, the
460 million parameters of benchmarks/train_step.py took 4.3 s a step in place of 3.6, and 2 % less memory),
and takes large pages. Others ignore this."""

_OF_DEVICES = {
    "cpu": ("OMP_", "GOMP_", "GLOO_", "MKL_", "KMP_", "GLIBC_", "MALLOC_"),
    "cuda": ("CUDA_", "NCCL_", "TORCH_NCCL_", "CUBLAS_", "PYTORCH_"),
    "npu": (
        *("ASCEND_", "HCCL_", "LCCL_", "TORCH_HCCL_", "P2P_HCCL_", "TORCH_NPU_", "PYTORCH_"),
        *("TASK_QUEUE_", "CPU_AFFINITY_", "INF_NAN_", "MULTI_STREAM_"),
    ),
}
"""How names of variables begin that change what a backend does."""


def recorded_environment(
    backend: str,
    num_ranks: int,
    *,
    deterministic: bool = False,
    rehearsal: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Variables that hold in a rank and change what its device does: those set for it, the person's own."""
    wanted = rank_environment(backend, num_ranks, deterministic=deterministic, environment=environment)
    own = {name: text for name, text in environment.items() if name.startswith(_OF_DEVICES[backend])}
    played: tuple[Mapping[str, str], Mapping[str, str]] = (DEFAULTS, ENVIRONMENT) if rehearsal else ({}, {})
    return dict(sorted({**played[0], **wanted, **own, **played[1]}.items()))


def environment_problems(
    backend: str, *, rehearsal: bool = False, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """What of packages and environment keeps a run on `backend` from beginning here, a sentence each."""
    if backend == "npu":
        return list(npu_environment.problems(environment, rehearsal=rehearsal))
    return []
