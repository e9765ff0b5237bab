"""Device backends: the one place where the kind of device decides anything.

Importing this package loads no torch, so that the parent process may ask `count_devices` cheaply.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bc2exp.hardware.probe import KNOWN_BACKENDS, count_devices

if TYPE_CHECKING:
    from bc2exp.hardware.base import Backend

__all__ = ["HOST", "KNOWN_BACKENDS", "count_devices", "get_backend"]

HOST = "cpu"
"""The backend of tasks that need no device: every machine has it."""


def get_backend(name: str) -> Backend:
    """The backend called `name`; its module, and torch with it, is imported only here.

    Raises ValueError, naming the known backends, for any other name.
    """
    if name not in KNOWN_BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(KNOWN_BACKENDS)}")
    backend: Backend = importlib.import_module(f"bc2exp.hardware.{name}").BACKEND
    return backend
