"""Processes that die between any two steps on the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def dies_at(step: int, work: Callable[[], object]) -> bool:
    """Do `work` in a forked process that dies (kill -9) in place of its step number `step` on the disk.

    Steps count from 0. Returns whether it died; False where `work` has fewer steps and came to its end.
    """
    if (child := os.fork()) == 0:
        try:
            _die_at(step)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _die_at(step: int) -> None:
    left = [step]
    for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
        original = getattr(os, name)

        def call(*args: Any, original: Any = original, **options: Any) -> Any:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return original(*args, **options)

        setattr(os, name, call)
