"""Processes that are the ranks of one world after another: started once, told what to do."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120


class Pool:
    """Ranks on this machine. Processes start when a world first needs them, and stay."""

    def __init__(self) -> None:
        # One process imports torch, the ranks are its copies: importing takes longer than most tests.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.parallel.preloaded"])
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._worlds = 0
        self._size = 0

    def ask(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The answers of the ranks of a world of `size` to function(world, *arguments)."""
        if size != self._size:
            self._size, self._worlds = size, self._worlds + 1
        meeting_point = str(Path(self._folder.name) / str(self._worlds))
        while len(self._processes) < size:
            self._start()
        for rank in range(size):
            self._pipes[rank].send((rank, size, meeting_point, function, arguments))
        answers = []
        for rank in range(size):
            assert self._pipes[rank].poll(SECONDS), f"rank {rank} does not answer"
            answers.append(self._pipes[rank].recv())
        broken = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if broken:
            self._size = 0  # what the others exchanged may be half done: the next world is a new one
        assert not broken, "\n".join(broken)
        return [answer for _, answer in answers]

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        environment = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")
        process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._processes.append(process)
        self._pipes.append(ours)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        self._folder.cleanup()


def serve(pipe: Any) -> None:
    """Be a rank: do each (function, arguments) that comes, answer (fine, result or traceback)."""
    import torch
    import torch.distributed as dist

    from bc2exp.hardware import get_backend
    from bc2exp.parallel.world import World

    torch.set_num_threads(1)
    backend, joined = get_backend("cpu"), None
    while True:
        rank, size, meeting_point, function, arguments = pipe.recv()
        try:
            if joined != meeting_point:
                if dist.is_initialized():
                    dist.destroy_process_group()
                store = dist.FileStore(meeting_point, size)
                limit = datetime.timedelta(seconds=SECONDS / 2)
                dist.init_process_group(
                    backend.collectives, store=store, rank=rank, world_size=size, timeout=limit
                )
                joined = meeting_point
            world = World(rank=rank, size=size, local_rank=rank, local_size=size, backend=backend)
            answer = True, function(world, *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        forget_groups()
        pipe.send(answer)


def forget_groups() -> None:
    """End all groups of ranks but the one of all: each has threads that wake a hundred times a second."""
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
