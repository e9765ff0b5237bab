"""The folder of a sweep: a new one, one that goes on, or one of which this process does a single job."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.sweep import LEDGER
from bc2exp.launch.folder import RUN_FILE, RunFolder, own, writable
from bc2exp.launch.ledger import Ledger, job_lock
from bc2exp.launch.sweep import RunJob, Sweep
from bc2exp.storage.lock import LockHeld, hold, is_held


def begin(
    path: Path,
    overrides: list[str],
    plain: dict[str, Any],
    launch_folder: Path,
    run_job: RunJob,
    *,
    drawn: bool = False,
) -> Sweep:
    """A new sweep in the folder `path`, still without jobs.

    Args:
        path: holds nothing but what Hydra makes.
        overrides: what was typed.
        plain: the configuration of its first job, whose tracker and `sweep` it takes.
        launch_folder: where it was typed.
        run_job: does a job.
        drawn: whether a sweeper draws each job from what the last ones came to.

    Raises UserError where the folder holds a sweep or a run.
    """
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
        if (path / LEDGER).exists() or (path / RUN_FILE).exists():
            raise UserError(
                f"hydra.sweep.dir={path}: holds a sweep; name another folder, or go on with that one by "
                f"sweep.resume={path}"
            )
        folder = own(path, resumed=False)
        tracking = plain["tracking"]
        kept = {
            "task": {"name": "sweep"},
            "sweep": {key: plain["sweep"][key] for key in ("metric", "direction")},
            "tracking": {
                **tracking,
                "experiment": tracking["experiment"] or plain["task"]["name"],
                "run_name": f"sweep-{datetime.now():%Y%m%d-%H%M%S}",
            },
        }
        ledger = Ledger(path)
        ledger.begin(overrides, drawn=drawn)
    return Sweep(folder, kept, ledger, launch_folder, run_job)


def resume(path: Path, wanted: dict[str, Any], launch_folder: Path, run_job: RunJob) -> Sweep:
    """The sweep in `path`, which goes on with the jobs that it began with.

    Args:
        path: its folder.
        wanted: "metric" and "direction" where they were typed again.
        launch_folder: where the command was typed.
        run_job: does a job.

    Raises UserError where it or a job of it is going on already, or was broken off before its jobs were all
    written.
    """
    with writable(path):
        folder = own(path, resumed=(path / RUN_FILE).is_file())
        try:
            sweep = _open(folder, wanted, launch_folder, run_job)
            busy = [str(job.number) for job in sweep.ledger.jobs if is_held(job.lock)]
            if busy:
                raise UserError(
                    f"sweep.resume={path}: job{'s' * (len(busy) > 1)} {', '.join(busy)} of this sweep "
                    f"{'are' if len(busy) > 1 else 'is'} going on in other processes; wait for their end"
                )
        except BaseException:
            folder.lock.release()
            raise
    return sweep


def take_part(path: Path, number: int, launch_folder: Path, run_job: RunJob) -> Sweep:
    """The sweep in `path` for a process that does job `number` of it, beside others that do theirs.

    Raises UserError where there is no such job, or somebody does it, or does the whole sweep.
    """
    with writable(path):
        if is_held(path / "owner.lock"):
            raise UserError(f"sweep.resume={path}: this sweep is going on in another process")
        (path / "jobs").mkdir(exist_ok=True)
        try:
            folder = RunFolder(path, hold(job_lock(path, number)), resumed=True)
        except LockHeld:
            raise UserError(f"sweep.job={number}: this job is going on in another process") from None
        try:
            sweep = _open(folder, {}, launch_folder, run_job)
            if number >= len(sweep.ledger.jobs):
                last = len(sweep.ledger.jobs) - 1
                raise UserError(f"sweep.job={number}: this sweep has the jobs 0 to {last}")
        except BaseException:
            folder.lock.release()
            raise
    return sweep


def _open(folder: RunFolder, wanted: dict[str, Any], launch_folder: Path, run_job: RunJob) -> Sweep:
    path = folder.path
    ledger = Ledger(path)
    if not (ledger.planned or ledger.drawn) or not (path / RUN_FILE).is_file():
        ledger.close()
        raise UserError(
            f"sweep.resume={path}: this sweep was broken off before its jobs were written; type its "
            "command again"
        )
    kept = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path / "resolved.yaml")))
    kept["sweep"] |= wanted
    return Sweep(folder, kept, ledger, launch_folder, run_job)
