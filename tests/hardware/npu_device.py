"""NPUs for tests: those of a rehearsal, in an environment with torch_npu."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from bc2exp.hardware import rehearsal


def require() -> None:
    """Give this process npu devices, or skip the module that asks. Call it before torch is imported."""
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("needs an environment with torch_npu", allow_module_level=True)
    if "torch" in sys.modules and not rehearsal.is_active():
        pytest.skip(
            "needs a process of its own, as torch is loaded: python -m pytest tests/hardware/test_npu*.py",
            allow_module_level=True,
        )
    rehearsal.activate()
