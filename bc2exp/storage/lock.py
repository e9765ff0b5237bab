"""A lock on a file, known to all processes of a machine and gone with the process that holds it.

`flock` and not a file that is created and removed: the kernel lets go when the holder dies, kill -9 included,
so that a lock never outlives its owner. The file itself stays; only the lock on it says anything.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

# `is_held` takes the lock for some microseconds to learn whether it is free. One refusal may therefore be
# such a question; an owner still refuses after this long.
_QUESTION_SECONDS = 0.1


class LockHeld(OSError):
    """Somebody else holds the lock."""


class Lock:
    """A lock that is held. Released by `release()`, at the end of a `with`, or by the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(path: str | os.PathLike[str], wait_seconds: float = 0.0) -> Lock:
    """Take the exclusive lock on `path`, creating the file where there is none (not its folder).

    Tries for `wait_seconds`, then raises LockHeld. A second `hold` in the same process is refused as well.
    Started programs do not inherit the lock; forked ones without an exec do.
    """
    path = Path(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + max(wait_seconds, _QUESTION_SECONDS)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Lock(path, descriptor)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise LockHeld(f"{path} is held by another process") from None
            time.sleep(0.01)


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether anybody, this process included, holds the lock on `path`. False where there is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who ask at the same time do not take each other for an owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
