"""A device's out-of-memory error, told in a sentence with the layouts that would fit.

The plan is made by `python -m bc2exp.tasks.out_of_memory RUN_FOLDER BYTES`, in a process of its own: planning
needs a process group without peers, and the rank's has peers, who wait in it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bc2exp.config.load import read
from bc2exp.config.parallelism import micro_batch_of
from bc2exp.config.root import Config
from bc2exp.config.task import PlanConfig, PretrainConfig
from bc2exp.parallel.world import World
from bc2exp.plan import search
from bc2exp.plan.planner import Choice, Plan
from bc2exp.storage.lock import LockHeld, hold
from bc2exp.tasks.plan import make_choice, make_planner
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train import TrainingError

if TYPE_CHECKING:
    from bc2exp.tasks import Task

SECONDS = 120.0
"""So long a rank waits for the plan; the largest models take about 10 s."""
RESERVE = 0.1
"""Part of the memory that is left to the runtime and to fragmentation, as `task=plan` does by default."""
_LISTED = 3
_WITHOUT_PLAN = "a smaller task.micro_batch, parallelism.recompute=full or more devices would take less"


Describe = Callable[[Config, Path, World, BaseException], str]
"""Configuration, run folder, ranks, a device's error -> the sentence for a person."""


def telling(task: Task, sentence: Describe) -> Task:
    """`task`, whose out-of-memory errors become a TrainingError with this sentence."""

    @wraps(task)
    def told(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
        try:
            return task(config, folder, world, journal)
        except torch.OutOfMemoryError as error:
            raise TrainingError(sentence(config, folder, world, error)) from error

    return told


def telling_what_fits(task: Task) -> Task:
    """A training whose out-of-memory errors say what would fit."""
    return telling(task, describe)


def telling_what_takes_less(task: Task) -> Task:
    """A task that trains nothing, whose out-of-memory errors say what would take less."""
    return telling(task, _describe_answering)


def _describe_answering(config: Config, folder: Path, world: World, error: BaseException) -> str:
    return (
        f"rank {world.rank} is out of memory ({str(error).splitlines()[0]}); a smaller task.batch, "
        "or a model shared by more devices (parallelism=tp), would take less"
    )


def describe(config: Config, folder: Path, world: World, error: BaseException) -> str:
    """What happened on this rank, and the nearest layouts that fit."""
    taken, total = world.backend.peak_allocated_bytes(), world.backend.total_memory_bytes()
    if total is None and config.hardware.memory_gib is not None:
        total = int(config.hardware.memory_gib * 2**30)
    if total is None:
        return f"rank {world.rank} is out of memory ({str(error).splitlines()[0]}); {_WITHOUT_PLAN}"
    used = (
        ""
        if taken is None
        else f": {_size(taken)} of {_size(total)} were taken by tensors when more was asked"
    )
    return f"rank {world.rank} is out of memory{used}; {_ask(folder, total)}"


def _ask(folder: Path, total: int) -> str:
    """`what_fits` of another process. Ranks that are out of memory together ask one after another: the first
    to have an answer ends the run."""
    command = [sys.executable, "-m", __name__, str(folder), str(total)]
    try:
        with hold(folder / "logs" / "what-fits.lock", wait_seconds=SECONDS):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, check=True
            )
    except (OSError, LockHeld, subprocess.SubprocessError):
        return _WITHOUT_PLAN  # it must never hide what happened
    return done.stdout.strip()


def what_fits(config: Config, total: int) -> str:
    """The nearest layouts of the configured run that fit devices of `total` bytes, in words.

    Where the plan thought that the run fits (somebody else was on the device, or the memory is in pieces),
    those that take less.
    """
    planner, chosen = make_planner(config, NullJournal()), make_choice(config)
    own = planner.plan(chosen, exact=True).memory.total
    budget = min(total * (1 - RESERVE), own * (1 - RESERVE))
    hardware = config.hardware
    per_node = hardware.devices_per_node or hardware.num_devices
    found = list(search.choices(planner, hardware.num_devices, per_node, chosen.defer_reduction))
    plans = search.ranked(planner, found, budget)
    nearest = search.nearest_that_fit(plans, chosen, budget)[:_LISTED]
    said = f"this run takes {_size(own)} by plan"
    if nearest:
        named = ", or ".join(_words(plan, chosen, config) for plan in nearest)
        return f"{said}, and of {_size(total)} these would fit: {named}"
    least = min(plans, key=lambda plan: plan.memory.total)
    count = f"{hardware.num_devices} device{'s' * (hardware.num_devices > 1)}"
    smallest = _words(least, chosen, config)
    return (
        f"{said}, and no layout of {count} fits {_size(total)}: the smallest is {smallest}; more devices or "
        "a smaller model"
    )


def _words(plan: Plan, chosen: Choice, config: Config) -> str:
    choice, task = plan.choice, config.task
    assert isinstance(task, (PlanConfig, PretrainConfig))
    words = search.words(choice, chosen)
    share = task.global_batch // choice.num_data_ranks
    implied = task.micro_batch is None and "micro_batch" not in words
    if implied and choice.micro_batch != micro_batch_of(share, choice.pipeline):
        # left out, it would follow the layout: more samples on fewer data ranks
        words = f"{words} task.micro_batch={choice.micro_batch}"
    return f"{words or 'this one'} ({_size(plan.memory.total)})"


def _size(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


if __name__ == "__main__":
    print(what_fits(read(Path(sys.argv[1]) / "resolved.yaml"), int(sys.argv[2])))
