"""Long work on the host tells the journal how far it is."""

from __future__ import annotations

import time
from typing import Any, Protocol

from bc2exp.tracking.journal import Journal, NullJournal

_SECONDS_BETWEEN_RECORDS = 0.5


class _Progress(Protocol):
    @property
    def stage(self) -> str: ...

    def _asdict(self) -> dict[str, Any]: ...


class Told:
    """Tells the journal how far a work is, as events of this name, a few times a second at most."""

    def __init__(self, journal: Journal | NullJournal, event: str) -> None:
        self._journal, self._event = journal, event
        self._last = 0.0
        self._stage = ""

    def __call__(self, progress: _Progress) -> None:
        if progress.stage != self._stage or time.monotonic() - self._last >= _SECONDS_BETWEEN_RECORDS:
            self._last, self._stage = time.monotonic(), progress.stage
            self._journal.event(self._event, **progress._asdict())
