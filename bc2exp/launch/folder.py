"""The folder of a run: a new one, or the one that a resume continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.load import differences, digest
from bc2exp.storage.lock import Lock, LockHeld, hold, is_held
from bc2exp.tracking.journal import outcome

RUN_FILE = "run.json"

_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "position")
_FIXED = ("task.name", *(f"model.{name}" for name in _SHAPE))
"""What a checkpoint depends on."""
_SAMPLES = ("seed", "task.global_batch", "model.tokenizer")
"""What, beside the data set, the samples of a step depend on."""


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
    """`runs/<task>-<model>/<time>-<digest>` below the launch folder; without a model `runs/<task>/...`."""
    kind = "-".join(plain[group]["name"] for group in ("task", "model") if group in plain)
    return launch_folder / "runs" / kind / f"{now:%Y-%m-%d_%H-%M-%S}-{digest(plain)}"


def claim(plain: dict[str, Any], launch_folder: Path, chosen: Path | None, now: datetime) -> RunFolder:
    """Find or create the run's folder and own it.

    Args:
        plain: the final configuration.
        launch_folder: where the command was typed.
        chosen: the folder that `hydra.run.dir` (or a sweep) names; None: the default one.
        now: names the default folder.

    Raises:
        UserError: the folder belongs to a living process, or to another run, or cannot be written to.
    """
    new = default_folder(plain, launch_folder, now)
    with writable(chosen or new):
        resume = plain["task"].get("resume", "never")
        if resume not in ("auto", "never"):
            return _continue_named(plain, named_folder(plain, new))
        if chosen is not None and (chosen / RUN_FILE).is_file():
            return _continue_chosen(plain, chosen, resume)
        if resume == "auto":
            unfinished = newest_unfinished(launch_folder / "runs", digest(plain))
            if unfinished is not None:
                return own(unfinished, resumed=True)
        return own(_create(new) if chosen is None else _empty(chosen), resumed=False)


def claim_job(path: Path) -> RunFolder:
    """The folder of a sweep's job: its own and no other's, new or with the earlier part of its run.

    Raises UserError as `claim` does.
    """
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
        return own(path, resumed=(path / RUN_FILE).is_file())


def named_folder(plain: dict[str, Any], chosen: Path) -> Path:
    """The folder that `task.resume` names, else the chosen one."""
    resume = plain["task"].get("resume", "never")
    return chosen if resume in ("auto", "never") else Path(resume)


def newest_unfinished(runs: Path, config_digest: str) -> Path | None:
    """The newest run of this configuration below `runs` that neither finished nor is running now."""
    candidates = []
    for file in runs.glob(f"**/{RUN_FILE}"):
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            continue  # nobody asked about that folder
        if record.get("digest") == config_digest:
            candidates.append((record.get("created", 0.0), file.parent))
    for _, folder in sorted(candidates, reverse=True):
        if not _is_finished(folder) and not is_held(folder / "owner.lock"):
            return folder
    return None


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turns the errors of a disk that cannot be written to into a sentence about the run folder `path`."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or path}"
        raise UserError(
            f"the run folder {path} cannot be written ({reason}); start in another folder, or name one with "
            "hydra.run.dir=..."
        ) from None


def _continue_named(plain: dict[str, Any], folder: Path) -> RunFolder:
    """The run that `task.resume` names goes on with this configuration."""
    _is_finished(folder)  # it may go on in any case, unless its journal is damaged
    changed = differences(plain, cast(dict[str, Any], OmegaConf.to_container(_resolved(folder))))
    fixed = [each for each in changed if each[0] in _FIXED and None not in each]
    if fixed:
        raise UserError(
            f"task.resume={folder}: that run has {_listed(fixed)}; a run goes on with the same task and the "
            "same model"
        )
    samples = [each for each in changed if each[0] in _SAMPLES or each[0].startswith("dataset.")]
    if samples and not plain["task"].get("accept_changes"):
        raise UserError(
            f"task.resume={folder}: that run has {_listed(samples)}; with other samples it is not the same "
            "training: put them back, or go on all the same with task.accept_changes=true"
        )
    return own(folder, resumed=True)


def _continue_chosen(plain: dict[str, Any], chosen: Path, resume: str) -> RunFolder:
    if resume == "never":
        raise UserError(f"hydra.run.dir={chosen}: holds a run, and task.resume=never; name another folder")
    if json.loads((chosen / RUN_FILE).read_text())["digest"] != digest(plain):
        changed = differences(plain, cast(dict[str, Any], OmegaConf.to_container(_resolved(chosen))))
        raise UserError(
            f"hydra.run.dir={chosen}: holds a run of another configuration, with {_listed(changed)}; name "
            f"another folder, or continue that run with this configuration by task.resume={chosen}"
        )
    refuse_finished(chosen)
    return own(chosen, resumed=True)


def _resolved(folder: Path) -> Any:
    return OmegaConf.load(folder / "resolved.yaml")


def _listed(changed: list[tuple[str, Any, Any]]) -> str:
    """What differs, as one would type it."""

    def typed(value: Any) -> Any:
        return "null" if value is None else value

    return ", ".join(f"{key}={typed(there)} (here {typed(here)})" for key, here, there in changed)


def refuse_finished(chosen: Path) -> None:
    """Raise UserError where the folder that `hydra.run.dir` names holds a run that is done."""
    if _is_finished(chosen):
        raise UserError(f"hydra.run.dir={chosen}: this run is finished; name another folder to run it again")


def _is_finished(folder: Path) -> bool:
    try:
        ending = outcome(folder / "metrics.jsonl")
    except ValueError as error:
        raise UserError(f"{error}; this run cannot go on, task.resume=never starts another") from None
    return ending is not None and ending["event"] == "done"


def _empty(chosen: Path) -> Path:
    chosen.mkdir(parents=True, exist_ok=True)
    strangers = sorted(entry.name for entry in chosen.iterdir())
    if strangers:
        raise UserError(
            f"hydra.run.dir={chosen}: holds {strangers[0]} and no run; name a new or empty folder"
        )
    return chosen


def _create(path: Path) -> Path:
    """A folder that did not exist before; two starts in one second get two folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 1
    while True:
        try:
            os.mkdir(candidate)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")


def own(path: Path, *, resumed: bool) -> RunFolder:
    """Own the folder `path`, which is there. Raises UserError where a living process does."""
    try:
        return RunFolder(path, hold(path / "owner.lock"), resumed)
    except LockHeld:
        raise UserError(f"{path}: this run is going on in another process") from None
