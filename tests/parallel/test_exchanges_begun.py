"""The count of exchanges by which a rank is found that others wait for: torch's, without a public name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bc2exp.parallel.world import exchanges_begun


@pytest.fixture
def alone():
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_nothing_is_counted_before_the_ranks_meet():
    assert exchanges_begun() == {}


def test_every_exchange_counts_in_its_group_but_for_stages_of_a_pipeline(alone):
    pair = dist.new_group([0], group_desc="mesh_tensor")
    stages = dist.new_group([0], group_desc="mesh_pipeline")
    before = exchanges_begun()
    assert before.keys() == {dist.group.WORLD.group_name, pair.group_name}
    for number in (1, 2, 3):
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1), group=stages)
        now = exchanges_begun()
        assert now[dist.group.WORLD.group_name] == before[dist.group.WORLD.group_name] + number
        assert now[pair.group_name] == before[pair.group_name]
    gathered = [torch.ones(1)]
    dist.all_gather(gathered, torch.ones(1), group=pair)
    assert exchanges_begun()[pair.group_name] == before[pair.group_name] + 1
