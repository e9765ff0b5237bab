"""Where files lie: conf/ and experiments/ (beside the package or, in a wheel, inside it) and a user's own."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def data_root() -> Path:
    """The folder that holds `conf` and `experiments` of this installation (checkout, editable, wheel)."""
    return PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def checkout() -> Path | None:
    """The source checkout this package runs from, or None for an installed wheel."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "conf").is_dir() else None


def absolute(path: str, folder: Path) -> Path:
    """A path as a person writes it, made absolute: `~` is the home folder, the rest counts from `folder`.

    Links on the way are followed, the last name stays: a cache of downloads links `train.parquet` to a file
    whose name says nothing.
    """
    full = folder / os.path.expanduser(path)
    if full.name == "..":
        return Path(os.path.realpath(full))
    return Path(os.path.realpath(full.parent)) / full.name


def nearest(path: Path) -> str:
    """`; nearest: x` with the file of the same folder whose name is most alike, where there is one."""
    if not os.path.isdir(path.parent):
        return f"; the folder {path.parent} does not exist"
    beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; nearest: {path.parent / near[0]}" if near else ""
