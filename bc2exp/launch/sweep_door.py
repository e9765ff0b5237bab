"""A sweep's part of the door: which jobs a command line comes to, and how one of them is done.

Hydra only says which jobs there are and in which folders. They run once all are known and written down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from bc2exp.config.errors import UserError
from bc2exp.config.layouts import layout
from bc2exp.config.load import digest, finalize
from bc2exp.config.nodes import find_nodes
from bc2exp.config.overrides import Word, parse_word, quote
from bc2exp.config.preflight import Preflight, preflight
from bc2exp.config.roots import data_root
from bc2exp.launch.compare import read_comparison, record_comparison
from bc2exp.launch.conversation import Shown, converse
from bc2exp.launch.drawing import draws, settings
from bc2exp.launch.feasibility import infeasible
from bc2exp.launch.folder import RunFolder
from bc2exp.launch.ledger import OVER
from bc2exp.launch.machine import is_rehearsal, require
from bc2exp.launch.run import DONE, FAILED, run_on_ranks, sync_runs
from bc2exp.launch.sweep import Sweep
from bc2exp.launch.sweep_entry import SweepEntry
from bc2exp.launch.sweep_folder import resume, take_part

PARENT_TASKS = ("compare", "sync")
"""Tasks that need no ranks."""


def start_sweep(launch_folder: Path, checked: Preflight, words: list[str]) -> int:
    """Begin a sweep, once everything that its jobs ask of this machine is there."""
    plains = [finalize(job, launch_folder) for job in checked.jobs]
    for key in ("metric", "direction", "sbatch"):
        values = list(dict.fromkeys(str(plain["sweep"][key]) for plain in plains))
        if len(values) > 1:
            raise UserError(f"sweep.{key}={','.join(values)}: is one for the whole sweep; name one")
    for plain in plains:
        named = plain["task"].get("resume", "never")
        if named not in ("auto", "never"):
            raise UserError(
                f"task.resume={named}: goes on with one run; of a sweep every job has a run of its own, and "
                "sweep.resume=FOLDER goes on with all"
            )
    drawn, written = draws(checked.overrides), plains[0]["sweep"]["sbatch"]
    if drawn and written:
        raise UserError(
            "sweep.sbatch=true: a sweeper draws each job from what the last ones came to, so that they "
            "cannot be written down before; leave one out"
        )
    for plain in plains:
        converse(plain, find_nodes(plain), sweep=True)  # a job without prompts is none
    for plain in plains if not written else ():
        if plain["task"]["name"] not in PARENT_TASKS and not layout(plain, launch_folder):
            require(plain, find_nodes(plain))
    reasons = [None] * len(plains) if drawn else infeasible(plains)
    if all(reasons):
        listed = "".join(f"\n  {reason}" for reason in dict.fromkeys(reasons))
        raise UserError(f"-m: every job of this sweep is infeasible; nothing was started or written{listed}")
    told = settings(checked.overrides, plains[0])
    return SweepEntry(
        launch_folder,
        [*checked.overrides, *told],
        partial(run_job, launch_folder),
        drawn=drawn,
        written=written,
        infeasible={digest(plain): reason for plain, reason in zip(plains, reasons, strict=True) if reason},
    ).enter([*told, *words], enter_hydra)


def resume_sweep(launch_folder: Path, checked: Preflight, plain: dict[str, Any]) -> int:
    """Go on with a sweep, or with one job of it. Its jobs are what they were: the words that made them may be
    there again or not."""
    folder, number = Path(plain["sweep"]["resume"]), plain["sweep"]["job"]
    typed = {word.key: word for text in checked.overrides if (word := parse_word(text))}
    wanted = {key: plain["sweep"][key] for key in ("metric", "direction") if f"sweep.{key}" in typed}
    do = partial(run_job, launch_folder)
    if number is None:
        sweep = resume(folder, wanted, launch_folder, do)
    else:
        sweep = take_part(folder, number, launch_folder, do)
    try:
        _refuse_other_jobs(sweep, typed.values())
        if sweep.ledger.drawn and (number is not None or plain["sweep"]["sbatch"]):
            key = "sweep.sbatch=true" if number is None else f"sweep.job={number}"
            raise UserError(
                f"{key}: a sweeper draws the jobs of this sweep one after the other; leave it out"
            )
        jobs = sweep.ledger.jobs if number is None else [sweep.ledger.jobs[number]]
        for job in jobs:
            its = sweep.ledger.configuration(job)
            written = plain["sweep"]["sbatch"]
            if job.status not in OVER and not written and its["task"]["name"] not in PARENT_TASKS:
                require(its, find_nodes(its))
        if not sweep.ledger.planned:
            return _draw_on(sweep, wanted, launch_folder)
    except UserError:
        sweep.close()
        raise
    if number is not None:
        return sweep.run_one(number)
    with sweep.open():
        if plain["sweep"]["sbatch"]:
            sweep.hand_over()
        else:
            sweep.run_all()
    return sweep.code()


def _draw_on(sweep: Sweep, wanted: dict[str, Any], launch_folder: Path) -> int:
    """Let the sweeper of a sweep that was broken off begin again, and tell it what its jobs came to."""
    if launch_folder != sweep.launch_folder:
        raise UserError(
            f"sweep.resume={sweep.path}: a sweeper draws its jobs from the files of the folder where it "
            f"began; type the command in {sweep.launch_folder}"
        )
    if "direction" in wanted:
        raise UserError("sweep.direction: a sweeper that draws its jobs by it cannot change it; leave it out")
    overrides = sweep.ledger.overrides
    checked = preflight(overrides, sweep=True, folder=launch_folder)
    if checked.problems:
        raise UserError("\n  ".join(["the sweep's command line is wrong by now", *checked.problems]))
    place = f"hydra.sweep.dir={quote(str(sweep.path))}"
    words = [text for text in checked.overrides if parse_word(text).key != "hydra.sweep.dir"]
    entry = SweepEntry(launch_folder, overrides, partial(run_job, launch_folder), drawn=True, sweep=sweep)
    return entry.enter([*words, place, "--multirun"], enter_hydra)


def _refuse_other_jobs(sweep: Sweep, typed: Iterable[Word]) -> None:
    """Raise UserError for words that a sweep did not begin with."""
    strange = [
        word.text
        for word in typed
        if not word.key.startswith("sweep.") and word.text not in sweep.ledger.overrides
    ]
    if strange:
        raise UserError(
            f"{', '.join(strange)}: a sweep goes on with the jobs that it began with; leave this out, or "
            "begin another"
        )


def run_job(
    launch_folder: Path,
    plain: dict[str, Any],
    folder: RunFolder,
    overrides: list[str],
    tags: dict[str, str],
    progress: Callable[[], Shown] | None,
) -> int:
    """Do one job of a sweep; returns its exit code."""
    with folder.lock:
        if plain["task"]["name"] == "sync":
            return sync_runs(plain, launch_folder)
        if plain["task"]["name"] == "compare":
            report = read_comparison(plain, launch_folder)
            passed = record_comparison(report, plain, launch_folder, None, overrides, tags, folder)
            return DONE if passed else FAILED
        rehearsed = {"bc2exp.rehearsal": "true"} if is_rehearsal(plain) else {}
        conversation = converse(plain, find_nodes(plain), sweep=True, progress=progress)
        return run_on_ranks(folder, plain, overrides, launch_folder, {**tags, **rehearsed}, conversation)


def enter_hydra(words: list[str], job: Callable[[DictConfig], float | None]) -> None:
    """Let Hydra read a command line and call `job` with what it comes to."""
    sys.argv = [sys.argv[0], *words]
    hydra.main(version_base="1.3", config_path=str(data_root() / "conf"), config_name="config")(job)()
