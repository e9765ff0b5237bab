"""Which part of each weight a rank holds, and the way from whole tensors to parts and back.

A weight lies in one stage of the pipeline; there it is cut over tensor-parallel ranks (`model.plan`), and
each part along dim 0 over the ranks that share it. Gradients and moments lie as their weights do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor that is, or lies like, the weight `name`; a view."""
        assert tuple(whole.shape) == self.shapes[name], name
        dim = tensor_cut(name).dim
        if dim is not None:
            whole = _narrow(whole, dim, span(whole.shape[dim], self.mesh.tensor, self.mesh.tensor_rank))
        return _narrow(whole, 0, span(whole.shape[0], self.mesh.shard, self.mesh.shard_rank))

    def whole(self, part_of: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """On rank 0 every tensor, name and whole value, one after another; on the others nothing.

        Every rank must walk through it to the end. `part_of` gives this rank's part of a tensor. No rank
        holds more than one whole tensor at a time, rank 0 but for those it is asked to keep.
        """
        for name in self.shapes:
            stage = self.stage(name)
            tensor = None
            if stage == self.mesh.stage and self.mesh.replicate_rank == 0:
                tensor = self._gathered(name, part_of(name))
            tensor = self._brought(name, stage, tensor)
            if tensor is not None and self.mesh.world.rank == 0:
                yield name, tensor

    def _gathered(self, name: str, part: Tensor) -> Tensor | None:
        """The whole tensor, on the first rank of its stage."""
        mesh, shape, dim = self.mesh, list(self.shapes[name]), tensor_cut(name).dim
        if dim is not None:
            rows = span(shape[dim], mesh.tensor, mesh.tensor_rank)
            shape[dim] = rows.stop - rows.start
        part = self._joined(part, 0, shape[0], "shard", mesh.shard)
        if mesh.shard_rank == 0 and dim is not None:
            part = self._joined(part, dim, self.shapes[name][dim], "tensor", mesh.tensor)
        return part if mesh.shard_rank == mesh.tensor_rank == 0 else None

    def _joined(self, part: Tensor, dim: int, length: int, axis: str, degree: int) -> Tensor:
        """The parts of all ranks of an axis in one, `length` along `dim`."""
        if degree == 1:
            return part
        part = part.movedim(dim, 0)
        size = -(-length // degree)  # of every part but the last ones
        padded = part.new_zeros(size, *part.shape[1:])
        padded[: part.shape[0]] = part
        joined = part.new_empty(size * degree, *part.shape[1:])
        dist.all_gather_single(joined, padded, group=self.mesh.group(axis))
        return joined[:length].movedim(0, dim)

    def _brought(self, name: str, stage: int, tensor: Tensor | None) -> Tensor | None:
        """The whole tensor, on rank 0."""
        mesh = self.mesh
        if stage == 0 or mesh.replicate_rank or mesh.shard_rank or mesh.tensor_rank:
            return tensor
        group = mesh.group("pipeline")
        if mesh.stage == stage:
            assert tensor is not None
            dist.send(tensor.contiguous(), dst=dist.get_global_rank(group, 0), group=group)
        elif mesh.stage == 0:
            tensor = torch.empty(self.shapes[name], dtype=torch.float32, device=mesh.world.device)
            dist.recv(tensor, src=dist.get_global_rank(group, stage), group=group)
        return tensor


def _narrow(tensor: Tensor, dim: int, part: slice) -> Tensor:
    return tensor.narrow(dim, part.start, part.stop - part.start)
