"""Which part of each weight a rank holds, and the way from whole tensors to parts and back.

A weight lies in one stage of the pipeline; there it is cut over tensor-parallel ranks (`model.plan`), and
each part along dim 0 over the ranks that share it. Gradients and moments lie as their weights do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from bc2exp.model.plan import span, stage_of, tensor_cut
from bc2exp.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parts:
    """The weights of a model, laid over a mesh.

    Args:
        mesh: the ranks.
        shapes: every weight of the whole model and its whole shape, in the order of the network.
        num_layers: layers of the whole model.
    """

    mesh: Mesh
    shapes: dict[str, tuple[int, ...]]
    num_layers: int

    def stage(self, name: str) -> int:
        """The stage that holds a weight."""
        return stage_of(name, self.num_layers, self.mesh.pipeline)

    def slices(self, name: str) -> tuple[slice, ...]:
        """Which rows, and of a matrix which columns, of the weight `name` are this rank's."""
        shape, dim = self.shapes[name], tensor_cut(name).dim
        found = [slice(0, size) for size in shape]
        if dim is not None:
            found[dim] = span(shape[dim], self.mesh.tensor, self.mesh.tensor_rank)
        first, rows = found[0].start, found[0].stop - found[0].start
        shard = span(rows, self.mesh.shard, self.mesh.shard_rank)
        found[0] = slice(first + shard.start, first + shard.stop)
        return tuple(found)

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor that is, or lies like, the weight `name`; a view."""
        assert tuple(whole.shape) == self.shapes[name], name
        return whole[self.slices(name)]

    def whole(self, part_of: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """On rank 0 every tensor, name and whole value (fp32, on the host), one after another; on the others
        nothing.

        Every rank must walk through it to the end. `part_of` gives this rank's part of a tensor. No rank
        holds more than one whole tensor at a time, rank 0 but for those it is asked to keep. What passes
        between ranks passes through `World.host_group`, so that the devices may go on with other work.
        """
        group, rank = self.mesh.world.host_group, self.mesh.world.rank
        ranks = [self._seen_from(other) for other in range(self.mesh.world.size)]
        for name, shape in self.shapes.items():
            holders = [other for other, parts in enumerate(ranks) if parts._speaks_for(name)]
            if rank == 0:
                if holders == [0]:
                    yield name, part_of(name).cpu()
                    continue
                tensor = torch.empty(shape, dtype=torch.float32)
                for other in holders:
                    place = tensor[ranks[other].slices(name)]
                    if other == 0:
                        place.copy_(part_of(name))
                    elif place.numel():
                        part = torch.empty(place.shape, dtype=torch.float32)
                        dist.recv(part, src=other, group=group)
                        place.copy_(part)
                yield name, tensor
            elif rank in holders:
                part = part_of(name).cpu().contiguous()
                if part.numel():  # nothing is not sent
                    dist.send(part, dst=0, group=group)

    def _seen_from(self, rank: int) -> Parts:
        """The same as another rank has it."""
        return replace(self, mesh=replace(self.mesh, world=replace(self.mesh.world, rank=rank)))

    def _speaks_for(self, name: str) -> bool:
        """Whether this rank has a part of a weight that no rank before it has."""
        mesh = self.mesh
        once = mesh.replicate_rank == 0 and (mesh.tensor_rank == 0 or tensor_cut(name).dim is not None)
        return once and self.stage(name) == mesh.stage

    def joined(self, part: Tensor, dim: int, length: int, axis: str) -> Tensor:
        """The parts that the ranks of an axis have of a tensor in one, `length` along `dim`."""
        degree = getattr(self.mesh, axis)
        if degree == 1:
            return part
        part = part.movedim(dim, 0)
        size = -(-length // degree)  # of every part but the last ones
        padded = part.new_zeros(size, *part.shape[1:])
        padded[: part.shape[0]] = part
        joined = part.new_empty(size * degree, *part.shape[1:])
        dist.all_gather_single(joined, padded, group=self.mesh.group(axis))
        return joined[:length].movedim(0, dim)
