"""The rank side of the fixture `two_ranks`."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch.distributed as dist

from bc2exp.hardware import get_backend
from bc2exp.parallel.world import World


def serve(rank: int, meeting_point: str, pipe: Any) -> None:
    """Be one of two ranks: do each (function, arguments) that comes, answer (fine, result or traceback)."""
    torch.set_num_threads(1)
    backend = get_backend("cpu")
    store = dist.FileStore(meeting_point, 2)
    dist.init_process_group(backend.collectives, store=store, rank=rank, world_size=2)
    world = World(rank=rank, size=2, local_rank=rank, local_size=2, backend=backend)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(world, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
