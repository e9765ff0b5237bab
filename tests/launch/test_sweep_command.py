"""`-m` as a person types it: one parent in MLflow, its jobs below it, and what a resume does to both."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bc2exp import __main__ as door
from bc2exp.tracking import mlflow as tracker
from bc2exp.tracking.journal import last_segment
from tests.launch.commands import ROOT, STEPS, values, wait_for
from tests.launch.drifts import write_drifts


def only_sweep(folder: Path) -> Path:
    (found,) = folder.glob("runs/sweep/*")
    return found


def statuses(sweep: Path) -> dict[int, str]:
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    return {job["number"]: job["status"] for job in sorted(jobs, key=lambda job: job["number"])}


def tracked(folder: Path, experiment: str):
    """The client, the only run without a parent, and {job number: run} of those below it."""
    client = tracker.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=100)
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    by_number = {int(run.data.tags["bc2exp.job"]): run for run in children}
    assert len(by_number) == len(children), "two runs of one job"
    return client, parent, by_number


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a reference, a log 1 % above it, one 3 % above it, and one that says nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the tracker's process
    write_drifts(tmp_path, **{"1": 1.01, "3": 1.03})
    (tmp_path / "0.log").write_text("")
    return tmp_path


@pytest.mark.slow
def test_a_sweep_is_one_parent_with_its_jobs_below_it(folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["-m", "task=compare", "task.a=1.log,3.log,0.log", "task.b=b.log"]
    assert door.command([*words, "sweep.metric=compare/loss_mean"]) == 2
    sweep = only_sweep(folder)
    assert statuses(sweep) == {0: "done", 1: "verdict failed", 2: "failed"}
    assert capsys.readouterr().err.count("0.log: holds no line of a training") == 1
    _, parent, children = tracked(folder, "compare")
    assert (parent.info.status, parent.data.tags["bc2exp.reason"]) == ("FAILED", "1 of 3 jobs failed: 2")
    assert {number: run.info.status for number, run in children.items()} == {0: "FINISHED", 1: "FINISHED"}

    (folder / "0.log").write_text((folder / "b.log").read_text())
    (folder / "1.log").write_text("its job is done, and nobody reads this again")
    assert door.command([f"sweep.resume={sweep.relative_to(folder)}"]) == 1
    assert only_sweep(folder) == sweep
    client, parent, children = tracked(folder, "compare")
    assert statuses(sweep) == {0: "done", 1: "verdict failed", 2: "done"}
    assert (parent.info.status, parent.data.tags["bc2exp.reason"]) == (
        "FINISHED",
        "verdict: 1 of 3 jobs fail",
    )
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert [last_segment(sweep / str(number) / "metrics.jsonl") for number in range(3)] == [0, 0, 0]
    points = client.get_metric_history(parent.info.run_id, "sweep/compare/loss_mean")
    found = {point.step: point.value for point in points}
    assert found == pytest.approx({0: 0.01, 1: 0.03, 2: 0}, abs=1e-5)
    stored = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.png", "sweep.json", "ledger.jsonl", "overrides.txt", "resolved.yaml"} <= stored
    ranking = json.loads((sweep / "sweep.json").read_text())
    assert [job["number"] for job in ranking["jobs"]] == [2, 0, 1]


def test_another_command_does_not_go_on_with_a_sweep(folder: Path, capsys: pytest.CaptureFixture) -> None:
    off = "tracking.enabled=false"
    assert door.command(["-m", "task=compare", "task.a=1.log,3.log", "task.b=b.log", off]) == 1
    sweep = only_sweep(folder)
    before = (sweep / "ledger.jsonl").read_bytes()
    assert door.command(["-m", f"sweep.resume={sweep}", "task=compare", "task.a=1.log", "task.b=b.log"]) == 2
    assert "task.a='1.log': a sweep goes on with the jobs that it began with" in capsys.readouterr().err
    assert (sweep / "ledger.jsonl").read_bytes() == before
    # the very words that it began with are no others
    same = ["-m", f"sweep.resume={sweep}", "task=compare", "task.a=1.log,3.log", "task.b=b.log", off]
    assert door.command(same) == 1
    capsys.readouterr()
    assert door.command(["-m", f"hydra.sweep.dir={sweep}", *same[2:]]) == 2
    assert "holds a sweep; name another folder, or go on with that one by sweep.resume=" in (
        capsys.readouterr().err
    )


_SEED = """
import pathlib, signal, time, yaml
from bc2exp.train.trainer import Trainer
folder = pathlib.Path(sys.orig_argv[-1])
SEED = yaml.safe_load((folder / "resolved.yaml").read_text())["seed"]
record = Trainer._record
def recorded(self, step, values):
    record(self, step, values)
    if step == 2 and SEED == {crashing}:
        raise ZeroDivisionError("injected")
    if step == 2 and SEED == {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 6 and SEED == {held}:
        pathlib.Path(ASIDE, "held-6").touch()
        time.sleep(1000)
Trainer._record = recorded
"""


STOPS = """
import pathlib, time, yaml
from bc2exp.train.trainer import Trainer
SEED = yaml.safe_load((pathlib.Path(sys.orig_argv[-1]) / "resolved.yaml").read_text())["seed"]
record = Trainer._record
def held(self, step, values):
    record(self, step, values)
    if step == 6 and SEED == {seed}:
        pathlib.Path(ASIDE, "held-{seed}").touch()
        while not self.stop_file.exists():
            time.sleep(0.01)
Trainer._record = held
"""
"""A job is held after its step 6 until somebody asks it to stop."""


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_the_running_job_and_a_resume_goes_on_from_there(launch) -> None:
    steps = (word for word in STEPS if not word.startswith("task.micro_batch"))
    words = ("-m", *steps, "tracking.enabled=true", "task.micro_batch=2,3", "seed=1,2,3")
    infeasible = dict.fromkeys((3, 4, 5), "infeasible")  # 3 samples do not divide a step's 8
    command = launch.start(*words, inject=STOPS.format(seed=2))
    launch.held(2, command)
    command.ctrl_c()
    assert command.wait() == 3, command.err
    command.nothing_left()
    sweep = only_sweep(launch.folder)
    resumed = f"sweep.resume={sweep.relative_to(launch.folder)}"
    assert f"resume   python -m bc2exp -m {resumed}\n" in command.out
    assert "resume   the same command again" not in command.out
    assert statuses(sweep) == {0: "done", 1: "stopped", 2: "waiting", **infeasible}
    _, parent, children = tracked(launch.folder, "pretrain")
    assert parent.info.status == "KILLED"
    assert parent.data.tags["bc2exp.reason"] == "stopped on request; 2 of 6 jobs are left"
    assert {number: run.info.status for number, run in children.items()} == {0: "FINISHED", 1: "KILLED"}
    assert list(values(sweep / "1", "train/loss")) == list(range(1, 7))
    assert (sweep / "1" / "checkpoints" / "step-00000006").is_dir()

    again = launch.start(*words, resumed, inject=STOPS.format(seed=3))
    launch.held(3, again)
    again.process.terminate()
    assert again.wait() == 3, again.err
    again.nothing_left()
    assert statuses(sweep) == {0: "done", 1: "done", 2: "stopped", **infeasible}

    last = launch.run(*words, resumed)
    last.nothing_left()
    _, parent, children = tracked(launch.folder, "pretrain")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["bc2exp.reason"] == "3 of 6 jobs are infeasible: 3, 4, 5"
    assert last.out.count(": infeasible: task.global_batch=8: not a multiple of 1 data-parallel") == 3
    finished = dict.fromkeys(range(3), "FINISHED")
    assert {number: run.info.status for number, run in children.items()} == finished
    for number, again_from in enumerate((None, 7, 7)):
        run = sweep / str(number)
        assert list(values(run, "train/loss")) == list(range(1, 13))
        assert last_segment(run / "metrics.jsonl") == int(again_from is not None)
        if again_from is not None:
            assert list(values(run, "train/loss", segment=1)) == list(range(again_from, 13))


@pytest.mark.slow
def test_twelve_jobs_one_crashing_one_killed_and_the_parent_killed_in_the_middle(launch) -> None:
    words = (*STEPS, "tracking.enabled=true", "dataset=mine", "seed=range(1,13)")
    (launch.folder / "dataset").mkdir()
    mine = launch.folder / "dataset" / "mine.yaml"
    mine.write_text((ROOT / "conf" / "dataset" / "embedded.yaml").read_text())
    command = launch.start("-m", *words, inject=_SEED.format(crashing=3, killed=5, held=7))
    launch.held(6, command)
    sweep = only_sweep(launch.folder)
    assert sorted(file.name for file in (sweep / "jobs").glob("*.yaml")) == sorted(
        f"{n}.yaml" for n in range(12)
    )
    wait_for(lambda: (sweep / "6" / "tracking.json").exists(), "job 6 in MLflow")
    command.kill_parent()
    command.nothing_left()
    _, parent, children = tracked(launch.folder, "pretrain")
    assert parent.info.status == "FAILED"
    expected = {
        0: "FINISHED",
        1: "FINISHED",
        2: "FAILED",
        3: "FINISHED",
        4: "FAILED",
        5: "FINISHED",
        6: "FAILED",
    }
    assert {number: run.info.status for number, run in children.items()} == expected
    ids = {number: run.info.run_id for number, run in children.items()}

    # a later edit changes nothing
    mine.write_text(mine.read_text().replace("split: [9, 1, 0]", "split: [1, 1, 0]"))
    again = launch.start("-m", f"sweep.resume={sweep.relative_to(launch.folder)}", *words)
    assert again.wait() == 0, again.err
    again.nothing_left()
    assert only_sweep(launch.folder) == sweep
    _, parent, children = tracked(launch.folder, "pretrain")
    assert parent.info.status == "FINISHED"
    assert {number: run.info.status for number, run in children.items()} == dict.fromkeys(
        range(12), "FINISHED"
    )
    assert {number: children[number].info.run_id for number in ids} == ids
    assert statuses(sweep) == dict.fromkeys(range(12), "done")
    segments = {number: last_segment(sweep / str(number) / "metrics.jsonl") for number in range(12)}
    assert segments == {number: int(number in (2, 4, 6)) for number in range(12)}
    for number in range(12):
        assert list(values(sweep / str(number), "train/loss")) == list(range(1, 13))
        assert "split:\n  - 9\n" in (sweep / str(number) / "resolved.yaml").read_text()
    # the interrupted job went on from its checkpoint
    assert list(values(sweep / "6", "train/loss", segment=1)) == list(range(5, 13))
    assert os.listdir(launch.folder / "runs" / "sweep") == [sweep.name]
