"""Processes of this machine, as the kernel tells of them (/proc; elsewhere nothing is known)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def state(pid: int) -> str | None:
    """The letter of a process's state: `T` stopped, `D` held in the kernel, `Z` ended; None where unknown."""
    fields = _fields(_PROC / str(pid))
    return fields[0] if fields else None


def alive(pid: int) -> bool:
    """Whether a process has not ended. One that nobody has asked for its exit code yet has."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return state(pid) != "Z"


def below(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have, while it lives."""
    parents = {
        int(entry.name): int(fields[1])
        for entry in (_PROC.iterdir() if _PROC.is_dir() else ())
        if entry.name.isdigit() and (fields := _fields(entry))
    }
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def kill(pids: Iterable[int]) -> None:
    """End processes now, stopped ones, too."""
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)


def _fields(entry: Path) -> list[str]:
    """State, parent and the rest of what `stat` says; empty where the process is gone."""
    try:
        return (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
