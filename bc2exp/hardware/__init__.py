"""Device backends: the one place where the kind of device decides anything.

Importing this package loads no torch, so that the parent process may ask `count_devices` cheaply.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from bc2exp.hardware import rehearsal
from bc2exp.hardware.probe import KNOWN_BACKENDS, count_devices, environment_problems

if TYPE_CHECKING:
    from bc2exp.hardware.base import Backend, Ops

__all__ = [
    "HOST",
    "KNOWN_BACKENDS",
    "count_devices",
    "environment_problems",
    "get_backend",
    "planning_constant",
    "planning_ops",
    "rehearsal",
]

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


def planning_ops(name: str) -> Ops:
    """The operations of the backend `name` for tensors without storage: what they keep is what counts.

    The host's own are run as they are; of a device that may not be here, `planned` knows what they keep.
    """
    if name == HOST:
        return get_backend(HOST).ops
    from bc2exp.hardware.planned import OPS

    return OPS


def planning_constant(name: str, twins: Collection[str] = ()) -> int:
    """Bytes that the operations of the backend `name` keep from the first pass on, whatever the model.

    `twins` are those that run as their eager twins.
    """
    from bc2exp.hardware.planned import CONSTANT_BYTES

    return 0 if "attention" in twins else CONSTANT_BYTES.get(name, 0)
