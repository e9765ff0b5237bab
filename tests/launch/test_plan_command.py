"""`task=plan` as a person types it: no devices are needed, and what does not fit ends with 1."""

from __future__ import annotations

import json

import pytest

from bc2exp.tracking import mlflow as tracker

pytestmark = pytest.mark.slow  # plans of the 7B by the whole command


def plan(launch, *words, code=0):
    command = launch.run("task=plan", *words, code=code)
    run = max(launch.runs(), key=lambda path: path.stat().st_mtime_ns)
    return command, json.loads((run / "plan.json").read_text())


def test_the_pretraining_recipe_on_8_devices_fits_and_is_not_tracked_unless_asked(launch):
    # the small training's keys of the model do not go with it
    command, found = plan(launch, "hardware=8npu", *SEVEN_B)
    assert found["fits"] is True
    assert found["plan"]["choice"]["tensor"] == 8
    assert found["plan"]["choice"]["sequence_parallel"] is True
    assert found["plan"]["memory"]["parameters"] * 8 >= 4 * 7_505_973_248
    assert len(found["alternatives"]) == 5
    assert "fits: " in command.out
    assert "assumed: operations at 60% of 294.9 TFLOP/s" in command.out
    assert not (launch.folder / "mlflow.db").exists()


def test_what_does_not_fit_names_the_nearest_that_do(launch):
    words = ("hardware=8npu", "parallelism=zero2", "task.micro_batch=4", "task.alternatives=2", *SEVEN_B)
    command, found = plan(launch, *words, "tracking.enabled=true", code=1)
    assert found["fits"] is False
    limit = 64 * 2**30 * 0.9
    assert found["plan"]["memory"]["total"] > limit
    assert all(each["memory"]["total"] <= limit for each in found["alternatives"])
    assert "does NOT fit" in command.out
    nearest = found["alternatives"][0]["words"]
    assert nearest.count("=") == 1
    assert nearest in command.out
    client = tracker.MlflowClient(f"sqlite:///{launch.folder}/mlflow.db")
    (record,) = client.search_runs([client.get_experiment_by_name("plan").experiment_id])
    assert record.data.metrics["plan/parameters_gib"] > 3
    assert "plan.json" in {file.path for file in client.list_artifacts(record.info.run_id)}


SEVEN_B = (
    "model.hidden_size=4096",
    "model.intermediate_size=11008",
    "model.num_heads=32",
    "model.num_layers=32",
    "dataset.sequence_length=4096",
)
