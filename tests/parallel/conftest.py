"""Ranks for the tests that need them: processes, started once, that do what they are told."""

from __future__ import annotations

import pytest
import torch

from bc2exp.hardware import get_backend
from bc2exp.parallel.world import World
from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def ranks():
    """ranks(size, function, *arguments): the answers of that many ranks to function(world, *arguments)."""
    pool = Pool()
    yield pool.ask
    pool.close()


@pytest.fixture(scope="session")
def two_ranks(ranks):
    """ranks, with two of them."""
    return lambda function, *arguments: ranks(2, function, *arguments)


@pytest.fixture
def one_rank():
    """This process as the only rank of a run, on one thread as each of two would be."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    world = World(rank=0, size=1, local_rank=0, local_size=1, backend=get_backend("cpu"))
    world.join()
    yield world
    world.leave()
    torch.set_num_threads(threads)
