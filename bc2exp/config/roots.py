"""Where conf/ and experiments/ lie: in a checkout beside the package, in a wheel inside it."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def data_root() -> Path:
    """The folder that holds `conf` and `experiments` of this installation (checkout, editable, wheel)."""
    return PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def checkout() -> Path | None:
    """The source checkout this package runs from, or None for an installed wheel."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "conf").is_dir() else None
