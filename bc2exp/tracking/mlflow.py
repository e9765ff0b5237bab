"""MLflow as the tracker of a run. It and the modules that it names know MLflow, and no other does.

    python -m bc2exp.tracking.mlflow RUN_FOLDER           follow a run; stdin is a pipe from its parent
    python -m bc2exp.tracking.mlflow --sync RUN_FOLDER…   record runs that are over
    python -m bc2exp.tracking.mlflow --find RUN… --uri …  print what it holds of runs, by id or name, as JSON

The follower ends when the parent writes "close" and a newline, or dies (the pipe ends). Its exit codes are in
`bc2exp.tracking.follow`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# The import of mlflow below takes seconds. A terminal's Ctrl-C reaches the whole group of processes; the
# follower must live through it, because it is the parent that decides when a run is over.
if __name__ == "__main__" and not {"--sync", "--find"} & set(sys.argv):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

# Failures are to come in seconds, not in the four minutes of the defaults: whoever calls tries again anyway.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from bc2exp.config.secrets import hiding, whole
from bc2exp.storage import lock
from bc2exp.tracking import follow, runs
from bc2exp.tracking.checkpoints import Checkpoint
from bc2exp.tracking.logged_models import LoggedModels
from bc2exp.tracking.mlflow_find import print_found
from bc2exp.tracking.mlflow_runs import adopt_jobs, begin_run, find_run, open_experiment, parent_of
from bc2exp.tracking.replay import Point

_METRICS_A_CALL = 1000
_PARAMS_A_CALL = 100
_MAX_TAG = 5000
_MAX_DIGEST = 36
_CREATION_SECONDS = 60.0

_ARTIFACTS = (
    "resolved.yaml",
    "overrides.txt",
    "git.json",
    "git.diff",
    "environment.json",
    "summary.json",
    "loss.png",
    "report.json",
    "plan.json",
    "conversion.json",
    "doctor.json",
    "rehearsal.json",
    "compare.json",
    "compare.html",
    "loss_overlay.png",
    "loss_error.png",
    "sweep.json",
    "sweep.png",
    "ledger.jsonl",
    "evaluation.json",
    "predictions.csv",
    "confusion.png",
    "answers.jsonl",
    "lengths.png",
    "metrics.jsonl",
    "differences.jsonl",
)
_TABLES = ("predictions.json",)
"""Files that MLflow shows as tables: {"columns": [...], "data": [[...], ...]}."""


class MlflowRecord:
    """One run in MLflow. Made by `connect`; what it does is said in `replay.Tracker`."""

    def __init__(self, client: MlflowClient, run: runs.Run, found: MlflowRun) -> None:
        self._client = client
        self._run = run
        self._id = found.info.run_id
        self._models = LoggedModels(client, run, found.info.experiment_id, self._id)
        self._experiment = found.info.experiment_id
        self._status = found.info.status
        self._logged = {
            (name, metric.step)
            for name in found.data.metrics
            for metric in client.get_metric_history(self._id, name)
        }

    @property
    def description(self) -> dict[str, str]:
        """What `tracking.json` is to hold."""
        return {
            "run_id": self._id,
            "experiment_id": self._experiment,
            "uri": self._run.uri,
            "status": self._status,
        }

    def log(self, points: list[Point]) -> None:
        """Record the points that MLflow does not hold yet. NaN stays NaN; databases keep ±inf as ±1.8e308."""
        metrics = [
            Metric(runs.allowed(point.name), point.value, round(1000 * point.time), point.step)
            for point in points
        ]
        new = [metric for metric in metrics if (metric.key, metric.step) not in self._logged]
        for begin in range(0, len(new), _METRICS_A_CALL):
            self._client.log_batch(self._id, metrics=new[begin : begin + _METRICS_A_CALL])

    def data(self, record: dict[str, Any]) -> None:
        """Record the data set as an input of the run. MLflow knows it by name and digest."""
        about = {key: value for key, value in record.items() if key not in ("event", "time", "segment")}
        dataset = Dataset(
            name=str(record["name"]),
            digest=str(record["digest"])[:_MAX_DIGEST],
            source_type="local",
            source=json.dumps({"uri": record.get("path") or f"bc2exp:{record['name']}"}, ensure_ascii=False),
            profile=json.dumps(about, ensure_ascii=False),
        )
        context = InputTag("mlflow.data.context", str(record.get("split", "train")))
        self._client.log_inputs(self._id, datasets=[DatasetInput(dataset, [context])])

    def checkpoints(self, checkpoints: list[tuple[Checkpoint, list[Point]]]) -> None:
        """Record checkpoints as logged models, which are not uploaded."""
        self._models.record(checkpoints)
        if not self._models.supported:
            self.tags({"bc2exp.checkpoints": "not recorded: this server has no logged models"})

    def tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""
        pairs = [RunTag(name, value[:_MAX_TAG]) for name, value in tags.items()]
        self._client.log_batch(self._id, tags=pairs)

    def parameters(self, wanted: dict[str, str], logged: dict[str, str]) -> None:
        """Log parameters. MLflow refuses to change one: what a resume changed is said in a tag instead."""
        new = [Param(name, value) for name, value in wanted.items() if name not in logged]
        for begin in range(0, len(new), _PARAMS_A_CALL):
            self._client.log_batch(self._id, params=new[begin : begin + _PARAMS_A_CALL])
        changed = [
            f"{name}: {logged[name]} -> {value}"
            for name, value in wanted.items()
            if logged.get(name, value) != value
        ]
        if changed:
            self.tags({"bc2exp.changed_params": "\n".join(changed)})

    def artifacts(self) -> None:
        """Store those files of the record that are there by now."""
        for name in _ARTIFACTS:
            if (path := self._run.folder / name).is_file():
                self._client.log_artifact(self._id, str(path))
        tables = [name for name in _TABLES if (self._run.folder / name).is_file()]
        for name in tables:
            self._client.log_artifact(self._id, str(self._run.folder / name))
        if tables:  # this is how log_table marks them, which would add the rows again at every replay
            logged = [{"path": name, "type": "table"} for name in tables]
            self.tags({"mlflow.loggedArtifacts": json.dumps(logged)})

    def reopen(self) -> None:
        """Say that the run goes on."""
        if self._status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")
            self._status = "RUNNING"

    def end(self, status: str, time: float) -> None:
        """Close the run with `status`, at Unix time `time`."""
        find_run(self._client, self._experiment, self._run.id)  # a late request may have begun it again
        self.tags(parent_of(self._client, self._experiment, self._run))
        adopt_jobs(self._client, self._id, self._run)
        self._client.set_terminated(self._id, status, end_time=round(1000 * time))
        self._status = status


def connect(run: runs.Run, live: bool) -> MlflowRecord:
    """Open MLflow's record of `run`, creating database, experiment and record where they are missing.

    `live` sets a record that was closed back to RUNNING. Raises what MLflow raises while it is away, and
    Refused for a deleted experiment.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = runs.database(run.uri)
    if database is None:
        client = MlflowClient(tracking_uri=whole(run.uri))
        experiment = open_experiment(client, run, run.artifact_location)
    else:
        location = run.artifact_location or str(database.parent / "mlartifacts" / run.experiment)
        database.parent.mkdir(parents=True, exist_ok=True)
        # Two runs that start together must not both create the tables.
        with lock.hold(database.with_name(database.name + ".lock"), _CREATION_SECONDS):
            client = MlflowClient(tracking_uri=whole(run.uri))
            experiment = open_experiment(client, run, location)
    found = find_run(client, experiment, run.id) or begin_run(client, experiment, run)
    record = MlflowRecord(client, run, found)
    if live:
        record.reopen()
    record.tags(_tags(run))
    record.parameters(runs.parameters(run), found.data.params)
    with suppress(Exception):  # the numbers do without files, and the end tells what is wrong with them
        record.artifacts()
    return record


def _tags(run: runs.Run) -> dict[str, str]:
    return {
        "mlflow.source.name": "bc2exp",
        "mlflow.source.type": "LOCAL",
        "bc2exp.folder": str(run.folder),
        **run.tags,
    }


def main(arguments: list[str] | None = None) -> int:
    """Follow or sync, as the module says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bc2exp.tracking.mlflow")
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--sync", action="store_true", help="record runs that are over, and end")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for the tracker")
    parser.add_argument("--find", action="store_true", help="print what the tracker holds of runs, as JSON")
    parser.add_argument("--uri", help="with --sync: record in this tracker and not in the run's own")
    options = parser.parse_args(arguments)
    if options.find:
        return print_found(options.uri, options.runs)
    folders = [Path(text) for text in options.runs]
    if options.sync:
        return follow.sync(folders, connect, options.patience, options.uri)
    if len(folders) > 1 or options.uri:
        parser.error("following takes one run folder and no --uri")
    return follow.follow(folders[0], connect, options.patience, follow.Parent())


if __name__ == "__main__":
    sys.stdout, sys.stderr = hiding(sys.stdout), hiding(sys.stderr)
    sys.exit(main())
