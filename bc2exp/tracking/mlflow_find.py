"""What MLflow holds of runs that a person names.

Imported by `bc2exp.tracking.mlflow`, which sets MLflow's environment first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from bc2exp.config.errors import UserError
from bc2exp.config.secrets import whole
from bc2exp.tracking import follow, runs


def find(uri: str, wanted: list[str]) -> list[dict[str, Any]]:
    """What the tracker at `uri` holds of runs named by id or by name, in that order.

    Each: "run_id", "name", "status", "params", "tags" ({name: text}) and "metrics" ({name: [[step, value]]},
    the first recorded first, NaN and infinities as text). Raises UserError for what is not there, or is
    there more than once, and what MLflow raises while it is away.
    """
    database = runs.database(uri)
    if database is not None and not database.is_file():
        raise UserError(f"{wanted[0]}: no such file or folder, and no MLflow database at {database}")
    client = MlflowClient(tracking_uri=whole(uri))
    return [_told(client, _named(client, uri, text)) for text in wanted]


def _named(client: MlflowClient, uri: str, text: str) -> MlflowRun:
    if re.fullmatch("[0-9a-f]{32}", text):
        with contextlib.suppress(MlflowException):  # then it is a name, however odd
            return client.get_run(text)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quote = '"' if "'" in text else "'"
    found = client.search_runs(experiments, f"attributes.run_name = {quote}{text}{quote}", max_results=20)
    if not found:
        raise UserError(f"{text}: no such file or folder, and no run of this id or name in MLflow at {uri}")
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found)
        raise UserError(f"{text}: {len(found)} runs in MLflow have this name; name one by its id: {ids}")
    return found[0]


def _told(client: MlflowClient, run: MlflowRun) -> dict[str, Any]:
    metrics = {}
    for name in run.data.metrics:
        points = sorted(client.get_metric_history(run.info.run_id, name), key=lambda point: point.timestamp)
        numbers = ((point.step, point.value) for point in points)
        metrics[name] = [[step, value if math.isfinite(value) else str(value)] for step, value in numbers]
    about = {"run_id": run.info.run_id, "name": run.info.run_name, "status": run.info.status}
    return {**about, "params": run.data.params, "tags": run.data.tags, "metrics": metrics}


def print_found(uri: str, wanted: list[str]) -> int:
    logging.disable(logging.WARNING)
    try:
        print(json.dumps(find(uri, wanted), ensure_ascii=False))
    except UserError as error:
        print(error, file=sys.stderr)
        return follow.WRONG
    except Exception as error:  # whatever a tracker or a network can do
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"the tracker at {uri} could not be asked ({type(error).__name__}: {reason})", file=sys.stderr)
        return follow.UNREACHED
    return follow.DONE
