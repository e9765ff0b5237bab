"""What MLflow says of runs that are killed, resumed, stopped, raise, and of one that nothing disturbs."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from bc2exp.tracking import mlflow as tracker
from tests.launch.commands import STEPS, hold, hold_until_stop, identity, values, wait_for

pytestmark = pytest.mark.slow  # seven trainings, two of them killed

TRACKED = ("tracking.enabled=true",)
KILLED = (*STEPS, *TRACKED, "seed=1")
WHOLE = (
    *TRACKED,
    "seed=2",
    "task.steps=6",
    "task.eval_every=3",
    "hardware.peak_tflops=1",
    "hardware.peak_name=test",
)
ORPHANED = (*STEPS, *TRACKED, "seed=3")
RAISING = (*STEPS, *TRACKED, "seed=4")

RAISE = """
from bc2exp.train.trainer import Trainer
def evaluate(self, step):
    raise ZeroDivisionError("injected at step " + str(step))
Trainer._evaluate = evaluate
"""


def look(launch, run):
    """What MLflow holds of the run in a folder: (its only record, {metric: its history})."""
    client = tracker.MlflowClient(f"sqlite:///{launch.folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`bc2exp.run` = '{identity(run)}'")
    assert len(found) == 1
    names = found[0].data.metrics
    return found[0], {name: client.get_metric_history(found[0].info.run_id, name) for name in names}


def status(launch, run):
    return look(launch, run)[0].info.status


def run_of(launch, seed):
    """The newest run folder of a seed."""
    found = [run for run in launch.runs() if f"seed: {seed}\n" in (run / "resolved.yaml").read_text()]
    return max(found, key=lambda run: run.name)


def recorded(launch, seed):
    """Wait until MLflow knows the run of a seed."""

    def there():
        files = [run_of(launch, seed) / "tracking.json"] if launch.runs() else []
        return files and files[0].exists() and json.loads(files[0].read_text())["status"] == "RUNNING"

    wait_for(there, f"the run of seed {seed} in MLflow")


@pytest.fixture(scope="module")
def story(launches):
    """One launch folder, in this order, each line's commands side by side.

    A run is killed with everything around it.
    Another runs undisturbed; a third loses its parent alone.
    The command of the killed one again; a fourth raises.
    The command of the undisturbed one again, stopped by Ctrl-C.
    """
    launch = launches("story")
    killed = launch.start(*KILLED, inject=hold(7))
    launch.held(7, killed)
    recorded(launch, 1)
    killed.kill_all()
    statuses = {"killed": status(launch, run_of(launch, 1))}

    whole = launch.start(*WHOLE)
    orphaned = launch.start(*ORPHANED, inject=hold(5))
    launch.held(5, orphaned)
    recorded(launch, 3)
    orphaned.kill_parent()
    assert whole.wait() == 0, whole.err
    orphaned.nothing_left()
    first = run_of(launch, 2)
    statuses |= {
        "killed, later": status(launch, run_of(launch, 1)),
        "orphaned": status(launch, run_of(launch, 3)),
    }

    again = launch.start(*KILLED)
    raising = launch.start(*RAISING, inject=RAISE)
    assert again.wait() == 0, again.err
    assert raising.wait() == 1

    stopped = launch.start(*WHOLE, inject=hold_until_stop(4))
    launch.held(4, stopped)
    stopped.ctrl_c()
    assert stopped.wait() == 3, stopped.err
    stopped.nothing_left()
    return SimpleNamespace(
        launch=launch, statuses=statuses, whole=whole, first=first, raising=raising, stopped=stopped
    )


def test_a_run_killed_with_its_tracker_is_failed_at_the_latest_at_the_next_start(story):
    assert story.statuses["killed"] == "RUNNING"  # nobody was left to say anything else
    assert story.statuses["killed, later"] == "FAILED"


def test_a_run_whose_parent_alone_is_killed_is_failed_at_once(story):
    assert story.statuses["orphaned"] == "FAILED"
    record, metrics = look(story.launch, run_of(story.launch, 3))
    assert record.data.tags["resumable"] == "true"
    assert [point.step for point in metrics["train/loss"]] == [1, 2, 3, 4, 5]


def test_a_resumed_run_is_one_run_with_each_step_once(story):
    record, metrics = look(story.launch, run_of(story.launch, 1))
    assert record.info.status == "FINISHED"
    assert [point.step for point in metrics["train/loss"]] == list(range(1, 13))
    assert [point.step for point in metrics["eval/loss"]] == [6, 12]
    for name, points in metrics.items():
        assert len({point.step for point in points}) == len(points), name
    expected = values(run_of(story.launch, 1), "train/loss")
    assert {point.step: point.value for point in metrics["train/loss"]} == expected
    # the journal holds steps 5 to 7 twice, and the second time they were the same to the bit
    assert "bc2exp.differences" not in record.data.tags


def test_an_exception_is_printed_once_and_failed(story):
    assert story.raising.err.count("Traceback (most recent call last)") == 1
    assert story.raising.err.count("ZeroDivisionError: injected at step 6") == 1
    record, metrics = look(story.launch, run_of(story.launch, 4))
    assert record.info.status == "FAILED"
    assert record.data.tags["bc2exp.reason"] == "ZeroDivisionError: injected at step 6"
    assert [point.step for point in metrics["train/loss"]] == list(range(1, 7))


def test_the_same_command_after_a_finished_run_is_another_run(story):
    second = run_of(story.launch, 2)
    assert second != story.first
    assert identity(second) != identity(story.first)
    assert "resum" not in story.stopped.out.splitlines()[0]
    assert status(story.launch, story.first) == "FINISHED"


def test_ctrl_c_is_killed_and_resumable(story):
    record, metrics = look(story.launch, run_of(story.launch, 2))
    assert record.info.status == "KILLED"
    assert record.data.tags["resumable"] == "true"
    assert max(point.step for point in metrics["train/loss"]) == 4
    checkpoints = run_of(story.launch, 2) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]


def test_the_record_of_an_undisturbed_run(story):
    run = story.first
    record, metrics = look(story.launch, run)
    assert record.info.run_name.startswith("tiny_7b-cpu-single-")
    assert set(metrics) == {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "eval/loss",
        "perf/step_time_s",
        "perf/samples_per_s",
        "perf/tokens_per_s_per_device",
        "perf/mfu",
        "mem/peak_gib",
    }
    assert {point.step: point.value for point in metrics["perf/mfu"]} == values(run, "perf/mfu")
    expected = {"seed": "2", "task.steps": "6", "model.hidden_size": "32", "hardware.peak_name": "test"}
    assert {name: record.data.params[name] for name in expected} == expected
    (given,) = record.inputs.dataset_inputs
    assert given.dataset.name == "embedded"
    assert json.loads(given.dataset.profile)["tokens"] > 0


def test_the_artifacts_lie_in_the_folder_of_the_command(story):
    record, _ = look(story.launch, story.first)
    place = f"{story.launch.folder}/mlartifacts/pretrain/"
    assert record.info.artifact_uri.removeprefix("file://").startswith(place)
    folder = record.info.artifact_uri.removeprefix("file://")
    wanted = {
        "resolved.yaml",
        "overrides.txt",
        "environment.json",
        "summary.json",
        "loss.png",
        "metrics.jsonl",
    }
    assert wanted <= set(os.listdir(folder))
    written = {path.name for path in story.launch.folder.iterdir()}
    assert written <= {"runs", "mlartifacts", "mlflow.db", "mlflow.db.lock", "mlflow.db-shm", "mlflow.db-wal"}


def test_what_the_command_says(story):
    folder = story.launch.folder
    lines = story.whole.out.splitlines()
    assert lines[0] == f"run: {story.first.relative_to(folder)}"
    assert f"weights  {story.first.relative_to(folder)}/weights (safetensors, Hugging Face layout)" in lines
    assert f"plot     {story.first.relative_to(folder)}/loss.png" in lines
    assert lines[-1] == f"mlflow   mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db"
    assert story.whole.err == ""
