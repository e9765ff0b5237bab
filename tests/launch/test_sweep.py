"""A sweep's ledger, with jobs that only write a journal: nothing run twice, whatever breaks it off."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.launch import ledger as states
from bc2exp.launch import sweep as sweeps
from bc2exp.launch.run import DONE, FAILED, STOPPED
from bc2exp.launch.sweep import Sweep
from bc2exp.launch.sweep_folder import begin, resume
from bc2exp.storage.lock import hold
from bc2exp.tracking.journal import Journal, last_segment, outcome
from tests.launch.commands import ROOT
from tests.small_run import small_plain


class Jobs:
    """Does a job by writing a journal; `endings` says how, by number: an event, an exception, or a call."""

    def __init__(self, **endings) -> None:
        self.endings = endings
        self.ran: list[int] = []

    def __call__(self, plain, folder, overrides, tags, progress):
        number = int(tags["bc2exp.job"])
        self.ran.append(number)
        ending = self.endings.get(f"job{number}", "done")
        with folder.lock, Journal(folder.path / "metrics.jsonl", self.segment(folder)) as journal:
            (folder.path / "run.json").write_text("{}")
            journal.metrics(1, {"train/loss": float(plain["seed"]), "eval/loss": 1.0 / plain["seed"]})
            if isinstance(ending, BaseException):
                raise ending
            if callable(ending):
                ending()
                return STOPPED
            journal.event("done" if ending == "verdict" else ending, reason=f"it is {ending}")
        return {"done": DONE, "failed": FAILED, "verdict": FAILED}[ending]

    @staticmethod
    def segment(folder):
        return last_segment(folder.path / "metrics.jsonl") + 1


def new(folder: Path, jobs: Jobs, *words: str, seeds: tuple[int, ...] = (1, 2, 3, 4)) -> Sweep:
    """A sweep over seeds in `folder`/s, planned."""
    made, first = None, small_plain(folder, *words)
    for number, seed in enumerate(seeds):
        plain = {**first, "seed": seed}
        made = made or begin(folder / "s", ["seed=1,2,3,4"], plain, folder, jobs)
        made.ledger.add(plain, folder / "s" / str(number), ["task.steps=4", f"seed={seed}"])
    made.ledger.close_plan()
    return made


def run(sweep: Sweep) -> int:
    with sweep.open():
        sweep.run_all()
    return sweep.code()


def statuses(folder: Path) -> dict[int, str]:
    ranking = json.loads((folder / "s" / "sweep.json").read_text())
    return {job["number"]: job["status"] for job in sorted(ranking["jobs"], key=lambda job: job["number"])}


def test_a_resume_retries_what_failed_and_not_a_verdict(tmp_path, capsys):
    first = Jobs(job0="failed", job1="verdict", job2=ZeroDivisionError("injected"))
    assert run(new(tmp_path, first)) == 1
    assert first.ran == [0, 1, 2, 3]
    assert statuses(tmp_path) == {0: "failed", 1: "verdict failed", 2: "failed", 3: "done"}
    assert outcome(tmp_path / "s" / "metrics.jsonl")["reason"] == "2 of 4 jobs failed: 0, 2"
    said = capsys.readouterr()
    assert said.err.count("ZeroDivisionError: injected") == 1
    assert "resume   python -m bc2exp -m sweep.resume=s\n" in said.out

    second = Jobs()
    assert run(resume(tmp_path / "s", {}, tmp_path, second)) == 1  # the verdict stands
    assert second.ran == [0, 2]
    assert statuses(tmp_path) == {0: "done", 1: "verdict failed", 2: "done", 3: "done"}
    assert outcome(tmp_path / "s" / "metrics.jsonl")["event"] == "done"

    third = Jobs()
    assert run(resume(tmp_path / "s", {}, tmp_path, third)) == 1
    assert third.ran == []


def test_an_infeasible_job_is_marked_and_never_run(tmp_path, capsys):
    sweep = new(tmp_path, first := Jobs(job3="verdict"))
    sweep.ledger.ended(sweep.ledger.jobs[2], states.INFEASIBLE, DONE, "does not fit")
    assert run(sweep) == 1
    assert first.ran == [0, 1, 3]
    assert statuses(tmp_path) == {0: "done", 1: "done", 2: "infeasible", 3: "verdict failed"}
    said = capsys.readouterr().out
    assert "job 2: infeasible: does not fit\n" in said
    assert "resume " not in said
    ending = outcome(tmp_path / "s" / "metrics.jsonl")
    assert ending["event"] == "done"
    assert ending["reason"] == "verdict: 1 of 4 jobs fail; 1 of 4 jobs are infeasible: 2"
    assert ranked(tmp_path)[-1] == (2, None)
    again = Jobs()
    assert run(resume(tmp_path / "s", {}, tmp_path, again)) == 1
    assert again.ran == []
    assert statuses(tmp_path)[2] == "infeasible"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.launch.test_sweep import Jobs, new, run
folder = Path(sys.argv[1])
run(new(folder, Jobs(job1="failed", job2=lambda: os.kill(os.getpid(), signal.SIGKILL))))
"""


def test_a_resume_after_kill_9_runs_nothing_twice(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ledger = tmp_path / "s" / "ledger.jsonl"
    assert outcome(tmp_path / "s" / "metrics.jsonl") is None
    with ledger.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"event": "ended", "num')
    again = Jobs()
    assert run(resume(tmp_path / "s", {}, tmp_path, again)) == 0
    assert again.ran == [1, 2, 3]
    assert set(statuses(tmp_path).values()) == {"done"}
    assert [last_segment(tmp_path / "s" / str(number) / "metrics.jsonl") for number in range(4)] == [
        0,
        1,
        1,
        0,
    ]


def test_a_job_that_was_done_before_the_ledger_heard_of_it_is_not_run_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sweeps, "print_report", lambda path, task: asked.append((path.name, task)) or True)
    sweep = new(tmp_path, Jobs())
    ended = sweep.ledger.ended

    def killed(job, *how):
        if job.number == 1:
            raise KeyboardInterrupt
        ended(job, *how)

    monkeypatch.setattr(sweep.ledger, "ended", killed)
    with pytest.raises(KeyboardInterrupt):
        run(sweep)
    again = Jobs()
    assert run(resume(tmp_path / "s", {}, tmp_path, again)) == 0
    assert again.ran == [2, 3]
    assert asked == [("1", "pretrain"), ("s", "sweep")]


def test_a_stop_leaves_the_rest_and_a_resume_does_it(tmp_path):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    first = Jobs(job1=stop)
    assert run(new(tmp_path, first)) == 3
    assert first.ran == [0, 1]
    assert statuses(tmp_path) == {0: "done", 1: "stopped", 2: "waiting", 3: "waiting"}
    ending = outcome(tmp_path / "s" / "metrics.jsonl")
    assert (ending["event"], ending["reason"]) == ("stopped", "stopped on request; 3 of 4 jobs are left")
    again = Jobs()
    assert run(resume(tmp_path / "s", {}, tmp_path, again)) == 0
    assert again.ran == [1, 2, 3]


def ranked(folder: Path) -> list[tuple[int, float | None]]:
    ranking = json.loads((folder / "s" / "sweep.json").read_text())
    return [(job["number"], job["value"]) for job in ranking["jobs"]]


def test_the_ranking(tmp_path):
    run(new(tmp_path, Jobs(job1="failed")))
    assert ranked(tmp_path) == [(3, 0.25), (2, 1 / 3), (0, 1.0), (1, None)]
    run(resume(tmp_path / "s", {"metric": "train/loss"}, tmp_path, Jobs()))
    assert ranked(tmp_path) == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]
    run(resume(tmp_path / "s", {"metric": "train/loss", "direction": "higher"}, tmp_path, Jobs()))
    assert ranked(tmp_path) == [(3, 4.0), (2, 3.0), (1, 2.0), (0, 1.0)]
    ranking = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [job["differs"] for job in ranking["jobs"]] == [["seed=4"], ["seed=3"], ["seed=2"], ["seed=1"]]
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweeper_gets_the_worst_there_is_for_a_job_without_a_value(tmp_path):
    sweep = new(tmp_path, Jobs(job1="failed", job2="verdict"), "sweep.metric=eval/loss")
    with sweep.open():
        assert [sweep.run(job) for job in sweep.ledger.jobs[:3]] == [1.0, math.inf, 1 / 3]
    higher = resume(
        tmp_path / "s", {"metric": "train/loss", "direction": "higher"}, tmp_path, Jobs(job1="failed")
    )
    with higher.open():
        assert [higher.run(job) for job in higher.ledger.jobs[:3]] == [1.0, -math.inf, 3.0]
    journal = tmp_path / "s" / "0" / "metrics.jsonl"
    journal.write_text(journal.read_text().replace('"train/loss": 1.0', '"train/loss": "nan"'))
    again = resume(tmp_path / "s", {"direction": "lower"}, tmp_path, Jobs())
    with again.open():
        assert again.run(again.ledger.jobs[0]) == math.inf


def test_what_a_resume_refuses(tmp_path):
    run(new(tmp_path, Jobs(job0="failed")))
    path = tmp_path / "s"
    with pytest.raises(UserError, match=r"hydra.sweep.dir=.*: holds a sweep; .*sweep.resume="):
        begin(path, [], small_plain(tmp_path), tmp_path, Jobs())
    with hold(path / "owner.lock"), pytest.raises(UserError, match="going on in another process"):
        resume(path, {}, tmp_path, Jobs())
    busy = pytest.raises(UserError, match=r"jobs 1, 3 of this sweep are going on in other processes")
    with hold(path / "jobs" / "1.lock"), hold(path / "jobs" / "3.lock"), busy:
        resume(path, {}, tmp_path, Jobs())
    snapshot = path / "jobs" / "0.yaml"
    snapshot.write_text(snapshot.read_text().replace("seed: 1\n", "seed: 9\n"))
    again = resume(path, {}, tmp_path, Jobs())
    with pytest.raises(UserError, match=r"jobs/0.yaml: was changed since the sweep began"):
        again.ledger.configuration(again.ledger.jobs[0])
    unplanned = tmp_path / "u"
    begin(unplanned, [], small_plain(tmp_path), tmp_path, Jobs())._folder.lock.release()
    with pytest.raises(UserError, match="broken off before its jobs were written"):
        resume(unplanned, {}, tmp_path, Jobs())
