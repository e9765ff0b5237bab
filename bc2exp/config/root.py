"""The whole configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass

from bc2exp.config.dataset import DatasetConfig
from bc2exp.config.fields import setting
from bc2exp.config.hardware import HardwareConfig
from bc2exp.config.launch import LaunchConfig
from bc2exp.config.model import ModelConfig
from bc2exp.config.parallelism import ParallelismConfig
from bc2exp.config.sweep import SweepConfig
from bc2exp.config.task import TaskConfig

GROUPS = ("model", "hardware", "parallelism", "dataset", "task")


@dataclass
class TrackingConfig:
    """Where MLflow keeps the record. The journal in the run folder is kept in any case."""

    enabled: bool = setting("record runs in MLflow", True)
    uri: str | None = setting("server or database; null: $MLFLOW_TRACKING_URI, else ./mlflow.db", None)
    experiment: str | None = setting("experiment; null: the task's name", None)
    run_name: str | None = setting("name of the run; null: model-hardware-layout-time", None)
    patience_s: float = setting("seconds to wait for the tracker at the end of a run", 60.0, minimum=0)


@dataclass
class Config:
    """Five groups, the tracker, the machines, the sweep and the seed."""

    model: ModelConfig = setting("model")
    hardware: HardwareConfig = setting("hardware")
    parallelism: ParallelismConfig = setting("layout")
    dataset: DatasetConfig = setting("data")
    task: TaskConfig = setting("task")
    tracking: TrackingConfig = setting("MLflow")
    launch: LaunchConfig = setting("several machines")
    sweep: SweepConfig = setting("several jobs")
    seed: int = setting("seeds fresh weights and the order of samples", 1234, minimum=0, maximum=2**63 - 1)
