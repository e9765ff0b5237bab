"""Checkpoints as MLflow's logged models: named, ranked by the metrics of their step, and not uploaded.

The weights stay in the run folder; what MLflow gets is where they are and what they were worth. A model of a
checkpoint is found again by its tag, so that a replay may begin again at any point.

Imported by `bc2exp.tracking.mlflow`, which sets MLflow's environment first.
"""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Metric
from mlflow.exceptions import MlflowException

from bc2exp.tracking import runs
from bc2exp.tracking.checkpoints import Checkpoint
from bc2exp.tracking.replay import Point

_CHECKPOINT = "bc2exp.checkpoint"
_TYPE = "checkpoint"
# What MLflow's own create_external_model sets: the artifacts lie outside of MLflow.
_EXTERNAL = {"mlflow.model.isExternal": "true"}


class LoggedModels:
    """The logged models of one run of MLflow.

    Raises what MLflow raises while it is away. A server that has no logged models (before MLflow 3) is no
    error: `supported` says so, and nothing more is asked of it.
    """

    def __init__(self, client: MlflowClient, run: runs.Run, experiment: str, run_id: str) -> None:
        self.supported = True
        self._client = client
        self._run = run
        self._experiment = experiment
        self._run_id = run_id
        self._known: dict[str, LoggedModel] | None = None
        self._logged: set[tuple[str, str, int]] = set()

    def record(self, checkpoints: list[tuple[Checkpoint, list[Point]]]) -> None:
        """Make the models that are missing, and give each the metrics and tags that it lacks."""
        if not self.supported:
            return
        try:
            known = self._find()
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            self.supported = False
            return
        for checkpoint, points in checkpoints:
            model = known.get(checkpoint.name) or self._create(checkpoint)
            known[checkpoint.name] = self._complete(model, checkpoint, points)

    def _find(self) -> dict[str, LoggedModel]:
        """The models that are there, by the name of their checkpoint. One that was begun twice, because a
        request arrived after it was given up, is there once afterwards."""
        if self._known is None:
            self._known = {}
            token = None
            while True:
                wanted = f"source_run_id = '{self._run_id}'"
                page = self._client.search_logged_models([self._experiment], wanted, page_token=token)
                for model in page:
                    self._take(model)
                if not (token := page.token):
                    break
        return self._known

    def _take(self, model: LoggedModel) -> None:
        assert self._known is not None
        name = model.tags.get(_CHECKPOINT)
        if name is None:
            return  # somebody else's
        before = self._known.get(name)
        more, less = sorted((model, before or model), key=lambda each: len(each.metrics or ()), reverse=True)
        if more is not less:
            self._client.delete_logged_model(less.model_id)
        self._known[name] = more
        self._logged |= {(name, metric.key, metric.step) for metric in more.metrics or ()}

    def _create(self, checkpoint: Checkpoint) -> LoggedModel:
        return self._client.create_logged_model(
            self._experiment,
            name=checkpoint.name,
            source_run_id=self._run_id,
            tags={**_EXTERNAL, **self._tags(checkpoint)},
            params={"step": str(checkpoint.step)},
            model_type=_TYPE,
        )

    def _complete(self, model: LoggedModel, checkpoint: Checkpoint, points: list[Point]) -> LoggedModel:
        new = [
            # the run has the very same point already, which MLflow does not keep twice
            Metric(
                name, point.value, round(1000 * point.time), point.step, model.model_id, run_id=self._run_id
            )
            for point in points
            if (checkpoint.name, name := runs.allowed(point.name), point.step) not in self._logged
        ]
        if new:
            self._client.log_batch(self._run_id, metrics=new)
            self._logged |= {(checkpoint.name, metric.key, metric.step) for metric in new}
        tags = self._tags(checkpoint)
        if any(model.tags.get(name) != value for name, value in tags.items()):
            self._client.set_logged_model_tags(model.model_id, tags)
            model.tags.update(tags)
        if model.status != "READY":
            model = self._client.finalize_logged_model(model.model_id, "READY")
        return model

    def _tags(self, checkpoint: Checkpoint) -> dict[str, str]:
        return {
            _CHECKPOINT: checkpoint.name,
            "bc2exp.folder": str(self._run.folder / checkpoint.path),
            "bc2exp.state": checkpoint.state,
            "bc2exp.best": str(checkpoint.best).lower(),
        }
