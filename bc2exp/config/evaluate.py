"""task=evaluate: models side by side on the evaluation part of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bc2exp.config.fields import setting
from bc2exp.config.model_folders import model_folder_problems, named_models
from bc2exp.config.task import TaskConfig

MODELS = "{name: FOLDER, ...} or [FOLDER, ...] or a FOLDER"


@dataclass
class EvaluateConfig(TaskConfig):
    """Models on the same rows: classes for labelled data, perplexity for plain text."""

    supervised: ClassVar[bool | None] = None

    models: Any = setting(
        f"{MODELS}: published weights, a run, or a checkpoint of one; null is the model of model.*",
        None,
        path=True,
        form=MODELS,
    )
    generate: bool = setting("let the models answer in free text, too", True)
    max_new_tokens: int = setting("tokens of a free answer at most", minimum=1)
    samples: int | None = setting("first rows, or samples of plain text, to evaluate; null: all", minimum=1)
    batch: int = setting("prompts that are answered together", 64, minimum=1)
    batch_tokens: int = setting("tokens of a forward pass where labels or text are scored", 4096, minimum=1)
    resamples: int = setting("bootstrap samples behind an interval", 10_000, minimum=100, maximum=10**6)
    confidence: float = setting("part of them that an interval covers", 0.95, above=0, below=1)
    shown: int = setting("rows of the table on the screen", 10, minimum=0)
    init_std: float = setting("standard deviation of fresh weights", above=0)


def evaluation_problems(values: dict[str, Any], folder: Path) -> list[str]:
    """The models are there."""
    task = values["task"]
    if task["name"] != "evaluate":
        return []
    try:
        named = named_models(task["models"], values["model"]["name"])
    except ValueError as error:
        return [f"task.models: {error}; {MODELS}, null for the model of model.*"]
    return [
        problem
        for name, source in named.items()
        for problem in model_folder_problems(
            "task.models" if isinstance(task["models"], str) else f"task.models.{name}",
            source,
            values,
            folder,
        )
    ]
