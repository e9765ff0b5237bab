"""A sweep, seen by its parent: one record over all, its jobs one after the other, what they came to.

The sweep is a run of its own, with folder, journal and record in MLflow, whose children are the jobs' runs.
Its ledger decides what a resume has left to do; of a job that was interrupted, the journal of its folder has
the first word, as always. `sweep_folder.py` makes a sweep, or finds one.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.launch import ledger as states
from bc2exp.launch.closing import print_places, print_report, show
from bc2exp.launch.conversation import Shown
from bc2exp.launch.folder import RUN_FILE, RunFolder, claim_job, writable
from bc2exp.launch.ledger import Job, Ledger
from bc2exp.launch.record import tracking_record, write_record
from bc2exp.launch.run import DONE, FAILED, STOPPED, WRONG
from bc2exp.launch.sbatch import SBATCH, write_sbatch
from bc2exp.launch.sweep_screen import SweepScreen
from bc2exp.launch.terminal import StopRequests, lasting_screen, stop_requests
from bc2exp.launch.tracker import NoTracker, Tracker, sync
from bc2exp.report.sweep import named_value, rank, value_of, write_ranking
from bc2exp.storage.lock import LockHeld, hold
from bc2exp.tracking.journal import Journal, last_segment, outcome

RunJob = Callable[[dict[str, Any], RunFolder, list[str], dict[str, str], Callable[[], Shown] | None], int]
"""Does a job from its configuration, in its folder, with its overrides, its tags and what shows its progress
(None: lines do); its exit code."""


class Sweep:
    """The jobs of one command line. Made in `sweep_folder.py`, used within `open`, or for `run_one`.

    Attributes:
        path: its folder.
        ledger: which jobs there are.
    """

    def __init__(
        self, folder: RunFolder, kept: dict[str, Any], ledger: Ledger, launch_folder: Path, run_job: RunJob
    ) -> None:
        self.path = folder.path
        self.ledger = ledger
        self._folder = folder
        self._kept = kept
        self._launch_folder = launch_folder
        self._run_job = run_job
        self._requests = StopRequests()
        self._run: dict[str, Any] = {}
        self._screen = SweepScreen(ledger, kept["sweep"]["metric"])
        self._handed_over = False
        self._closed = False

    @property
    def launch_folder(self) -> Path:
        """Where it was begun."""
        return Path(json.loads((self.path / RUN_FILE).read_text("utf-8"))["launch_folder"])

    @property
    def stopping(self) -> bool:
        """Whether somebody asked the sweep to stop."""
        return self._requests.count > 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the sweep's record while the block runs its jobs; then tell what they came to."""
        path = self.path
        with closing(self), writable(path), stop_requests() as self._requests, lasting_screen():
            (path / "logs").mkdir(exist_ok=True)
            tags = {"bc2exp.sweep": str(path)}
            self._run = write_record(
                self._folder, self._kept, self.ledger.overrides, self._launch_folder, tags
            )
            where = show(path, self._launch_folder)
            print(f"{'resuming sweep' if self._folder.resumed else 'sweep'}: {where}", flush=True)
            for job in self.ledger.jobs:
                if job.status == states.INFEASIBLE:
                    print(f"job {job.number}: {job.status}: {job.reason}", flush=True)
            with Journal(path / "metrics.jsonl", last_segment(path / "metrics.jsonl") + 1) as journal:
                journal.event("start", jobs=len(self.ledger.jobs))
                patience, tracking = self._kept["tracking"]["patience_s"], self._run["tracking"]
                unheard = self._folder.resumed and not (path / "tracking.json").is_file()
                tracker = Tracker(path, patience) if tracking["enabled"] else NoTracker()
                yield
                self._conclude(journal)
            if not self._handed_over:
                print_report(path, "sweep")
            heard = self._requests.count
            complaint = tracker.close(give_up=lambda: self._requests.count > heard)
            if complaint:
                print(f"bc2exp: {complaint}", file=sys.stderr)
            elif unheard and tracking["enabled"]:
                self._tell_again()
            if self._handed_over:
                print(f"sbatch   sbatch {where}/{SBATCH}")
            if self._left or not self.ledger.planned:
                print(f"resume   python -m bc2exp -m sweep.resume={where}")
            print_places(path, self._launch_folder, tracking, resumable=False)

    def close(self) -> None:
        """Let go of the folder. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.ledger.close()
            self._folder.lock.release()

    def run_all(self) -> None:
        """Run every job that is not over, until somebody asks to stop."""
        for job in self.ledger.jobs:
            if self.stopping:
                return
            self.run(job)

    def run_one(self, number: int) -> int:
        """Run one job of a sweep whose record somebody else keeps; its exit code."""
        self._run = json.loads((self.path / RUN_FILE).read_text("utf-8"))
        job = self.ledger.jobs[number]
        with closing(self), stop_requests() as self._requests, lasting_screen():
            if job.status in states.OVER:
                self._tell(job)
            else:
                self._do(job)
        return job.code

    def hand_over(self) -> None:
        """Write the jobs that are left, if any are, down for Slurm instead of running them."""
        left = [job.number for job in self.ledger.jobs if job.status not in states.OVER]
        if not left:
            return
        num_devices = 1
        for number in left:
            hardware = self.ledger.configuration(self.ledger.jobs[number])["hardware"]
            num_devices = max(num_devices, hardware["num_devices"])
        write_sbatch(self.path, left, num_devices, self._launch_folder)
        self._handed_over = True

    def run(self, job: Job) -> float:
        """Run a job, or go on with it; nothing it does ends the sweep.

        Returns its value of `sweep.metric`; for one that has none, or none that is finite, the worst there
        is (plus or minus infinity).
        """
        if job.status not in states.OVER:
            try:
                with hold(job.lock):
                    self._do(job)
            except LockHeld:
                print(f"job {job.number}: is going on in another process, and is left to it", flush=True)
        return self._value(job)

    def code(self) -> int:
        """The exit code: 3 where somebody stopped it, else the worst of the jobs'."""
        left = any(job.status in (states.WAITING, states.STOPPED) for job in self.ledger.jobs)
        if self.stopping and (left or not self.ledger.planned):
            return STOPPED
        return max((job.code for job in self.ledger.jobs), default=DONE)

    @property
    def _left(self) -> int:
        return sum(job.status not in states.OVER for job in self.ledger.jobs)

    def _value(self, job: Job) -> float:
        metric, lower = self._kept["sweep"]["metric"], self._kept["sweep"]["direction"] == "lower"
        value = value_of(job.folder, metric) if job.status in states.SETTLED else None
        if value is None or not math.isfinite(value):
            return math.inf if lower else -math.inf
        return value

    def _do(self, job: Job) -> None:
        if not self._settle(job):
            self._start(job)
        self._tell(job)

    def _start(self, job: Job) -> None:
        total = f" of {len(self.ledger.jobs)}" if self.ledger.planned else ""
        print(f"job {job.number}{total}: {' '.join(job.overrides)}", flush=True)
        self.ledger.started(job)
        code, reason = self._attempt(job)
        self.ledger.ended(job, *_judge(job, code, reason))

    def _tell(self, job: Job) -> None:
        """Say how a job stands."""
        settled = job.status in states.SETTLED
        found = named_value(job.folder, self._kept["sweep"]["metric"]) if settled else None
        shown = "" if found is None else f", {found[0]} {found[1]:.6g}"
        reason = f": {job.reason}" if job.reason else ""
        print(f"job {job.number}: {job.status}{shown}{reason}", flush=True)

    def _settle(self, job: Job) -> bool:
        """Whether a job had finished, whatever the ledger still says."""
        if not (job.folder / RUN_FILE).is_file():
            return False
        if (found := outcome(job.folder / "metrics.jsonl")) is None or found["event"] != "done":
            return False
        passed = print_report(job.folder, self.ledger.configuration(job)["task"]["name"])
        self.ledger.ended(job, *_judge(job, DONE if passed else FAILED, ""))
        return True

    def _attempt(self, job: Job) -> tuple[int, str]:
        """The exit code of a job, and why it failed where the door refused it."""
        try:
            plain = self.ledger.configuration(job)
            folder = claim_job(job.folder)
            progress = self._screen.progress(job)
            return self._run_job(plain, folder, job.overrides, self._tags(job, plain), progress), ""
        except UserError as error:
            print(f"bc2exp: {error}", file=sys.stderr)
            return WRONG, str(error)
        except Exception as error:  # ours, but the other jobs can do nothing about it
            traceback.print_exc()
            return FAILED, f"{type(error).__name__}: {error}"

    def _tags(self, job: Job, plain: dict[str, Any]) -> dict[str, str]:
        tags = {"bc2exp.sweep": str(self.path), "bc2exp.job": str(job.number)}
        mine, its = self._run["tracking"], tracking_record(plain, self._launch_folder)
        if mine["enabled"] and mine["uri"] == its["uri"]:
            tags["bc2exp.parent"] = self._run["id"]
        return tags

    def _tell_again(self) -> None:
        """Record the jobs once more, below the sweep: the tracker was away when it began, and they ended
        before it was back."""
        folders = [job.folder for job in self.ledger.jobs if (job.folder / RUN_FILE).is_file()]
        if folders:
            sync(folders, None, self._kept["tracking"]["patience_s"])

    def _conclude(self, journal: Journal) -> None:
        """Rank the jobs, and write how the sweep ended."""
        wanted = self._kept["sweep"]
        told = [
            {
                "number": job.number,
                "folder": str(job.folder),
                "overrides": job.overrides,
                "status": job.status,
                "settled": job.status in states.SETTLED,
                "reason": job.reason,
            }
            for job in self.ledger.jobs
        ]
        ranking = rank(told, wanted["metric"], wanted["direction"])
        write_ranking(ranking, self.path)
        for job in sorted(ranking["jobs"], key=lambda job: job["number"]):
            if job["value"] is not None:
                journal.metrics(job["number"], {f"sweep/{ranking['metric']}": job["value"]})
        event, reason = self._ending()
        journal.event(event, reason=reason or None)

    def _ending(self) -> tuple[str, str]:
        """The event that ends the sweep, and why in a sentence; empty where every job is done."""
        jobs = self.ledger.jobs
        left = f"{self._left} of {len(jobs)} jobs are left"
        if self._handed_over:
            return "stopped", f"{left} to {SBATCH}"
        if self.code() == STOPPED:
            return "stopped", f"stopped on request; {left}" + (
                "" if self.ledger.planned else ", and more to be drawn"
            )
        numbers: dict[str, list[int]] = {}
        for job in jobs:
            numbers.setdefault(job.status, []).append(job.number)
        failed, fails, cannot = (
            numbers.get(status, []) for status in (states.FAILED, states.VERDICT, states.INFEASIBLE)
        )
        parts = []
        if failed:
            parts.append(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(map(str, failed))}")
        elif fails:
            parts.append(f"verdict: {len(fails)} of {len(jobs)} jobs fail")
        if cannot:
            parts.append(f"{len(cannot)} of {len(jobs)} jobs are infeasible: {', '.join(map(str, cannot))}")
        return "failed" if failed else "done", "; ".join(parts)


def _judge(job: Job, code: int, reason: str) -> tuple[str, int, str]:
    """Status, exit code and reason of a job that has ended."""
    ending = outcome(job.folder / "metrics.jsonl") or {}
    if code == DONE:
        return states.DONE, code, ""
    if code == STOPPED:
        return states.STOPPED, code, ""
    if code == FAILED and not reason and ending.get("event") == "done":
        return states.VERDICT, code, str(ending.get("reason") or "")
    return states.FAILED, code, reason or str(ending.get("reason") or "")
