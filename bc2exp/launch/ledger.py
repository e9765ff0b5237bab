"""The ledger of a sweep: which jobs there are, which were started, how they ended.

`ledger.jsonl` is written as a journal is (a line an event, on the disk before the next thing happens, a torn
last line is no line), because a sweep is killed like a run. Its events: `sweep` (what was typed), `job` (one
that is to be run), `planned` (no more jobs will come), `started` and `ended`. Processes that share the jobs
of a sweep append one at a time, under `ledger.lock`.

The configuration of job 3 lies in `jobs/3.yaml` from before the first job starts: what happens to a conf file
later is no business of this sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.load import digest
from bc2exp.config.sweep import LEDGER
from bc2exp.storage.atomic import write_text
from bc2exp.storage.lock import Lock, hold
from bc2exp.tracking import journal

WAITING, STARTED, DONE, VERDICT, FAILED, STOPPED, INFEASIBLE = (
    "waiting",
    "interrupted",
    "done",
    "verdict failed",
    "failed",
    "stopped",
    "infeasible",
)
"""What is said of a job. One that was started and never ended was interrupted."""

SETTLED = (DONE, VERDICT)
"""Jobs that did what they were to do."""

OVER = (*SETTLED, INFEASIBLE)
"""Jobs that a resume leaves alone."""

_LOCK_SECONDS = 60.0


def job_lock(folder: Path, number: int) -> Path:
    """The lock of a job of the sweep in `folder`."""
    return folder / "jobs" / f"{number}.lock"


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        number: counts from 0.
        folder: its run folder.
        overrides: its part of the command line.
        digest: of its configuration.
        status: one of the words above.
        code: its exit code, once it ended.
        reason: why it failed, or cannot be run, in a sentence.
        lock: held by the process that does it.
    """

    number: int
    folder: Path
    overrides: list[str]
    digest: str
    status: str = WAITING
    code: int = 0
    reason: str = ""
    lock: Path = Path()


class Ledger:
    """The ledger in a sweep's folder, read from what is there and appended to.

    Attributes:
        jobs: all that are known.
        overrides: what was typed.
        drawn: whether a sweeper draws each job from what the last ones came to.
        planned: whether no more jobs will come.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] = []
        self.overrides: list[str] = []
        self.drawn = False
        self.planned = False
        self._segment = journal.last_segment(folder / LEDGER) + 1
        for record in journal.read(folder / LEDGER):
            self._take(record)
        with self._alone():  # it cuts off a torn line, which may be one that is just being written
            self._journal = journal.Journal(folder / LEDGER, self._segment)

    def begin(self, overrides: list[str], *, drawn: bool = False) -> None:
        """Note what was typed, and whether a sweeper draws the jobs."""
        self._write("sweep", overrides=overrides, drawn=drawn)

    def add(self, plain: dict[str, Any], folder: Path, overrides: list[str]) -> Job:
        """Note a job, with its configuration `plain` beside it."""
        number = len(self.jobs)
        (self.folder / "jobs").mkdir(exist_ok=True)
        write_text(self._snapshot(number), OmegaConf.to_yaml(OmegaConf.create(plain)))
        place = folder.relative_to(self.folder) if folder.is_relative_to(self.folder) else folder
        self._write("job", number=number, folder=str(place), overrides=overrides, digest=digest(plain))
        return self.jobs[number]

    def close_plan(self) -> None:
        """Note that all jobs are there."""
        self._write("planned")

    def started(self, job: Job) -> None:
        """Note that a job is about to start."""
        self._write("started", number=job.number)

    def ended(self, job: Job, status: str, code: int, reason: str) -> None:
        """Note how a job ended."""
        self._write("ended", number=job.number, status=status, code=code, reason=reason)

    def close(self) -> None:
        """Close the file."""
        self._journal.close()

    def configuration(self, job: Job) -> dict[str, Any]:
        """What a job computes, as it was when the sweep began. Raises UserError where somebody changed it."""
        file = self._snapshot(job.number)
        plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))
        if digest(plain) != job.digest:
            raise UserError(f"{file}: was changed since the sweep began; put it back, or begin another sweep")
        return plain

    def _snapshot(self, number: int) -> Path:
        return self.folder / "jobs" / f"{number}.yaml"

    def _alone(self) -> Lock:
        return hold(self.folder / "ledger.lock", _LOCK_SECONDS)

    def _write(self, event: str, **fields: Any) -> None:
        with self._alone():
            self._journal.event(event, **fields)
        self._take({"event": event, **fields})

    def _take(self, record: dict[str, Any]) -> None:
        event = record["event"]
        if event == "sweep":
            self.overrides, self.drawn = record["overrides"], record["drawn"]
        elif event == "job":
            folder = self.folder / record["folder"]
            number = record["number"]
            lock = job_lock(self.folder, number)
            self.jobs.append(Job(number, folder, record["overrides"], record["digest"], lock=lock))
        elif event == "planned":
            self.planned = True
        elif event == "started":
            self.jobs[record["number"]].status = STARTED
        elif event == "ended":
            job = self.jobs[record["number"]]
            job.status, job.code, job.reason = record["status"], record["code"], record["reason"]
