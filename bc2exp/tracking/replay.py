"""A journal, replayed into a tracker: every (metric, step) once, however often it starts again.

A replay keeps no state of its own. It reads the journal from the beginning and asks the tracker what it holds
already; so a replay that was killed, or lost its tracker, is simply begun again.

The first value of each (metric, step) is the run's. Steps run again after a resume must give it again, bit by
bit; where they do not, the difference is kept in `differences.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from bc2exp.storage import atomic, lock
from bc2exp.tracking import runs
from bc2exp.tracking.checkpoints import Checkpoint, CheckpointList
from bc2exp.tracking.journal import Tail

# Speed and memory differ from one execution to the next: no difference there says anything.
_VARYING = ("perf/", "mem/")


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    step: int
    value: float
    time: float
    """Unix time, seconds."""


class Tracker(Protocol):
    """What a replay asks of a tracker; any method may raise anything where the tracker is away."""

    @property
    def description(self) -> dict[str, str]:
        """{"run_id", "experiment_id", "uri", "status"}: what `tracking.json` is to hold."""

    def log(self, points: list[Point]) -> None:
        """Record the points that are not recorded yet."""

    def data(self, record: dict[str, Any]) -> None:
        """Record the data set that a "data" event of the journal describes, once."""

    def checkpoints(self, checkpoints: list[tuple[Checkpoint, list[Point]]]) -> None:
        """Record checkpoints, each with the values of its step; those recorded before are brought up to
        date."""

    def tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""

    def artifacts(self) -> None:
        """Store the files of the run folder that belong to the record."""

    def end(self, status: str, time: float) -> None:
        """Close the run with a terminal status, at Unix time `time`."""


Connect = Callable[[runs.Run, bool], Tracker]
"""Opens the tracker's record of a run, creating it where there is none; the flag: set it back to RUNNING."""


class FirstValues:
    """The first value of each (metric, step) of a journal, and the later ones that differ from it."""

    def __init__(self) -> None:
        self._points: dict[int, dict[str, Point]] = {}
        self.differences: list[dict[str, Any]] = []

    def take(self, records: Iterable[dict[str, Any]]) -> list[Point]:
        """Return what is new in the next records of the journal, and note what differs."""
        new = []
        for record in records:
            for name, value in record.get("metrics", {}).items():
                step = record["step"]
                points = self._points.setdefault(step, {})
                if name not in points:
                    points[name] = Point(name, step, value, record["time"])
                    new.append(points[name])
                    continue
                first = points[name].value
                if not _same(first, value) and not name.startswith(_VARYING):
                    where = {"metric": name, "step": step, "segment": record["segment"]}
                    self.differences.append({**where, "first": first, "later": value})
        return new

    def of_step(self, step: int) -> list[Point]:
        """The values of a step."""
        return list(self._points.get(step, {}).values())


class Replay:
    """The replay of one run. Holds `replay.lock` of its folder, so that nobody else replays it meanwhile.

    Raises LockHeld where somebody does, and whatever `connect` raises. After any method has raised, begin a
    new replay: this one may have skipped what it failed to record.
    """

    def __init__(self, run: runs.Run, connect: Connect, live: bool) -> None:
        self.run = run
        self._lock = lock.hold(run.folder / "replay.lock")
        try:
            self._tracker = connect(run, live)
            self._tail = Tail(run.journal)
            self._first = FirstValues()
            self._checkpoints = CheckpointList()
            self._time = run.created
            self._describe()
        except BaseException:
            self.close()
            raise

    def advance(self) -> int:
        """Record what the journal has gained since the last call; return the number of its lines."""
        records = self._tail.poll()
        known = len(self._first.differences)
        self._tracker.log(self._first.take(records))
        for record in records:
            self._time = record["time"]
            if record.get("event") == "data":
                self._tracker.data(record)
        if len(self._first.differences) > known:
            self._tracker.tags({"bc2exp.differences": str(len(self._first.differences))})
        if self._checkpoints.take(records):
            self._record_checkpoints()
        return len(records)

    def _record_checkpoints(self) -> None:
        there = self._checkpoints.now(self.run.folder)
        if there:
            self._tracker.checkpoints([(each, self._first.of_step(each.step)) for each in there])

    def finish(self) -> None:
        """Record the rest, the files, and how the run ended.

        Files have a store of their own, which may refuse them (it is another place, with other keys): the
        numbers and the status are recorded all the same, before what it raised is.
        """
        self.advance()
        if self._first.differences:
            lines = (json.dumps(_plain(each), ensure_ascii=False) for each in self._first.differences)
            atomic.write_text(self.run.folder / "differences.jsonl", "\n".join(lines) + "\n")
        self._record_checkpoints()  # some of their folders may have gone since
        ending = runs.ending(self.run)
        self._tracker.tags({"resumable": str(ending.resumable).lower(), "bc2exp.reason": ending.reason})
        refused: Exception | None = None
        try:
            self._tracker.artifacts()
        except Exception as error:
            refused = error
        self._tracker.end(ending.status, self._time)
        if refused is not None:
            raise refused
        self._describe()

    def close(self) -> None:
        """Let go of the run, finished or not."""
        self._lock.release()

    def _describe(self) -> None:
        atomic.write_json(self.run.folder / "tracking.json", self._tracker.description)


def _same(first: float, later: float) -> bool:
    if math.isnan(first) or math.isnan(later):
        return math.isnan(first) and math.isnan(later)
    return first == later and math.copysign(1.0, first) == math.copysign(1.0, later)


def _plain(difference: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in difference.items()
    }
