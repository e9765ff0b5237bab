"""The real 7B and 13B, laid over worlds that exist in name only: every weight once, none large left whole."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bc2exp.hardware import get_backend
from bc2exp.model import Baichuan2, parameter_count
from bc2exp.model.plan import tensor_cut
from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.parts import Parts
from bc2exp.parallel.shard import local
from bc2exp.parallel.world import World

SHAPES = {
    "7b": ({"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32}, "rope"),
    "13b": ({"hidden_size": 5120, "intermediate_size": 13696, "num_layers": 40, "num_heads": 40}, "alibi"),
}
COUNTS = {"7b": 7_505_973_248, "13b": 13_896_668_160}
WORLDS = {
    "tp8": {"tensor": 8},
    "tp8 x pp2 x dp4": {"pipeline": 2, "shard": 4, "tensor": 8},
    "zero3 64": {"shard": 64},
}


@contextmanager
def fake_rank(rank, degrees):
    """Rank `rank` of a world in which nothing is exchanged."""
    size = torch.Size(degrees.values()).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    world = World(rank=rank, size=size, local_rank=0, local_size=1, backend=get_backend("cpu"))
    try:
        yield Mesh(world, **degrees)
    finally:
        dist.destroy_process_group()


def build(kind):
    sizes, position = SHAPES[kind]
    with torch.device("meta"):
        return Baichuan2(vocab_size=125696, position=position, ops=get_backend("cpu").ops, **sizes)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_rank_has_its_parts_and_no_large_weight_whole(kind, world):
    degrees = WORLDS[world]
    size = torch.Size(degrees.values()).numel()
    for rank in {0, size // 2 + 1, size - 1}:
        with fake_rank(rank, degrees) as mesh:
            start = time.perf_counter()
            layout = parallelize(
                build(kind), mesh, precision="bf16", sequence_parallel=mesh.tensor > 1, recompute="full"
            )
            print(f"{kind} over {world}, rank {rank}: {time.perf_counter() - start:.1f} s")
            held = {name: local(value.detach()) for name, value in layout.model.named_parameters()}
            for name, part in held.items():
                whole = torch.empty(layout.parts.shapes[name], device="meta")
                assert part.shape == layout.parts.mine(name, whole).shape, name
                assert part.numel() <= whole.numel() / 8 or name.endswith("norm.weight"), name
            mine = {name for name in layout.parts.shapes if layout.parts.stage(name) == mesh.stage}
            assert held.keys() == mine


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_weight_lies_somewhere_once(kind, world):
    degrees = WORLDS[world]
    model = build(kind)
    assert parameter_count(model) == COUNTS[kind]
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    numbers: Counter[str] = Counter()
    regions = set()
    size = torch.Size(degrees.values()).numel()
    for rank in range(size):
        world_of_rank = World(rank=rank, size=size, local_rank=0, local_size=1, backend=get_backend("cpu"))
        mesh = Mesh(world_of_rank, **degrees)
        parts = Parts(mesh, shapes, model.shape["num_layers"])
        for name, shape in shapes.items():
            whole_on_every = tensor_cut(name).dim is None and mesh.tensor_rank > 0
            if parts.stage(name) == mesh.stage and not whole_on_every:
                part = parts.mine(name, torch.empty(shape, device="meta"))
                region = (name, part.storage_offset())
                assert region not in regions
                regions.add(region)
                numbers[name] += part.numel()
    assert numbers == {name: torch.Size(shape).numel() for name, shape in shapes.items()}
