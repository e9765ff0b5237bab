"""A person's wish to stop: Ctrl-C, a closed terminal, the batch system's warning.

The first asks the ranks to save and end at the next step; the second ends them at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequests:
    """How often stopping was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Count requests to stop instead of dying of them, while the block runs."""
    requests = StopRequests()
    before = {number: signal.signal(number, requests._heard) for number in _SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
