"""The folder of real data that some tests read and the project does not ship."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def shared_data(relative: str) -> Path:
    """`relative` in the folder BC2EXP_SHARED_DATA, else in ../shared/data; skips the test without it."""
    path = Path(os.environ.get("BC2EXP_SHARED_DATA", _DEFAULT)) / relative
    if not path.exists():
        pytest.skip(f"real data: {relative} is neither under BC2EXP_SHARED_DATA nor in ../shared/data")
    return path
