"""The tasks that ranks do, one function each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bc2exp.config.root import Config
from bc2exp.parallel.world import World
from bc2exp.tracking.journal import Journal, NullJournal

Task = Callable[[Config, Path, World, "Journal | NullJournal"], str]
"""Configuration, run folder, ranks, journal -> `done` or `stopped`."""


def get_task(name: str) -> Task:
    """The function of a task; its module is imported only here."""
    if name == "pretrain":
        from bc2exp.tasks.pretrain import pretrain

        return pretrain
    if name == "finetune":
        from bc2exp.tasks.finetune import finetune

        return finetune
    if name == "convert":
        from bc2exp.tasks.convert import convert

        return convert
    if name == "doctor":
        from bc2exp.tasks.doctor import doctor

        return doctor
    if name == "evaluate":
        from bc2exp.tasks.evaluate import evaluate

        return evaluate
    if name == "generate":
        from bc2exp.tasks.generate import generate

        return generate
    if name == "plan":
        from bc2exp.tasks.plan import plan

        return plan
    if name == "prepare":
        from bc2exp.tasks.prepare import prepare

        return prepare
    raise AssertionError(f"task {name!r} is not done by ranks")
