"""One function lays a finished model over the ranks; what comes back computes and is filled in parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bc2exp.data.batches import MicroBatch
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.model.cache import Cache
from bc2exp.parallel import shard
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.parts import Parts
from bc2exp.parallel.pipeline import Pipeline, cut_stages
from bc2exp.parallel.recompute import set_recompute
from bc2exp.parallel.tensor import cut_layers


def parallelize(
    model: Baichuan2,
    mesh: Mesh,
    *,
    precision: str,
    zero_stage: int = 3,
    sequence_parallel: bool = False,
    recompute: str = "none",
    defer_reduction: bool = False,
) -> Layout:
    """Lay a model over the ranks of `mesh`, in place. Every rank must call it.

    The model is best on the meta device: `Layout.take_storage` gives each rank memory for its parts only.
    The other arguments are those of the configuration's parallelism group, and `precision` is fp32 or bf16:
    what the model computes in; its parameters are fp32.

    The order is fixed, each step working on what the one before left: stages, parts of layers, recomputation
    (which repeats the exchanges of those parts), shards.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parts = Parts(mesh, shapes, model.shape["num_layers"])
    pipeline = None
    sequence_parallel = sequence_parallel and mesh.tensor > 1
    if mesh.pipeline > 1:
        cut_stages(model, mesh)
        pipeline = Pipeline(
            mesh,
            model.shape["hidden_size"],
            torch.bfloat16 if precision == "bf16" else torch.float32,
            mesh.tensor if sequence_parallel else 1,
        )
    if mesh.tensor > 1:
        cut_layers(model, mesh, sequence_parallel=sequence_parallel)
    set_recompute(model, recompute)
    shard.shard_layers(model, mesh, precision=precision, zero_stage=zero_stage)
    return Layout(
        model,
        mesh,
        parts,
        pipeline,
        sequence_parallel=sequence_parallel,
        keep_gathered=zero_stage == 2 or mesh.shard == 1,
        defer_reduction=defer_reduction,
        casts_weights=shard.casts_weights(mesh, precision),
    )


def lay_out_copies(model: Baichuan2, mesh: Mesh, *, precision: str) -> Layout:
    """Lay a model that is not trained over the ranks of `mesh`, in place: the tensor-parallel ranks share it,
    all others have copies, so that each decodes at a pace of its own. Every rank must call it.

    The mesh has neither stages nor shards. The parameters are in the precision that the model computes in:
    fp32 ones, as in training, would take twice the memory for nothing.
    """
    assert mesh.pipeline == mesh.shard == 1
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if mesh.tensor > 1:
        cut_layers(model, mesh, sequence_parallel=False)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.eval()
    parts = Parts(mesh, shapes, model.shape["num_layers"])
    return Layout(
        model,
        mesh,
        parts,
        None,
        sequence_parallel=False,
        keep_gathered=True,
        defer_reduction=False,
        casts_weights=False,
    )


@dataclass(frozen=True)
class Layout:
    """A model laid over the ranks.

    Attributes:
        model: what this rank has of it.
        mesh: the ranks.
        parts: which parts of the weights lie where.
        pipeline: this rank's stage, None where there is one stage.
        sequence_parallel, keep_gathered, defer_reduction: see the configuration.
        casts_weights: they are wider than what is computed in.
    """

    model: Baichuan2
    mesh: Mesh
    parts: Parts
    pipeline: Pipeline | None
    sequence_parallel: bool
    keep_gathered: bool
    defer_reduction: bool
    casts_weights: bool

    def take_storage(self) -> None:
        """Give this rank's parts memory on its device; every one is then to be assigned."""
        shard.take_storage(self.model, self.mesh.world.device)

    def own_names(self) -> list[str]:
        """The weights of which this rank has a part."""
        return [name for name, _ in self.model.named_parameters()]

    def assign(self, name: str, whole: Tensor) -> None:
        """Give the weight `name` this rank's part of a whole tensor."""
        self.put(name, self.parts.mine(name, whole))

    @torch.no_grad()
    def put(self, name: str, part: Tensor) -> None:
        """Give the weight `name` this rank's part (see `Parts.slices`)."""
        shard.local(self.model.get_parameter(name).detach()).copy_(part)

    def train(self, batch: list[MicroBatch], scale: float) -> Tensor:
        """Forward and backward passes of the micro batches of a step: their loss sums [micro batches], zeros
        where this rank has no head. Gradients are those of the sum of all data ranks' losses times
        `scale`, divided by the number of data ranks; `finish` completes them."""

        def backward(index: int, output: Tensor, gradient: Tensor | None) -> None:
            last = index == len(batch) - 1
            shard.before_backward(self.model, last=last, keep=self.keep_gathered, defer=self.defer_reduction)
            if gradient is None:
                (output * scale).sum().backward()
            else:
                output.backward(gradient)

        if self.pipeline is not None:
            return self._all_or_zeros(self.pipeline.train(batch, self._forward, backward), batch)
        if self.casts_weights:
            self.model.hold_gradients(narrow=len(batch) == 1)
        losses = []
        for index, part in enumerate(batch):
            loss = self._forward(part.input_ids.to(self.mesh.world.device), part)
            backward(index, loss, None)
            losses.append(loss.detach())
        return self._all_or_zeros(losses, batch)

    def finish(self) -> Tensor:
        """After `train`: complete the gradients. Returns what this rank adds to the squared norm of the whole
        gradient; the sum over all ranks is that."""
        if self.sequence_parallel:
            shard.complete_gradients(self.model, self.mesh)
        return shard.squared_norm(self.model, self.mesh)

    @torch.no_grad()
    def evaluate(self, batch: list[MicroBatch]) -> Tensor:
        """Loss sums [micro batches] of a model that is not trained on them; zeros without a head."""
        self.model.eval()
        if self.pipeline is not None:
            losses = self.pipeline.evaluate(batch, self._forward)
        else:
            losses = [self._forward(part.input_ids.to(self.mesh.world.device), part) for part in batch]
        shard.release_gathered(self.model)
        self.model.train()
        return self._all_or_zeros(losses, batch)

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        *,
        segment_ids: Tensor | None,
        at: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits of the whole vocabulary at some positions, fp32 [n, vocabulary], the same bits on every rank
        of a copy. Of a layout without stages. The arguments are the model's, `at` its `logits_at`."""
        assert self.pipeline is None
        device = self.mesh.world.device
        part: Tensor = self.model(
            input_ids.to(device),
            segment_ids=None if segment_ids is None else segment_ids.to(device),
            cache=cache,
            logits_at=at.to(device),
        )
        return self.parts.joined(part, 1, self.model.shape["vocab_size"], "tensor")

    def any(self, flag: bool) -> bool:
        """Whether any rank of this copy says so. One small exchange, where there are several."""
        if self.mesh.tensor == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.mesh.world.device)
        dist.all_reduce(flags, group=self.mesh.group("tensor"))
        return bool(flags.item())

    def _forward(self, given: Tensor, part: MicroBatch) -> Tensor:
        device = self.mesh.world.device
        segment_ids = None if part.segment_ids is None else part.segment_ids.to(device)
        out: Tensor = self.model(given, segment_ids=segment_ids, labels=part.labels.to(device))
        return out

    def _all_or_zeros(self, losses: list[Tensor], batch: list[MicroBatch]) -> Tensor:
        if not losses:
            return torch.zeros(len(batch), device=self.mesh.world.device)
        return torch.cat(losses).float()
