"""The folder of a run: a new one, or the one that a resume continues."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.load import digest
from bc2exp.storage.lock import Lock, LockHeld, hold, is_held
from bc2exp.tracking.journal import outcome

RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this process owns.

    Attributes:
        path: the folder.
        lock: held as long as this process lives.
        resumed: whether the folder held an earlier part of the run.
    """

    path: Path
    lock: Lock
    resumed: bool


def default_folder(plain: dict[str, Any], launch_folder: Path, now: datetime) -> Path:
    """`runs/<task>-<model>/<time>-<config digest>` below the launch folder."""
    kind = f"{plain['task']['name']}-{plain['model']['name']}"
    return launch_folder / "runs" / kind / f"{now:%Y-%m-%d_%H-%M-%S}-{digest(plain)}"


def claim(plain: dict[str, Any], launch_folder: Path, chosen: Path | None, now: datetime) -> RunFolder:
    """Find or create the run's folder and own it.

    Args:
        plain: the final configuration.
        launch_folder: where the command was typed.
        chosen: the folder that `hydra.run.dir` (or a sweep) names; None: the default one.
        now: names the default folder.

    Raises:
        UserError: the folder belongs to a living process, or to another run.
    """
    resume = plain["task"].get("resume", "never")
    if resume not in ("auto", "never"):
        return _own(Path(resume), resumed=True)
    if chosen is not None and (chosen / RUN_FILE).is_file():
        return _continue_chosen(plain, chosen, resume)
    if resume == "auto":
        unfinished = newest_unfinished(launch_folder / "runs", digest(plain))
        if unfinished is not None:
            return _own(unfinished, resumed=True)
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        strangers = [entry.name for entry in chosen.iterdir()]
        if strangers:
            raise UserError(f"hydra.run.dir={chosen}: holds {strangers[0]} and no run; name a new or empty folder")
        return _own(chosen, resumed=False)
    return _own(_create(default_folder(plain, launch_folder, now)), resumed=False)


def newest_unfinished(runs: Path, config_digest: str) -> Path | None:
    """The newest run of this configuration below `runs` that neither finished nor is running now."""
    candidates = []
    for file in runs.glob(f"**/{RUN_FILE}"):
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if record.get("digest") == config_digest:
            candidates.append((record.get("created", 0.0), file.parent))
    for _, folder in sorted(candidates, reverse=True):
        ending = outcome(folder / "metrics.jsonl")
        if (ending is None or ending["event"] != "done") and not is_held(folder / "owner.lock"):
            return folder
    return None


def new_identity() -> str:
    """What tells this run from every other, wherever its folder moves."""
    return uuid.uuid4().hex


def _continue_chosen(plain: dict[str, Any], chosen: Path, resume: str) -> RunFolder:
    if resume == "never":
        raise UserError(f"hydra.run.dir={chosen}: holds a run already, and task.resume=never; name another folder")
    record = json.loads((chosen / RUN_FILE).read_text())
    if record["digest"] != digest(plain):
        raise UserError(
            f"hydra.run.dir={chosen}: holds a run of another configuration; name another folder, or continue that "
            f"run with this configuration by task.resume={chosen}"
        )
    ending = outcome(chosen / "metrics.jsonl")
    if ending is not None and ending["event"] == "done":
        raise UserError(f"hydra.run.dir={chosen}: this run is finished; name another folder to run it again")
    return _own(chosen, resumed=True)


def _create(path: Path) -> Path:
    """A folder that did not exist before; two starts in one second get two folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        candidate = path if attempt == 1 else path.with_name(f"{path.name}-{attempt}")
        try:
            os.mkdir(candidate)
        except FileExistsError:
            continue
        return candidate
    raise UserError(f"{path}: could not be created")


def _own(path: Path, *, resumed: bool) -> RunFolder:
    try:
        return RunFolder(path, hold(path / "owner.lock"), resumed)
    except LockHeld:
        raise UserError(f"{path}: this run is going on in another process") from None
