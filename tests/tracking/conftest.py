"""The parts of these tests as fixtures."""

from __future__ import annotations

import functools

import pytest

from tests.tracking import parts


@pytest.fixture
def memory_tracker():
    return parts.MemoryTracker


@pytest.fixture(scope="session")
def make_run():
    """Make a run folder as the parent leaves it: make_run(launch, name, uri, **run.json fields) -> folder."""
    return parts.make_run


@pytest.fixture
def new_run(tmp_path):
    """make_run in a launch folder of the test's own: new_run(name, uri=…, **run.json fields) -> folder."""
    return functools.partial(parts.make_run, tmp_path)


@pytest.fixture(scope="session")
def write_steps():
    """Append a segment: write_steps(folder, first, last, segment=0, end=None, shift=0.0)."""
    return parts.write_steps
