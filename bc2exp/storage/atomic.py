"""Files and folders that are either there whole or not there at all.

Everything is written under a temporary name beside its target, brought to the disk (`fsync`), and renamed.
A rename inside one folder is atomic on POSIX; the folder is brought to the disk after it, because a power
cut may otherwise forget the new name while it keeps the data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace `path` by `data`. Readers see the old content or the new one, never a part.

    Raises OSError as `open` does; then the old content is untouched and no temporary file remains.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text`, encoded as UTF-8. See `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace `path` by `value` as indented JSON. See `write_bytes`.

    Raises ValueError for NaN and infinities (JSON has none) and TypeError for what JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: str | os.PathLike[str]) -> None:
    """Bring one file, or the list of names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(temporary: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Give the finished folder `temporary` its name `final`, with every byte on the disk before.

    Both must lie on one file system, and `final` must not exist: FileExistsError otherwise, with `temporary`
    left as it is.
    """
    temporary, final = Path(temporary), Path(final)
    # rename() silently replaces an EMPTY folder, and a published folder is never to be replaced.
    if os.path.lexists(final):
        raise FileExistsError(f"{final} exists already")
    for parent, _, files in os.walk(temporary, topdown=False):
        for name in files:
            sync(os.path.join(parent, name))
        sync(parent)
    os.rename(temporary, final)
    sync(final.parent)
