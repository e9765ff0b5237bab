"""The parallelism group: on how many ranks which part of the work lies. It never changes a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod

from bc2exp.config.fields import setting

AXES = ("pipeline", "replicate", "shard", "tensor")
"""The axes of the mesh of ranks, outermost first: neighbours exchange the most."""


class Recompute(Enum):
    """What backward computes again instead of keeping it from forward."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass
class ParallelismConfig:
    """Degrees whose product is the number of devices; one of them may be -1 and takes what is left."""

    name: str = setting("name of the layout, used for runs")
    pipeline: int = setting("stages, each with some of the layers; -1: all that are left", 1, minimum=-1)
    replicate: int = setting(
        "data-parallel copies of what the other degrees cut; -1: all that are left", 1, minimum=-1
    )
    shard: int = setting(
        "data-parallel ranks that share parameters, gradients and moments (ZeRO); -1: all that are left",
        1,
        minimum=-1,
    )
    tensor: int = setting(
        "ranks that share every layer: its heads, feed-forward width, vocabulary; -1: all that are left",
        1,
        minimum=-1,
    )
    zero_stage: int = setting(
        "where shard is above 1: 2 keeps parameters gathered through the micro batches of a step; 3 gathers "
        "each layer for its forward and again for its backward pass",
        3,
        minimum=2,
        maximum=3,
    )
    sequence_parallel: bool = setting(
        "tensor-parallel ranks share the sequence between the layers' matrices: activations take less", False
    )
    recompute: Recompute = setting(
        "none; selective: the feed-forward networks; full: whole layers, of which only the inputs are kept",
        Recompute.none,
    )
    defer_reduction: bool = setting(
        "reduce sharded gradients once a step instead of at every micro batch: less traffic, but every rank "
        "then holds whole gradients in fp32 (4 bytes a parameter that is not cut by tensor or pipeline)",
        False,
    )


def degrees(wanted: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The degree of each axis, -1 replaced by what is left of `num_devices`.

    Raises ValueError where more than one is -1, or where the product is not the number of devices.
    """
    chosen = {axis: wanted[axis] for axis in AXES}
    left = [axis for axis in AXES if chosen[axis] == -1]
    if len(left) > 1:
        raise ValueError("only one degree may be -1")
    named = prod(degree for degree in chosen.values() if degree != -1)
    if 0 in chosen.values():
        raise ValueError("a degree is at least 1, or -1")
    if num_devices % named or (not left and named != num_devices):
        raise ValueError(f"the degrees come to {named}" + (", which does not divide that" if left else ""))
    return {axis: num_devices // named if degree == -1 else degree for axis, degree in chosen.items()}


def micro_batch_of(share: int, pipeline: int) -> int:
    """Samples of a micro batch where none is named, for a data rank's `share` of the global batch.

    Without a pipeline the whole share. With one the largest that leaves at least as many micro batches as
    there are stages, so that no stage waits through a whole step; 1 where nothing of the kind divides it.
    """
    numbers = range(pipeline, min(share, 4096 * pipeline) + 1)
    return next((share // number for number in numbers if share % number == 0), 1)


def shares(size: int, parts: int) -> bool:
    """Whether every one of `parts` gets something of `size`, cut in parts of one size, less in the last."""
    return (parts - 1) * -(-size // parts) < size
