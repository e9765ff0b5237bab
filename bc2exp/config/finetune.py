"""task=finetune: supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bc2exp.config.fields import setting
from bc2exp.config.task import PretrainConfig


@dataclass
class FinetuneConfig(PretrainConfig):
    """Training on questions and answers: what pretraining has, and a choice of the weights that are left."""

    supervised: ClassVar[bool] = True

    best_metric: str | None = setting(
        "the checkpoint in which it is lowest is kept, and the run leaves its weights; null: the last ones",
        None,
        choices=("eval/loss",),
    )


def best_of_several(values: dict[str, Any], folder: Path) -> list[str]:
    """The best of one evaluation is no choice."""
    task = values["task"]
    if task.get("best_metric") is None or task["eval_every"] is not None:
        return []
    return [
        f"task.best_metric={task['best_metric']}: needs task.eval_every; without it only the last weights "
        "are evaluated"
    ]
