"""The journal of a run: `metrics.jsonl`, one JSON object a line, written as the training goes.

It is the truth about a run; what a tracker shows is replayed from it. A metric line is
`{"step": 3, "time": 1700000000.1, "segment": 0, "metrics": {"train/loss": 4.1}}`; every other line carries
`"event"`: start, data, checkpoint, note, or an outcome (done, stopped, failed). A segment is one stretch of
training without a break: each resume begins the next, and steps run again appear again under it.

Each line is one write to a file opened for appending, so that a kill tears at most the last line. A torn line
has no newline: readers leave it alone, and the next writer cuts it off.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

OUTCOMES = ("done", "stopped", "failed")

_CHUNK = 1 << 16


class Journal:
    """Appends to the journal at `path`, as segment number `segment`. One writer at a time.

    A torn last line is cut off on opening. Errors of the disk are raised (OSError); a line that did not fit
    is taken back first.
    """

    def __init__(self, path: str | os.PathLike[str], segment: int) -> None:
        self.segment = segment
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, _whole(self._descriptor))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values measured at optimizer step `step`. NaN and infinities are kept."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._append({"step": int(step)}, {"metrics": plain})

    def event(self, name: str, /, **fields: Any) -> None:
        """Record that `name` happened; `fields` are whatever JSON holds. On the disk when this returns."""
        numbers = {key: _plain(value) if isinstance(value, float) else value for key, value in fields.items()}
        self._append({"event": name}, numbers)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file. Nothing can be recorded after it."""
        os.close(self._descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, head: dict[str, Any], body: dict[str, Any]) -> None:
        record = {**head, "time": time.time(), "segment": self.segment, **body}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        written = os.write(self._descriptor, line)
        if written < len(line):  # a full disk: leave no torn line before the next one
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class NullJournal:
    """A journal that forgets: for the ranks that do not write one."""

    segment = 0

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Forget the values."""

    def event(self, name: str, /, **fields: Any) -> None:
        """Forget the event."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> NullJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tail:
    """Follows a journal that somebody else is writing, or has yet to begin."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._offset = 0

    def poll(self) -> list[dict[str, Any]]:
        """The records completed since the last call, oldest first.

        Raises ValueError, naming the file and the byte, where a whole line is not a JSON object.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        records = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            records.append(_record(line, self.path, self._offset))
            self._offset += len(line)
        return records


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of the journal at `path`, oldest first; none where there is no file.

    A torn last line is left out. Raises ValueError as `Tail.poll` does.
    """
    yield from Tail(path).poll()


def last_segment(path: str | os.PathLike[str]) -> int:
    """The number of the newest segment in the journal at `path`; -1 where nothing is recorded."""
    return max((record["segment"] for record in read(path)), default=-1)


def outcome(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record (done, stopped or failed) that ended the newest segment; None where it has not ended.

    A run that was stopped and then resumed has no outcome until the resumed segment ends.
    """
    newest, found = -1, None
    for record in read(path):
        if record["segment"] > newest:
            newest, found = record["segment"], None
        if record.get("event") in OUTCOMES and record["segment"] == newest:
            found = record
    return found


def _plain(value: float) -> float | str:
    # JSON has no NaN and no infinities; what Python writes in their place, other readers refuse.
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _record(line: bytes, path: str, offset: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not an object")
        if "metrics" in record:
            record["metrics"] = {name: float(value) for name, value in record["metrics"].items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the line at byte {offset} is not a journal record: {error}") from None
    return record


def _whole(descriptor: int) -> int:
    """The number of bytes up to and including the last newline."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        begin = max(0, end - _CHUNK)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
