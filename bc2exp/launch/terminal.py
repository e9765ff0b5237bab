"""The person at the terminal, who may ask the run to stop, or leave while it goes on.

Ctrl-C, a closed window, the batch system's warning: the first asks the ranks to save and to end at the next
step, the second ends them at once.

Whoever reads what is printed, a window or `| head`, can be gone at any moment: no write may then end a
training of days, so the first that fails turns the rest to nowhere.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from bc2exp.tracking.signals import REQUESTS

_ECHO_SECONDS = 0.5
"""One request may be several signals: SIGHUP behind SIGTERM, or the same again from a program between."""


class StopRequests:
    """How often stopping was asked for. Whoever listens around a block hears what is heard in it."""

    def __init__(self) -> None:
        self.count = 0
        self._last = -_ECHO_SECONDS
        self._around: StopRequests | None = None

    def _heard(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= _ECHO_SECONDS:
            self.count += 1
            self._last = now
        if self._around is not None:
            self._around._heard(number, frame)


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Count requests to stop instead of dying of them, while the block runs."""
    requests = StopRequests()
    heard_by = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    requests._around = heard_by if isinstance(heard_by, StopRequests) else None
    asking = [number for number in REQUESTS if number != signal.SIGHUP or not _under_nohup()]
    before = {number: signal.signal(number, requests._heard) for number in asking}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _under_nohup() -> bool:
    """Whether whoever started the command wants it to outlive the terminal."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@contextmanager
def lasting_screen() -> Iterator[None]:
    """Within the block, printing never fails because a terminal or a pipe was closed."""
    streams = sys.stdout, sys.stderr
    # A stream that was closed before we started is None, and print() knows that.
    sys.stdout, sys.stderr = (stream and _Screen(stream) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams


class _Screen:
    """A text stream that drops what nobody reads any more; in all else the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._turn_away()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._turn_away()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _turn_away(self) -> None:
        # The descriptor and not only this object: what the stream still buffers is written at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
