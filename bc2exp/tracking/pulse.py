"""Signs of life: what a rank says of itself every second, and at every change, to the parent of the run.

The way is the socket that is the rank's standard input (`launch.ranks`): no file that a slow disk could keep,
nothing to clean up. A thread of its own speaks, so that a rank that computes or waits speaks, too. A rank
that is stopped cannot, nor one whose interpreter is held by a call that does not let go of it.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BEAT_SECONDS = 1.0
"""How often a rank says that it lives."""


class Pulse:
    """The signs of life of this process, from `begin` to `end`. It never waits, and never fails.

    Args:
        descriptor: of the socket; where it is of anything else, nothing is said.
        rank: of this process.
        mark: what to say of it, as JSON holds it; called by a thread of its own, too.
    """

    def __init__(self, descriptor: int, rank: int, mark: Callable[[], dict[str, Any]]) -> None:
        self._mark = mark
        self._who = {"rank": rank, "pid": os.getpid()}
        self._over = threading.Event()
        self._way: socket.socket | None = None
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            self._way = socket.socket(fileno=os.dup(descriptor))

    def begin(self) -> None:
        """Say it from now on."""
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def end(self) -> None:
        """Say that this process ends by itself: its silence means nothing."""
        self._over.set()
        self._send(ended=True)

    def say(self) -> None:
        """Say it now, from any thread: a change that a second's wait might keep for ever."""
        self._send(**self._mark())

    def _beat(self) -> None:
        while not self._over.is_set():
            self.say()
            self._over.wait(BEAT_SECONDS)

    def _send(self, **what: Any) -> None:
        if self._way is None:
            return
        line = json.dumps({**self._who, **what}).encode() + b"\n"
        with suppress(OSError):  # the parent is suspended and hears later ones, or is gone
            self._way.send(line, socket.MSG_DONTWAIT)


class Listener:
    """The other end: what the ranks of a machine have said since it was last asked."""

    def __init__(self, way: socket.socket) -> None:
        self._way = way
        self._heard = b""
        way.setblocking(False)

    def hear(self) -> list[dict[str, Any]]:
        """The signs that have come, the oldest first."""
        while True:
            try:
                data = self._way.recv(1 << 16)
            except OSError:
                break  # there is no more, or nobody is left
            if not data:
                break
            self._heard += data
        *lines, self._heard = self._heard.split(b"\n")
        return [sign for line in lines if (sign := _read(line)) is not None]


def _read(line: bytes) -> dict[str, Any] | None:
    """A sign; None for a line that a full buffer has cut."""
    try:
        sign = json.loads(line)
    except ValueError:
        return None
    return sign if isinstance(sign, dict) and "rank" in sign else None
