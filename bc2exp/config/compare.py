"""The task `compare`: two runs, what their sources do not say, and how far they may lie apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bc2exp.config.fields import setting
from bc2exp.config.roots import absolute, nearest
from bc2exp.config.task import TaskConfig

_FILES = (".log", ".txt", ".out", ".json", ".jsonl", ".csv", ".yaml", ".yml")
"""What ends so was meant as a file, and not as the name of a run."""


@dataclass
class AboutConfig:
    """What a side's source does not say. What it does say is not said again here."""

    row: str | None = setting("row of a published table, by its name; null: its only one", None)
    sequence_length: int | None = setting("tokens a sample; null: the source says it", None, minimum=1)
    num_devices: int | None = setting("devices of the run; null: the source says it", None, minimum=1)
    global_batch: int | None = setting("samples a step; null: the source says it", None, minimum=1)
    log_every: int = setting(
        "steps between the lines of a Hugging Face log, which bear no number", 1, minimum=1
    )


@dataclass
class TolerancesConfig:
    """How far a may lie from b. Means of relative errors for the curves, one-sided for speed and memory."""

    loss: float = setting("mean relative error of the loss; also the line of the figure", 0.02, above=0)
    grad_norm: float = setting("mean relative error of the gradient norm", 0.1, above=0)
    throughput: float = setting("part by which a's tokens/s/p may lie below b's", 0.05, above=0, below=1)
    time: float = setting("part by which a's s/step may lie above b's", 0.05, above=0)
    memory: float = setting("part by which a's peak memory may lie above b's", 0.1, above=0)


@dataclass
class CompareConfig(TaskConfig):
    """Two runs side by side: a is judged, b is the reference."""

    on_devices: ClassVar[bool] = False

    a: str = setting("run that is judged: a run folder, a log, a published table, or an MLflow id or name")
    b: str = setting("reference: the same kinds of sources")
    about_a: AboutConfig = setting("what a's source does not say")
    about_b: AboutConfig = setting("what b's source does not say")
    tolerances: TolerancesConfig = setting("how far a may lie from b")


def sides_of(values: dict[str, Any], folder: Path) -> Iterator[str]:
    """What a and b name is there, as far as files tell. A check of `checks.check`."""
    task = values["task"]
    for key in ("a", "b") if "tolerances" in task else ():
        named = task[key]
        path = absolute(named, folder)
        if os.path.isdir(path):
            if not os.path.isfile(path / "metrics.jsonl"):
                yield f"task.{key}={named}: is no run folder (it would hold metrics.jsonl)"
        elif os.path.exists(path):
            if not os.access(path, os.R_OK):
                yield f"task.{key}={named}: may not be read (permissions)"
        elif "/" in named or named.lower().endswith(_FILES):
            yield f"task.{key}={named}: no such file or folder{nearest(path)}"
