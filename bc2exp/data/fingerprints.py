"""sha256 of files that are too large to be read at every start.

A digest is remembered with the size and the times of its file; whoever changes a file changes one of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bc2exp.config.errors import UserError
from bc2exp.data.rows import printable
from bc2exp.storage import atomic, lock

_FILE = "fingerprints.json"
_BUFFER_BYTES = 2**20
# What is hashed is written down after so many bytes, so that a kill costs no more.
_SAVE_BYTES = 2**30
# Two writes within one tick of a file system's clock leave the same time: what was written a moment ago may
# be written again without a trace, and is not remembered. git calls such entries racy.
_RACY_NS = 2 * 10**9


class Stamp(NamedTuple):
    """What tells an edited file: its size in bytes, and when it was last written and changed, in ns."""

    size: int
    mtime_ns: int
    ctime_ns: int


def stamp(path: Path) -> Stamp:
    """The stamp of a file now. Raises UserError where it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"dataset.path={path}: cannot be read: {error.strerror}") from None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def fingerprints(
    files: Sequence[Path], cache: Path, count: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """The sha256 of each file, hexadecimal, from the memory in the folder `cache` where their stamps fit.

    Processes that miss one read files in turn, so that those who start together read each file once.

    Args:
        files: the files.
        cache: the folder that holds the memory.
        count: is told the number of bytes that are done, as they are read or found remembered.

    Raises:
        UserError: a file cannot be read.
    """
    known = _load(cache)
    if all(_remembered(known, path) for path in files):
        count(sum(stamp(path).size for path in files))
        return [known[_name(path)][-1] for path in files]
    with lock.hold(cache / f"{_FILE}.lock", wait_seconds=float("inf")):
        for leftover in cache.glob(f".{_FILE}.*.tmp"):
            leftover.unlink()
        known = _load(cache)
        digests, unsaved = [], 0
        for path in files:
            before = stamp(path)
            digest = _remembered(known, path)
            if digest is None:
                digest = _hash(path, count)
                unsaved += before.size
                if time.time_ns() - before.mtime_ns > _RACY_NS and stamp(path) == before:
                    known[_name(path)] = [*before, digest]
            else:
                count(before.size)
            digests.append(digest)
            if unsaved > _SAVE_BYTES:
                atomic.write_json(cache / _FILE, known)
                unsaved = 0
        atomic.write_json(cache / _FILE, known)
    return digests


def _remembered(known: dict[str, list], path: Path) -> str | None:
    entry = known.get(_name(path))
    return entry[-1] if entry and entry[:-1] == list(stamp(path)) else None


def _name(path: Path) -> str:
    return printable(Path(os.path.abspath(path)))


def _load(cache: Path) -> dict[str, list]:
    try:
        known = json.loads((cache / _FILE).read_bytes())
    except (OSError, ValueError):
        # a memory that is lost costs a reading of the files and nothing else
        return {}
    return known if isinstance(known, dict) else {}


def _hash(path: Path, count: Callable[[int], None]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_BUFFER_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
                count(size)
    except OSError as error:
        raise UserError(f"dataset.path={path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
