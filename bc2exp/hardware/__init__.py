"""Device backends: the one place where the kind of device decides anything.

Importing this package loads no torch, so that the parent process may ask `count_devices` cheaply.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from bc2exp.hardware.probe import KNOWN_BACKENDS, count_devices

if TYPE_CHECKING:
    from bc2exp.hardware.base import Backend, Ops

__all__ = ["HOST", "KNOWN_BACKENDS", "count_devices", "get_backend", "has_backend", "planning_ops"]

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


def has_backend(name: str) -> bool:
    """Whether there is a module that computes on devices of the kind `name`; it is not imported."""
    return importlib.util.find_spec(f"bc2exp.hardware.{name}") is not None


def planning_ops(name: str) -> Ops:
    """The operations of the backend `name` for tensors without storage: what they keep is what counts.

    The host's own are run as they are; of a device that may not be here, `planned` knows what they keep.
    """
    if name == HOST:
        return get_backend(HOST).ops
    from bc2exp.hardware.planned import OPS

    return OPS
