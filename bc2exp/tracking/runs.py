"""A run's folder as the tracker sees it: who the run is, its parameters, and which runs were left behind.

Knows the files and no tracker. The parent takes `owner.lock` before it writes `run.json`, and keeps it as
long as it lives: a run that says RUNNING under a free lock was abandoned.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bc2exp.storage import lock
from bc2exp.tracking import journal

_FORBIDDEN = re.compile(r"[^\w\-. :/]")
_MAX_NAME = 250
_MAX_VALUE = 6000


@dataclass(frozen=True)
class Run:
    """What `run.json` says, and where it was read."""

    folder: Path
    id: str
    name: str
    launch_folder: Path
    created: float
    """Unix time, seconds."""
    uri: str
    experiment: str
    artifact_location: str | None
    """Where the experiment keeps artifacts; None leaves it to the server."""
    enabled: bool
    tags: dict[str, str]

    @property
    def journal(self) -> Path:
        """The file that rank 0 appends to."""
        return self.folder / "metrics.jsonl"

    @property
    def owned(self) -> bool:
        """Whether the parent of this run lives."""
        return lock.is_held(self.folder / "owner.lock")

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a finished checkpoint folder (one whose building broke off has a leading dot)."""
        return any((self.folder / "checkpoints").glob("step-*"))


@dataclass(frozen=True)
class Ending:
    """How a run ended, in the tracker's words."""

    status: str
    """FINISHED, KILLED (stopped on request, can be resumed) or FAILED."""
    resumable: bool
    reason: str


def load(folder: str | os.PathLike[str]) -> Run:
    """Read `run.json` in `folder`. Raises OSError, ValueError or KeyError where it is not a run's folder."""
    folder = Path(folder).resolve()
    values = json.loads((folder / "run.json").read_text("utf-8"))
    tracking = values["tracking"]
    return Run(
        folder=folder,
        id=values["id"],
        name=values["name"],
        launch_folder=Path(values["launch_folder"]),
        created=float(values["created"]),
        uri=tracking["uri"],
        experiment=tracking["experiment"],
        artifact_location=tracking["artifact_location"],
        enabled=tracking["enabled"],
        tags={"bc2exp.digest": values["digest"], **values["tags"]},
    )


def ending(run: Run) -> Ending:
    """How `run` ended, by its journal; a run that never said so has failed."""
    record = journal.outcome(run.journal)
    if record is None:
        return Ending("FAILED", run.has_checkpoint, "the run ended without an outcome in its journal")
    reason = str(record.get("reason") or "")
    if record["event"] == "done":
        return Ending("FINISHED", False, reason)
    if record["event"] == "stopped":
        return Ending("KILLED", True, reason)
    return Ending("FAILED", run.has_checkpoint, reason)


def database(uri: str) -> Path | None:
    """The file of an sqlite address; None for anything else."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def allowed(name: str) -> str:
    """`name` as MLflow takes it for a metric or a parameter: other characters become "_", the end is cut."""
    return _FORBIDDEN.sub("_", name)[:_MAX_NAME]


def parameters(run: Run) -> dict[str, str]:
    """The resolved configuration, flat: {"task.optimizer.lr": "0.001"}; lists as JSON, null as "null".

    Names and values are cut down to what MLflow takes. Empty where there is no `resolved.yaml`.
    """
    try:
        resolved = OmegaConf.to_container(OmegaConf.load(run.folder / "resolved.yaml"))
    except FileNotFoundError:
        return {}
    flat = {}
    for name, value in _leaves(resolved, ""):
        plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        flat[allowed(name)] = plain[:_MAX_VALUE]
    return flat


def abandoned(run: Run) -> list[Run]:
    """Tracked runs under the launch folder's `runs/`, other than `run`, that were left open.

    Their parent is gone, and their record in the tracker says RUNNING or was never begun. Cheap: one or two
    small files a run.
    """
    found = []
    runs = run.launch_folder / "runs"
    # single runs, and those of a sweep one level deeper; not `**`, which would walk through all checkpoints
    for path in sorted([*runs.glob("*/*/run.json"), *runs.glob("*/*/*/run.json")]):
        if path.parent == run.folder or not _is_open(path.parent):
            continue
        try:
            other = load(path.parent)
        except (ValueError, KeyError, TypeError):
            continue  # not ours, or of another version: nobody asked about it, so it is no error here
        if other.enabled and not other.owned and not lock.is_held(other.folder / "replay.lock"):
            found.append(other)
    return found


def _is_open(folder: Path) -> bool:
    try:
        return json.loads((folder / "tracking.json").read_text("utf-8"))["status"] == "RUNNING"
    except FileNotFoundError:
        return True


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, node
