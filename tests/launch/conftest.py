"""Folders to type commands in, and one run that nothing disturbed."""

from __future__ import annotations

import pytest

from tests.launch.commands import Launch

STEPS = ("task.steps=12", "task.save_every=4", "task.eval_every=6", "task.micro_batch=2")


@pytest.fixture
def launch(tmp_path):
    """A folder to type commands in."""
    made = Launch(tmp_path / "launch")
    yield made
    made.close()


@pytest.fixture(scope="session")
def steps():
    """The words of the training that many tests share: 12 steps, checkpoints after 4 and 8."""
    return STEPS


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """That training without any disturbance: its run folder."""
    made = Launch(tmp_path_factory.mktemp("undisturbed") / "launch")
    made.run(*STEPS)
    yield made.only_run()
    made.close()


@pytest.fixture(scope="session")
def undisturbed_pair(tmp_path_factory):
    """The same on two ranks."""
    made = Launch(tmp_path_factory.mktemp("undisturbed_pair") / "launch")
    made.run(*STEPS, "hardware=2cpu")
    yield made.only_run()
    made.close()
