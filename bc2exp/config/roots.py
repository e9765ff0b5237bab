"""Where files lie: conf/ and experiments/ (beside the package or, in a wheel, inside it) and a user's own."""

from __future__ import annotations

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
    """A path as a person writes it, made absolute: `~` is the home folder, the rest counts from `folder`."""
    return Path(os.path.realpath(folder / os.path.expanduser(path)))
