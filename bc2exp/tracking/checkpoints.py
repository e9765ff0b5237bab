"""The checkpoints of a run, from its journal and its folder: what a tracker is told of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

THERE, REMOVED, MISSING = "there", "removed", "missing"
"""What became of a checkpoint's folder: it stands, a newer one took its place, or somebody else took it."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run.

    Attributes:
        step: the optimizer step after which it was saved.
        path: its folder, counted from the run folder.
        state: one of the words above.
        best: whether the journal calls it the best so far.
    """

    step: int
    path: str
    state: str
    best: bool

    @property
    def name(self) -> str:
        """The name of its folder."""
        return PurePosixPath(self.path).name


class CheckpointList:
    """The checkpoints that the records of a journal tell of, in the order in which they were saved first."""

    def __init__(self) -> None:
        self._best: dict[tuple[int, str], bool] = {}
        self._removed: set[str] = set()

    def take(self, records: Iterable[dict[str, Any]]) -> bool:
        """Read the next records; whether they tell of a checkpoint."""
        told = False
        for record in records:
            if record.get("event") not in ("checkpoint", "checkpoint_removed"):
                continue
            told = True
            # keeping the last few is a part of saving: the line of the new one may name those that went
            gone = record.get("removed") or ()
            gone = [gone] if isinstance(gone, str) else gone
            if record["event"] == "checkpoint":
                path = str(record["path"])
                self._removed.discard(_name(path))  # steps run again after a damaged one save it again
                self._best[int(record["step"]), path] = bool(record.get("best"))
            elif "path" in record:
                gone = [*gone, record["path"]]
            self._removed |= {_name(each) for each in gone}
        return told

    def now(self, folder: Path) -> list[Checkpoint]:
        """Each checkpoint, and whether its folder is in the run folder `folder` at this moment."""
        found = []
        for (step, path), best in self._best.items():
            state = REMOVED if _name(path) in self._removed else MISSING
            found.append(Checkpoint(step, path, THERE if (folder / path).is_dir() else state, best))
        return found


def _name(path: Any) -> str:
    return PurePosixPath(str(path)).name
