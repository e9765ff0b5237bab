"""The replay into a real MLflow: each (metric, step) once through kills, and the rest of a run's record."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bc2exp.tracking import follow, runs
from bc2exp.tracking import mlflow as tracker
from bc2exp.tracking.journal import Journal
from bc2exp.tracking.mlflow_runs import open_experiment
from bc2exp.tracking.replay import Point

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def race(tmp_path_factory, make_run, write_steps):
    """Two processes that recorded two runs into a database that neither of them found, at the same time.

    (launch folder, [(exit code, standard output, standard error)]). Creating a database takes seconds: the
    other tests use this one.
    """
    launch = tmp_path_factory.mktemp("launch")
    folders = [make_run(launch, name, f"sqlite:///{launch}/new/mlflow.db") for name in ("one", "other")]
    for folder in folders:
        write_steps(folder, 1, 2, end="done")
    processes = [start(folder, "--sync", "--patience", "0") for folder in folders]
    outputs = [process.communicate(timeout=120) for process in processes]
    return launch, [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


@pytest.fixture
def launch(race):
    return race[0]


@pytest.fixture
def uri(launch):
    return f"sqlite:///{launch}/new/mlflow.db"


@pytest.fixture
def make(make_run, launch, uri, request):
    """make_run in the shared launch folder; names are made unique by the test's."""

    def make(name="a", **fields):
        return make_run(launch, f"{request.node.name}-{name}", uri, **fields)

    return make


@pytest.fixture
def find(uri):
    """find(folder) -> (MLflow run, {metric: [(step, value)]}); fails where there is not exactly one run."""
    client = tracker.MlflowClient(uri)

    def find(folder):
        identity = json.loads((folder / "run.json").read_text())["id"]
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, f"tags.`bc2exp.run` = '{identity}'")
        assert len(found) == 1
        history = {
            name: [
                (point.step, point.value) for point in client.get_metric_history(found[0].info.run_id, name)
            ]
            for name in found[0].data.metrics
        }
        return found[0], history

    return find


def start(folder, *options):
    """A follower in a process of its own, standard input open."""
    return subprocess.Popen(
        [sys.executable, "-m", "bc2exp.tracking.mlflow", *options, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sync(*folders):
    return tracker.main(["--sync", "--patience", "0", *map(str, folders)])


def wait_for_points(uri, number, seconds=60):
    """Wait until the database holds at least `number` values of metrics, and return at once."""
    deadline = time.monotonic() + seconds
    with sqlite3.connect(f"file:{uri.removeprefix('sqlite:///')}?mode=ro", uri=True) as database:
        while database.execute("SELECT count(*) FROM metrics").fetchone()[0] < number:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def count_points(uri):
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        return database.execute("SELECT count(*) FROM metrics").fetchone()[0]


def test_two_runs_that_create_the_same_database_at_the_same_time(race, uri):
    assert race[1] == [(0, "", ""), (0, "", "")]
    client = tracker.MlflowClient(uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "pretrain"]
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_run_whose_follower_and_then_whose_parent_are_killed_and_that_is_resumed(
    make, uri, find, write_steps
):
    folder = make()
    known = count_points(uri)
    write_steps(folder, 1, 2000)
    process = start(folder)
    wait_for_points(uri, known + 1)
    process.kill()
    process.communicate()
    assert json.loads((folder / "tracking.json").read_text())["status"] == "RUNNING"
    (folder / "tracking.json").unlink()  # as if the kill had come between the creation and this file

    process = start(folder)
    deadline = time.monotonic() + 60
    while not (folder / "tracking.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # a Ctrl-C in the terminal reaches it, and must not end it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    output, error = process.communicate()  # the end of the pipe, without "close"
    assert (process.returncode, output, error) == (0, "", "")
    run, history = find(folder)
    assert run.info.status == "FAILED"
    assert sorted(step for step, _ in history["train/loss"]) == list(range(1, 2001))

    write_steps(folder, 1991, 2010, segment=1, end="done", shift=1e-9)
    assert sync(folder) == 0
    again, history = find(folder)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    for name in ("train/loss", "perf/step_time_s"):
        assert sorted(step for step, _ in history[name]) == list(range(1, 2011)), name
    assert dict(history["train/loss"])[1995] == 5.0 - 1995 / 100, "the first value is the run's"
    assert again.data.tags["bc2exp.differences"] == "10"
    assert len((folder / "differences.jsonl").read_text().splitlines()) == 10
    assert json.loads((folder / "tracking.json").read_text()) == {
        "run_id": run.info.run_id,
        "experiment_id": run.info.experiment_id,
        "uri": uri,
        "status": "FINISHED",
    }


def test_what_is_recorded_of_a_run(make, find, write_steps, launch):
    folder = make()
    (folder / "summary.json").write_text("{}")
    with Journal(folder / "metrics.jsonl", 0) as journal:
        journal.event("data", name="embedded", path=None, digest="d" * 64, documents=3, tokens=10)
    write_steps(folder, 1, 3, end="stopped")
    assert sync(folder) == 0
    run, _ = find(folder)
    assert run.info.run_name == "tiny_7b-cpu-single-" + folder.name
    assert run.info.status == "KILLED"
    assert run.info.start_time == 1700000000000
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert run.info.end_time == round(1000 * last["time"]), "when the run ended, not when it was recorded"
    assert run.data.params == {"seed": "1", "model.name": "百川", "model.betas": "[0.9, 0.95]"}
    expected = {
        "resumable": "true",
        "bc2exp.reason": "it is stopped",
        "bc2exp.folder": str(folder),
        "bc2exp.digest": "0123abcd",
        "git.commit": "c0ffee",
    }
    assert {name: run.data.tags[name] for name in expected} == expected
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("embedded", "d" * 36)
    assert json.loads(data.dataset.profile)["tokens"] == 10
    artifacts = Path(run.info.artifact_uri)
    assert artifacts.is_relative_to(launch / "mlartifacts" / "pretrain")
    names = {"resolved.yaml", "overrides.txt", "summary.json", "metrics.jsonl"}
    assert {path.name for path in artifacts.iterdir()} == names
    experiment = tracker.MlflowClient(runs.load(folder).uri).get_experiment_by_name("pretrain")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_rows_of_an_evaluation_are_a_table_however_often_they_are_recorded(
    make, find, uri, monkeypatch, write_steps
):
    folder = make()
    write_steps(folder, 1, 1, end="done")
    table = {"columns": ["review", "label", "tuned"], "data": [["好吃", "积极", "积极"], ["慢", "消极", "x"]]}
    (folder / "predictions.json").write_text(json.dumps(table))
    for _ in range(2):
        assert sync(folder) == 0
    run, _ = find(folder)
    logged = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert logged == [{"path": "predictions.json", "type": "table"}]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # load_table searches there, whatever its client's address
    client = tracker.MlflowClient(uri)
    read = client.load_table(run.info.experiment_id, "predictions.json", [run.info.run_id])
    assert read.to_dict("split")["data"] == table["data"]
    assert list(read.columns) == table["columns"]


def test_recording_again_changes_nothing(make, find, write_steps):
    folder = make()
    with Journal(folder / "metrics.jsonl", 0) as journal:
        journal.event("data", name="embedded", path=None, digest="x")
        journal.metrics(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "odd@name": -0.0})
    write_steps(folder, 2, 5, end="done")
    assert sync(folder) == 0
    before, history = find(folder)
    assert sync(folder, folder) == 0
    again, same = find(folder)
    assert math.isnan(dict(history["train/loss"])[1])
    assert dict(history["train/grad_norm"])[1] == sys.float_info.max, "what MLflow's databases keep of inf"
    assert history["odd_name"] == [(1, 0.0)]
    assert repr(history) == repr(same)
    assert before.info.end_time == again.info.end_time
    assert len(again.inputs.dataset_inputs) == 1
    assert "bc2exp.differences" not in again.data.tags


def test_what_mlflow_holds_is_not_logged_again(make, find):
    """Whatever the time or the value: MLflow's databases themselves drop only what is the same throughout."""
    run = runs.load(make())
    tracker.connect(run, live=True).log([Point("a", 1, 1.5, 10.0), Point("a", 2, 1.5, 11.0)])
    again = [Point("a", 2, 1.5, 12.0), Point("a", 1, 9.9, 10.0), Point("a", 3, 1.5, 13.0)]
    tracker.connect(run, live=True).log(again)
    assert find(run.folder)[1] == {"a": [(1, 1.5), (2, 1.5), (3, 1.5)]}


def test_an_experiment_that_somebody_else_creates_meanwhile(make, monkeypatch, uri):
    """On a server there is no lock to wait for."""
    client = tracker.MlflowClient(uri)
    known = client.get_experiment_by_name("pretrain")
    looks = iter([None, known])
    monkeypatch.setattr(client, "get_experiment_by_name", lambda _: next(looks))
    assert open_experiment(client, runs.load(make()), None) == known.experiment_id
    assert next(looks, "both were asked") == "both were asked"


def test_a_resume_with_other_settings(make, find, write_steps):
    folder = make()
    write_steps(folder, 1, 2, end="stopped")
    sync(folder)
    (folder / "resolved.yaml").write_text("seed: 2\nmodel:\n  name: 百川\nnew: 1\n")
    write_steps(folder, 3, 4, segment=1)
    record = tracker.connect(runs.load(folder), live=True)
    run, _ = find(folder)
    assert run.info.status == record.description["status"] == "RUNNING"
    assert run.data.params["seed"] == "1"
    assert run.data.params["new"] == "1"
    assert run.data.tags["bc2exp.changed_params"] == "seed: 1 -> 2"


def test_many_parameters_and_a_nested_run(make, find, write_steps):
    parent, child = make("parent"), make("child", tags={"bc2exp.parent": "to be replaced"})
    identity = json.loads((parent / "run.json").read_text())["id"]
    text = (child / "run.json").read_text()
    (child / "run.json").write_text(text.replace("to be replaced", identity))
    (child / "resolved.yaml").write_text("".join(f"p{i}: {i}\n" for i in range(250)))
    for folder in (parent, child):
        write_steps(folder, 1, 1, end="done")
    assert sync(parent, child) == 0
    run, _ = find(child)
    assert len(run.data.params) == 250
    assert run.data.tags["mlflow.parentRunId"] == find(parent)[0].info.run_id


def test_the_jobs_of_a_sweep_have_colours_of_their_own(make, find, write_steps):
    jobs = [make(f"job-{number}", tags={"bc2exp.job": str(number)}) for number in range(8)]
    for job in jobs:
        write_steps(job, 1, 1, end="done")
    assert sync(*jobs) == 0
    assert len({find(job)[0].data.tags["mlflow.runColor"] for job in jobs}) == 8


def test_a_job_that_ends_before_its_sweep_is_recorded_is_below_it_in_the_end(make, find, write_steps):
    sweep, job = make("sweep", tags={"bc2exp.sweep": "x"}), make("job", tags={"bc2exp.parent": "to come"})
    identity = json.loads((sweep / "run.json").read_text())["id"]
    (job / "run.json").write_text((job / "run.json").read_text().replace("to come", identity))
    for folder in (sweep, job):
        write_steps(folder, 1, 1, end="done")
    assert sync(job) == 0
    assert "mlflow.parentRunId" not in find(job)[0].data.tags
    assert sync(sweep) == 0
    assert find(job)[0].data.tags["mlflow.parentRunId"] == find(sweep)[0].info.run_id


def test_a_deleted_experiment_is_said_plainly(make, write_steps, uri, capsys):
    folder = make(tracking={"experiment": "gone"})
    write_steps(folder, 1, 1, end="done")
    client = tracker.MlflowClient(uri)
    client.delete_experiment(client.create_experiment("gone"))
    assert tracker.main(["--sync", "--patience", "60", str(folder)]) == follow.UNREACHED
    error = capsys.readouterr().err
    assert "its experiment 'gone'" in error
    assert "mlflow experiments restore -x" in error


def test_a_server_that_is_away(make, write_steps, find, uri):
    folder = make()
    there = (folder / "run.json").read_text()
    (folder / "run.json").write_text(there.replace(uri, "http://127.0.0.1:9"))
    write_steps(folder, 1, 3, end="done")
    before = (folder / "metrics.jsonl").read_bytes()
    begin = time.monotonic()
    process = start(folder, "--patience", "1")
    output, error = process.communicate("close\n", timeout=60)
    assert time.monotonic() - begin < 30
    assert (process.returncode, output) == (follow.UNREACHED, "")
    assert error.startswith("bc2exp: the tracker at http://127.0.0.1:9 could not be reached (")
    assert "Connection refused" in error
    assert error.endswith(
        f"the run is complete in {folder}; `python -m bc2exp task=sync task.run={folder}` records it later\n"
    )
    assert error.count("\n") == 1
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert tracker.main(["--sync", "--patience", "0", "--uri", uri, str(folder)]) == 0
    run, history = find(folder)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history["train/loss"]] == [1, 2, 3]


def test_mlflow_says_nothing_but_warnings():
    assert logging.getLogger("mlflow").getEffectiveLevel() >= logging.WARNING
    assert logging.getLogger("alembic").getEffectiveLevel() >= logging.WARNING
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
