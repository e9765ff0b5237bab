"""Experiments and runs of MLflow: found where they are, begun where they are not.

A run is known by the tag `bc2exp.run`, which goes in with the run itself.

Imported by `bc2exp.tracking.mlflow`, which sets MLflow's environment first.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from bc2exp.tracking import follow, runs

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
"""Of the jobs of a sweep in MLflow's charts; told apart by people who see fewer colours, too."""


def open_experiment(client: MlflowClient, run: runs.Run, location: str | None) -> str:
    """The id of the experiment of `run`, begun with its artifacts at `location` where there is none.

    Raises Refused for a deleted one.
    """
    experiment = client.get_experiment_by_name(run.experiment)
    if experiment is None:
        if location is not None and urlparse(location).scheme in ("", "file"):
            Path(unquote(urlparse(location).path)).mkdir(parents=True, exist_ok=True)
        # The kind opens the experiment's page on its runs and not on traces of language-model calls.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return client.create_experiment(run.experiment, artifact_location=location, tags=kind)
        except MlflowException:  # on a server, another run may have been faster
            experiment = client.get_experiment_by_name(run.experiment)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        number = experiment.experiment_id
        raise follow.Refused(
            f"its experiment {run.experiment!r} (id {number}) is deleted; restore it with "
            f"`mlflow experiments restore -x {number}`, or choose another tracking.experiment"
        )
    return experiment.experiment_id


def find_run(client: MlflowClient, experiment: str, identity: str) -> MlflowRun | None:
    """The record of a run. A request to begin it that came after it was given up has begun it twice: then
    the one that holds more stays, and the other is deleted."""
    there = client.search_runs([experiment], f"tags.`bc2exp.run` = '{identity}'")
    found = sorted(there, key=lambda each: (len(each.data.metrics), len(each.data.params)), reverse=True)
    for double in found[1:]:
        client.delete_run(double.info.run_id)
    return found[0] if found else None


def begin_run(client: MlflowClient, experiment: str, run: runs.Run) -> MlflowRun:
    """A new record of `run`, in the experiment of this id."""
    # The tag goes in with the run itself: a kill between the two would make a second run at the next start.
    tags = {"bc2exp.run": run.id}
    if user := os.environ.get("USER"):
        tags["mlflow.user"] = user
    if (job := run.tags.get("bc2exp.job")) is not None:
        # MLflow's own choice depends on the run's id, and often gives two jobs of a sweep the same
        tags["mlflow.runColor"] = _COLORS[int(job) % len(_COLORS)]
    tags |= parent_of(client, experiment, run)
    return client.create_run(experiment, round(1000 * run.created), tags, run.name)


def parent_of(client: MlflowClient, experiment: str, run: runs.Run) -> dict[str, str]:
    """The tag that puts a run below its sweep's. Empty where it has none, or while that is not recorded: the
    tracker hears of the two in any order, so that each looks for the other at its end."""
    identity = run.tags.get("bc2exp.parent")
    if identity is None:
        return {}
    above = find_run(client, experiment, identity)
    if above is None:  # a sweep over tasks has children in several experiments
        others = [each.experiment_id for each in client.search_experiments()]
        above = next((found for each in others if (found := find_run(client, each, identity))), None)
    return {} if above is None else {"mlflow.parentRunId": above.info.run_id}


def adopt_jobs(client: MlflowClient, run_id: str, run: runs.Run) -> None:
    """Put the runs of a sweep's jobs below it that were recorded, and ended, before it was."""
    if "bc2exp.sweep" not in run.tags or "bc2exp.parent" in run.tags:
        return
    experiments = [each.experiment_id for each in client.search_experiments()]
    for job in client.search_runs(experiments, f"tags.`bc2exp.parent` = '{run.id}'"):
        if "mlflow.parentRunId" not in job.data.tags:
            client.set_tag(job.info.run_id, "mlflow.parentRunId", run_id)
