"""What the README promises first: one command, and a Baichuan2 learns. On real text as well."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bc2exp.tracking.journal import read
from tests.shared_data import shared_data

METRICS = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "perf/samples_per_s",
    "perf/tokens_per_s_per_device",
    "perf/step_time_s",
    "mem/peak_gib",
    "eval/loss",
}


def run_command(folder: Path, *overrides: str) -> tuple[Path, str]:
    """Run the main job in a folder; returns the run's folder and what the person saw."""
    repository = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-m", "bc2exp", *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (file.parent for file in folder.glob("runs/*/*/run.json"))
    return run, done.stdout


def series(run: Path, name: str) -> list[float]:
    """A metric of the journal, in the order of steps."""
    return [line["metrics"][name] for line in read(run / "metrics.jsonl") if name in line.get("metrics", {})]


def event(run: Path, name: str) -> dict[str, Any]:
    """The one event of that name."""
    (found,) = (line for line in read(run / "metrics.jsonl") if line.get("event") == name)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_first_command_learns_and_is_recorded(tmp_path: Path) -> None:
    run, seen = run_command(tmp_path)
    losses = series(run, "train/loss")
    entropy = event(run, "data")["unigram_entropy"]
    assert mean(losses[-5:]) <= 0.6 * mean(losses[:5])
    assert mean(losses[-5:]) < entropy
    assert min(series(run, "eval/loss")) < entropy

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "pretrain")
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert recorded.info.status == "FINISHED"
    assert set(recorded.data.metrics) == METRICS
    assert Path(recorded.info.artifact_uri).is_relative_to(tmp_path)
    artifacts = {entry.path for entry in client.list_artifacts(recorded.info.run_id)}
    assert artifacts >= {"resolved.yaml", "overrides.txt", "git.json", "environment.json"}
    assert artifacts >= {"summary.json", "loss.png", "metrics.jsonl"}
    assert recorded.data.params["task.optimizer.lr"] == "0.002"
    (data,) = recorded.inputs.dataset_inputs
    assert data.dataset.name == "embedded"

    summary = json.loads((run / "summary.json").read_text())
    assert all(summary["throughput"]["identities"].values())
    assert (run / "weights" / "model.safetensors.index.json").is_file()
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path / 'mlflow.db'}" in seen


@pytest.mark.slow
def test_the_13b_kind_learns_too(tmp_path: Path) -> None:
    run, _ = run_command(tmp_path, "model=tiny_13b", "task.steps=40", "tracking.enabled=false")
    losses = series(run, "train/loss")
    assert mean(losses[-5:]) < event(run, "data")["unigram_entropy"] - 0.5


@pytest.mark.slow
def test_fine_tuning_learns_the_embedded_reviews(tmp_path: Path) -> None:
    run, seen = run_command(tmp_path, "task=finetune")
    losses = series(run, "train/loss")
    assert len(losses) == 75  # 4 epochs of 300 rows, 16 a step
    assert mean(losses[-5:]) < 0.1 < 5 < losses[0]
    work = json.loads((run / "summary.json").read_text())["work"]
    assert work["times_fewer"] > 5
    assert f"{work['times_fewer']:.1f} times fewer" in " ".join(seen.split())

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "finetune")
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert set(recorded.data.metrics) == METRICS | {"data/tokens_per_step", "data/positions_per_step"}
    assert recorded.inputs.dataset_inputs[0].dataset.name == "embedded_reviews"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_text_with_the_genuine_tokenizer(tmp_path: Path) -> None:
    run, _ = run_command(
        tmp_path,
        "task=pretrain",
        "model=tiny_7b",
        f"model.tokenizer={shared_data('tokenizer/baichuan2_tokenizer.model')}",
        "dataset=text",
        f"dataset.path={shared_data('train-00000-of-00001-a09b74b3ef9c3b56.parquet')}",
        "dataset.column=text",
        "task.steps=30",
    )
    losses = series(run, "train/loss")
    assert 12.2 < losses[0] < 12.4
    assert mean(losses[-5:]) < 7
    assert event(run, "data")["tokens"] == 5_883_807
    assert max(series(run, "mem/peak_gib")) < 3
    config = json.loads((run / "weights" / "config.json").read_text())
    assert config["vocab_size"] == 125_696
