"""What passes between the terminal and the ranks that answer: two kinds of files in the run folder.

`requests.jsonl` holds what people ask, an object a line, written by the parent; every rank reads it. A
`prompt` is a text to go on from, a `say` is the next turn of a chat, `clear` begins a new one, and `end` is
the last line. `stream-<copy>.jsonl` holds what comes back, written by one rank of each copy of the model:
`ready`, pieces of the `text` of an answer by its number, and how it `ended`.

Files, because ranks may be on other machines and have no terminal; and a line is one write, so that readers
see whole ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bc2exp.tracking.journal import Tail

REQUESTS, STREAM = "requests.jsonl", "stream-{copy}.jsonl"
ANSWERS = "answers.jsonl"
"""What was asked and answered, at the end of the run."""


class Lines:
    """Appends objects to a file, a line each."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, **fields: Any) -> None:
        """Append an object."""
        os.write(self._descriptor, json.dumps(fields, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Nothing can be written after it."""
        os.close(self._descriptor)


class NoLines:
    """For ranks whose words another one says."""

    def write(self, **fields: Any) -> None:
        """Forget it."""


class Streams:
    """What the copies of the model say, as it comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[Path, Tail] = {}

    def poll(self) -> Iterator[dict[str, Any]]:
        """The objects that were completed since the last call."""
        for path in sorted(self._folder.glob(STREAM.format(copy="*"))):
            tail = self._tails.setdefault(path, Tail(path))
            yield from tail.poll()
