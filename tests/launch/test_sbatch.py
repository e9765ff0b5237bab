"""The jobs of a sweep as a Slurm array, without Slurm: its file is a script, and its tasks are processes that
run at the same time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.launch.ledger import Ledger
from bc2exp.launch.run import STOPPED
from bc2exp.launch.sbatch import SBATCH, array
from bc2exp.launch.sweep_folder import resume, take_part
from bc2exp.storage.lock import hold
from bc2exp.tracking.journal import last_segment, outcome, read
from tests.launch.commands import BOUND, ROOT, STEPS, values, wait_for
from tests.launch.drifts import write_drifts
from tests.launch.test_sweep import Jobs, new, run, statuses
from tests.launch.test_sweep_command import STOPS, tracked


@pytest.mark.parametrize(
    ("numbers", "said"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7"), ([4, 5, 11], "4-5,11")],
)
def test_numbers_as_slurm_lists_them(numbers: list[int], said: str) -> None:
    assert array(numbers) == said


def test_jobs_are_written_down_done_one_by_one_and_ranked(tmp_path, capsys) -> None:
    folder = tmp_path / "s"
    sweep = new(tmp_path, nobody := Jobs())
    with sweep.open():
        sweep.hand_over()
    assert sweep.code() == 0
    assert nobody.ran == []
    ending = outcome(folder / "metrics.jsonl")
    assert (ending["event"], ending["reason"]) == ("stopped", "4 of 4 jobs are left to jobs.sbatch")
    said = capsys.readouterr().out
    assert "sbatch   sbatch s/jobs.sbatch\n" in said
    assert "resume   python -m bc2exp -m sweep.resume=s\n" in said
    text = (folder / SBATCH).read_text()
    assert "\n#SBATCH --array=0-3\n" in text
    assert f"\ncd {tmp_path}\n" in text

    jobs = Jobs(job1="failed")
    assert [take_part(folder, number, tmp_path, jobs).run_one(number) for number in (2, 1, 0)] == [0, 1, 0]
    assert jobs.ran == [2, 1, 0]
    assert [take_part(folder, number, tmp_path, jobs).run_one(number) for number in (2, 1)] == [0, 1]
    assert jobs.ran == [2, 1, 0, 1]  # what is done is left alone, what failed is tried again
    with (
        hold(folder / "jobs" / "3.lock"),
        pytest.raises(UserError, match=r"sweep.job=3: this job is going on"),
    ):
        take_part(folder, 3, tmp_path, jobs)
    with hold(folder / "owner.lock"), pytest.raises(UserError, match="this sweep is going on in another"):
        take_part(folder, 3, tmp_path, jobs)
    with pytest.raises(UserError, match=r"sweep.job=4: this sweep has the jobs 0 to 3"):
        take_part(folder, 4, tmp_path, jobs)

    again = resume(folder, {}, tmp_path, jobs)
    with again.open():
        again.hand_over()
    assert "\n#SBATCH --array=1,3\n" in (folder / SBATCH).read_text()
    last = Jobs()
    assert run(resume(folder, {}, tmp_path, last)) == 0
    assert last.ran == [1, 3]
    assert statuses(tmp_path) == dict.fromkeys(range(4), "done")

    script = (folder / SBATCH).read_text()
    over = resume(folder, {}, tmp_path, last)
    with over.open():
        over.hand_over()  # nothing is left: it ranks
    assert (folder / SBATCH).read_text() == script
    assert outcome(folder / "metrics.jsonl")["event"] == "done"


def test_a_task_that_is_stopped_leaves_its_job_to_the_next(tmp_path) -> None:
    sweep = new(tmp_path, Jobs())
    with sweep.open():
        sweep.hand_over()
    folder = tmp_path / "s"
    stopped = Jobs(job1=lambda: None)
    assert take_part(folder, 1, tmp_path, stopped).run_one(1) == STOPPED
    later = Jobs()
    assert take_part(folder, 1, tmp_path, later).run_one(1) == 0
    assert later.ran == [1]


@pytest.mark.slow
def test_a_task_that_slurm_warns_saves_and_submitted_again_goes_on(launch) -> None:
    """Two trainings at the same time, each from its task of the array; the signal reaches the command."""
    words = ("-m", *STEPS, "seed=1,2", "tracking.enabled=true", "hydra.sweep.dir=runs/s")
    first = launch.run(*words, "sweep.sbatch=true", inject=STOPS.format(seed=2))
    assert "sbatch   sbatch runs/s/jobs.sbatch" in first.out
    _, parent, children = tracked(launch.folder, "pretrain")
    assert (parent.info.status, children) == ("KILLED", {})
    assert parent.data.tags["bc2exp.reason"] == "2 of 2 jobs are left to jobs.sbatch"
    folder = launch.folder / "runs" / "s"
    environment = {**os.environ, "PYTHONPATH": f"{launch.aside}/site-0:{ROOT}"}

    def submit(number: int) -> subprocess.Popen[bytes]:
        more = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        return subprocess.Popen(["bash", str(folder / SBATCH)], env={**environment, **more}, cwd="/")

    tasks = [submit(number) for number in range(2)]
    wait_for(lambda: (launch.aside / "held-2").exists(), "step 6 of job 1")
    tasks[1].terminate()  # what `--signal=B:TERM` does
    assert [task.wait(BOUND) for task in tasks] == [0, 3]
    assert [job.status for job in Ledger(folder).jobs] == ["done", "stopped"]
    _, _, children = tracked(launch.folder, "pretrain")
    assert {number: run.info.status for number, run in children.items()} == {0: "FINISHED", 1: "KILLED"}
    (launch.aside / "site-0" / "sitecustomize.py").unlink()
    assert submit(1).wait(BOUND) == 0
    assert submit(0).wait(BOUND) == 0  # done already
    assert [job.status for job in Ledger(folder).jobs] == ["done", "done"]
    assert [last_segment(folder / str(number) / "metrics.jsonl") for number in range(2)] == [0, 1]
    assert list(values(folder / "1", "train/loss", segment=1)) == list(range(7, 13))
    launch.run(*words, "sweep.resume=runs/s")
    _, parent, children = tracked(launch.folder, "pretrain")
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    assert set(children) == {0, 1}


@pytest.mark.slow
def test_two_tasks_at_the_same_time_and_a_tracker_that_is_back_for_the_ranking(tmp_path: Path) -> None:
    folder = tmp_path / "a b"  # a name that a shell would split
    folder.mkdir()
    write_drifts(folder, one=1.01, two=1.015)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("MLFLOW_TRACKING_URI", None)

    def start(*words: str, **more: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, cwd=folder, env={**environment, **more}, text=True, **pipes)

    def bc2exp(*words: str) -> str:
        command = start(sys.executable, "-m", "bc2exp", "-m", *words)
        out, err = command.communicate()
        assert command.returncode == 0, f"{out}\n{err}"
        return out

    (folder / "db").write_text("where the folder of the database is to be")
    words = ["task=compare", "task.a=one.log,two.log", "task.b=b.log", "sweep.metric=compare/loss_mean"]
    words += ["hydra.sweep.dir=s", "tracking.uri=sqlite:///db/mlflow.db", "tracking.patience_s=1"]
    said = bc2exp(*words, "sweep.sbatch=true")
    assert "sbatch   sbatch s/jobs.sbatch" in said
    assert not (folder / "s" / "0" / "run.json").exists()
    script = folder / "s" / SBATCH
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert subprocess.run(["bash", str(script)], env=environment, check=False, capture_output=True).returncode
    tasks = [start("bash", str(script), SLURM_ARRAY_TASK_ID=str(number)) for number in range(2)]
    for task in tasks:
        out, err = task.communicate()
        assert task.returncode == 0, f"{out}\n{err}"
        assert len(re.findall(r"^job \d: done, compare/loss_mean 0.01", out, re.MULTILINE)) == 1
    assert not (folder / "s" / "tracking.json").exists()
    (folder / "db").unlink()
    (folder / "one.log").write_text("its job is done, and nobody reads this again")
    kept = folder / "s" / "resolved.yaml"
    kept.write_text(
        kept.read_text().replace("patience_s: 1", "patience_s: 120")
    )  # no outcome hangs on a time
    bc2exp("sweep.resume=s")
    ledger = list(read(folder / "s" / "ledger.jsonl"))
    starts = [record["number"] for record in ledger if record["event"] == "started"]
    assert sorted(starts) == [0, 1]
    _, parent, children = tracked(folder / "db", "compare")
    assert parent.info.status == "FINISHED"
    assert {number: run.info.status for number, run in children.items()} == {0: "FINISHED", 1: "FINISHED"}
    assert all("mlflow.parentRunId" in run.data.tags for run in children.values())
