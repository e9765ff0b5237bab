"""The tasks by name. Known without Hydra, which no rank loads."""

from __future__ import annotations

from bc2exp.config.compare import CompareConfig
from bc2exp.config.convert import ConvertConfig
from bc2exp.config.evaluate import EvaluateConfig
from bc2exp.config.finetune import FinetuneConfig
from bc2exp.config.generate import GenerateConfig
from bc2exp.config.task import DoctorConfig, PlanConfig, PrepareConfig, PretrainConfig, SyncConfig, TaskConfig

TASKS: dict[str, type[TaskConfig]] = {
    "compare": CompareConfig,
    "convert": ConvertConfig,
    "doctor": DoctorConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "finetune": FinetuneConfig,
    "plan": PlanConfig,
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "sync": SyncConfig,
}
