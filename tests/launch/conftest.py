"""Folders to type commands in."""

from __future__ import annotations

import pytest

from tests.launch.commands import Launch


@pytest.fixture
def launch(tmp_path):
    """A folder to type commands in."""
    made = Launch(tmp_path / "launch")
    yield made
    made.close()


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """launches(name): such folders, that live as long as the tests of a module."""
    made = []

    def make(name):
        made.append(Launch(tmp_path_factory.mktemp(name) / "launch"))
        return made[-1]

    yield make
    for each in made:
        each.close()
