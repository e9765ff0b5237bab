"""The ranks of a run in four axes: pipeline stages, copies, shards, tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bc2exp.config.parallelism import AXES
from bc2exp.parallel.world import World


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands among (pipeline, replicate, shard, tensor), the last one varying fastest.

    Ranks that differ in `replicate` or `shard` compute on different samples: the data ranks. Those of one
    data rank see the same samples and share the model.

    Attributes:
        world: the ranks; `join` has been called where there are several.
        pipeline, replicate, shard, tensor: degrees; their product is `world.size`.
    """

    world: World
    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        assert self.pipeline * self.replicate * self.shard * self.tensor == self.world.size

    @cached_property
    def devices(self) -> DeviceMesh:
        """torch's mesh. Every rank must ask for it, as the first time makes the groups."""
        shape = (self.pipeline, self.replicate, self.shard, self.tensor)
        return init_device_mesh(self.world.device.type, shape, mesh_dim_names=AXES)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in `axis` only, in order."""
        return self.devices.get_group(axis)

    @property
    def tensor_rank(self) -> int:
        """Which part of every layer this rank has."""
        return self.world.rank % self.tensor

    @property
    def shard_rank(self) -> int:
        """Which shard of its parameters this rank has."""
        return self.world.rank // self.tensor % self.shard

    @property
    def replicate_rank(self) -> int:
        """Which copy this rank belongs to."""
        return self.world.rank // (self.tensor * self.shard) % self.replicate

    @property
    def stage(self) -> int:
        """Which stage of the pipeline this rank belongs to."""
        return self.world.rank // (self.tensor * self.shard * self.replicate)

    @property
    def num_data_ranks(self) -> int:
        """Into how many shares the samples of a step are divided."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank computes on."""
        return self.replicate_rank * self.shard + self.shard_rank

    @property
    def first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the head, and so the loss."""
        return self.stage == self.pipeline - 1

    @property
    def speaks_for_samples(self) -> bool:
        """Whether this rank is the one of its data rank whose samples are counted."""
        return self.first_stage and self.tensor_rank == 0

    @property
    def speaks_for_loss(self) -> bool:
        """Whether this rank is the one of its data rank whose losses are counted."""
        return self.last_stage and self.tensor_rank == 0
