"""Pipeline stages: each rank has some of the layers, and micro batches pass through the stages (1F1B).

A stage does as many forward passes as there are stages from it to the end, then one backward and one forward
pass by turns, then the backward passes that are left (Narayanan et al. 2019, "PipeDream"; flushed every
step): no stage keeps the activations of more micro batches than there are stages.

Written out rather than taken from torch.distributed.pipelining (2.13), which keeps receive buffers for all
micro batches of a step, reduces sharded gradients only once a step (so that every rank holds whole ones in
fp32), and runs the real model once more to find out shapes, which are known here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bc2exp.data.batches import MicroBatch
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.model.plan import stage_layers
from bc2exp.parallel.mesh import Mesh

Forward = Callable[[Tensor, MicroBatch], Tensor]
"""Token ids or the hidden states of the stage before -> hidden states, or in the last stage the loss sum."""


def cut_stages(model: Baichuan2, mesh: Mesh) -> None:
    """Leave this rank the modules of its stage, in place."""
    mine = stage_layers(model.shape["num_layers"], mesh.pipeline)[mesh.stage]
    for index in list(model.layers):
        if int(index) not in mine:
            del model.layers[index]
    if not mesh.first_stage:
        model.embed_tokens = None
    if not mesh.last_stage:
        model.norm = model.lm_head = None


@dataclass
class Pipeline:
    """This rank's stage of a pipeline.

    Args:
        mesh: where this rank stands.
        hidden_size: width of the hidden states that stages pass on.
        dtype: their type.
        sequence_parts: into how many parts tensor-parallel ranks cut the sequence between layers.
    """

    mesh: Mesh
    hidden_size: int
    dtype: torch.dtype
    sequence_parts: int
    _outgoing: list[dist.P2POp] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Some backends want the first exchange of a group to be one of all its ranks.
        dist.all_reduce(torch.zeros(1, device=self.mesh.world.device), group=self.mesh.group("pipeline"))

    def train(self, batch: list[MicroBatch], forward: Forward, backward: Callable[..., None]) -> list[Tensor]:
        """Forward and backward passes of the micro batches of a step; in the last stage their loss sums.

        `backward(index, output, gradient)` is called in order of the index, the micro batch's number; the
        gradient is None in the last stage.
        """
        waiting: deque[tuple[Tensor, Tensor]] = deque()
        losses = []
        ahead = min(len(batch), self.mesh.pipeline - self.mesh.stage)
        done = started = 0
        while done < len(batch):
            if started < len(batch) and started - done < ahead:
                given, output = self._forward(batch[started], forward, requires_grad=True)
                waiting.append((given, output))
                if self.mesh.last_stage:
                    losses.append(output.detach())
                started += 1
                continue
            given, output = waiting.popleft()
            gradient = self._receive(output.shape, +1) if not self.mesh.last_stage else None
            backward(done, output, gradient)
            if not self.mesh.first_stage:
                assert given.grad is not None
                self._send(given.grad, -1)
            done += 1
        self._exchange()
        return losses

    def evaluate(self, batch: list[MicroBatch], forward: Forward) -> list[Tensor]:
        """Forward passes alone; in the last stage the loss sums."""
        losses = []
        for part in batch:
            _, output = self._forward(part, forward, requires_grad=False)
            if self.mesh.last_stage:
                losses.append(output)
        self._exchange()
        return losses

    def _forward(self, part: MicroBatch, forward: Forward, *, requires_grad: bool) -> tuple[Tensor, Tensor]:
        """What the stage was given, and what it made of it, which is on its way to the next stage."""
        if self.mesh.first_stage:
            self._exchange()  # nothing will be received before the next stage can begin
            given = part.input_ids.to(self.mesh.world.device)
        else:
            rows, length = part.input_ids.shape
            given = self._receive((rows, length // self.sequence_parts, self.hidden_size), -1)
            given.requires_grad_(requires_grad)
        output = forward(given, part)
        if not self.mesh.last_stage:
            self._send(output.detach(), +1)
        return given, output

    def _send(self, tensor: Tensor, direction: int) -> None:
        """Hand a tensor to the next (+1) or the previous (-1) stage, together with whatever is received next:
        two neighbours that only send would wait for each other."""
        self._outgoing.append(self._operation(dist.isend, tensor.contiguous(), direction))

    def _receive(self, shape: tuple[int, ...], direction: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.mesh.world.device)
        self._exchange(self._operation(dist.irecv, tensor, direction))
        return tensor

    def _operation(self, kind: Callable[..., Any], tensor: Tensor, direction: int) -> dist.P2POp:
        group = self.mesh.group("pipeline")
        peer = dist.get_global_rank(group, self.mesh.stage + direction)
        return dist.P2POp(kind, tensor, peer, group)

    def _exchange(self, *incoming: dist.P2POp) -> None:
        operations = [*self._outgoing, *incoming]
        self._outgoing.clear()
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
