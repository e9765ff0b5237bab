"""How many devices this host has, answered without importing torch.

The parent process refuses an impossible run before it pays for a torch import, so every probe here
reads the operating system only.
"""

from __future__ import annotations

from collections.abc import Callable


def _count_cpu() -> int | None:
    # Several ranks may share one core: slow, but right, and how every layout is tested on a laptop.
    return None


_PROBES: dict[str, Callable[[], int | None]] = {"cpu": _count_cpu}

KNOWN_BACKENDS: tuple[str, ...] = tuple(_PROBES)
"""Names of the backends; each has a module of that name in this package holding a `BACKEND`."""


def count_devices(backend: str) -> int | None:
    """Number of devices present for `backend`; None where there is no limit on ranks a host.

    Raises ValueError, naming the known backends, for an unknown name.
    """
    if backend not in _PROBES:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(KNOWN_BACKENDS)}")
    return _PROBES[backend]()


def rank_environment(backend: str, num_ranks: int) -> dict[str, str]:
    """Environment variables for each of `num_ranks` ranks of a host; what the person has set comes first."""
    if backend != "cpu":
        return {}
    # OpenMP's idle threads spin by default: with several processes on few cores they keep the busy ones out.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    if num_ranks > 1:
        environment["OMP_NUM_THREADS"] = "1"
    return environment
