"""Two ranks for the tests that need them: two processes, started once, that do what they are told."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bc2exp.hardware import get_backend
from bc2exp.parallel.world import World
from tests.parallel.rank_server import serve

_SECONDS = 120


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """two_ranks(function, *arguments): the answers of both ranks to function(world, *arguments)."""
    context = multiprocessing.get_context("spawn")
    meeting_point = str(tmp_path_factory.mktemp("ranks") / "store")
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(rank, meeting_point, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)

    def ask(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(_SECONDS), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        for rank, (fine, answer) in enumerate(answers):
            assert fine, f"rank {rank}:\n{answer}"
        return [answer for _, answer in answers]

    yield ask
    for process in processes:
        process.kill()


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
