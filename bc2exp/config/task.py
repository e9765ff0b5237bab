"""The task group: what is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bc2exp.config.fields import setting
from bc2exp.config.model import Schedule


@dataclass
class TaskConfig:
    """What every task has.

    `on_devices` says whether the task is done by a rank on each device; a task that is not is done by one
    process on the host, whatever the hardware. `supervised`: it reads questions and answers, not plain text;
    None: either, by the kind of the data set.
    """

    on_devices: ClassVar[bool] = True
    supervised: ClassVar[bool | None] = False

    name: str = setting("name of the task; MLflow's experiment")
    recipe: str = setting("which of the model's recipes", choices=("pretrain", "finetune"))


@dataclass
class OptimizerConfig:
    """AdamW. Meanings and units: `Recipe`."""

    lr: float = setting("highest learning rate", above=0)
    beta1: float = setting("decay of the first moment", minimum=0, below=1)
    beta2: float = setting("decay of the second moment", minimum=0, below=1)
    eps: float = setting("added to the root of the second moment", above=0)
    weight_decay: float = setting("decoupled decay of every weight but the norms", minimum=0)
    clip_norm: float | None = setting("highest global gradient norm; null: no clipping", above=0)


@dataclass
class ScheduleConfig:
    """The course of the learning rate."""

    kind: Schedule = setting("cosine, linear or constant after the warmup")
    min_lr: float = setting("learning rate at the end of the schedule", minimum=0)
    warmup_steps: int | None = setting("steps of linear warmup; null: by fraction", minimum=0)
    warmup_fraction: float | None = setting("warmup as a part of all steps", minimum=0, maximum=1)


@dataclass
class PretrainConfig(TaskConfig):
    """Next-token training on plain text."""

    steps: int | None = setting("optimizer steps; null: by epochs", minimum=1)
    epochs: float | None = setting("passes over the training data; null: by steps", above=0)
    global_batch: int = setting("samples an optimizer step, over all devices", minimum=1)
    micro_batch: int | None = setting("samples a forward pass on one device; null: a rank's share", minimum=1)
    init_std: float = setting("standard deviation of fresh weights", above=0)
    optimizer: OptimizerConfig = setting("AdamW")
    schedule: ScheduleConfig = setting("learning rate")
    log_every: int = setting("steps between records in the journal", 1, minimum=1)
    eval_every: int | None = setting("steps between evaluations; null: only at the end", minimum=1)
    eval_samples: int | None = setting("held-out samples an evaluation; null: all", minimum=1)
    save_every: int | None = setting("steps between checkpoints; null: only at the end", minimum=1)
    save_beside: bool = setting(
        "write checkpoints while the training goes on; takes a copy of the state on the host", True
    )
    keep_checkpoints: int = setting("newest checkpoints to keep; the best one stays, too", 2, minimum=1)
    resume: str = setting(
        "auto: the newest unfinished run of this configuration; never; or a run folder", "auto"
    )
    accept_changes: bool = setting(
        "go on from a checkpoint though data, tokenizer, seed or batch have changed since", False
    )


@dataclass
class PrepareConfig(TaskConfig):
    """Text to a token store."""

    on_devices: ClassVar[bool] = False


@dataclass
class DoctorConfig(TaskConfig):
    """Whether the devices, their connections and the installation are fit for a run."""

    micro_batch: int = setting("samples a forward pass of the training step", minimum=1)
    init_std: float = setting("standard deviation of fresh weights", above=0)
    optimizer: OptimizerConfig = setting("AdamW")


@dataclass
class PlanConfig(TaskConfig):
    """What a run would take, told without its devices."""

    on_devices: ClassVar[bool] = False

    global_batch: int = setting("samples an optimizer step, over all devices", minimum=1)
    micro_batch: int | None = setting("samples a forward pass on one device; null: a rank's share", minimum=1)
    alternatives: int = setting("other layouts to list: the nearest that fit, or the fastest", 5, minimum=0)
    reserve: float = setting(
        "part of the memory that a plan leaves to the runtime and to fragmentation", 0.1, minimum=0, below=1
    )


@dataclass
class SyncConfig(TaskConfig):
    """Bring MLflow up to what run folders hold."""

    on_devices: ClassVar[bool] = False

    run: str | None = setting("a run folder; null: every run below runs/", None, path=True)
