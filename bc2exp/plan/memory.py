"""Bytes on one rank: parameters, gradients, moments, gathered copies, activations.

State is counted from the model as `parallelize` really lays it out, on tensors without storage. Activations
are put together from traces of one layer, the embedding and the head (`trace`).

Legend: P stages, m micro batches of a step, f of them in flight in a stage, L layers of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from bc2exp.hardware.base import Ops
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import local, needs_sharding
from bc2exp.plan.trace import Passes

FP32 = 4
GATHERED_AHEAD = 2
"""Layers that are whole at one time where parameters are sharded: the one at work and the one fetched."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters, gradients: fp32.
        optimizer: both moments of AdamW, and the counters of its steps.
        gathered: copies of parameters in the type of computing, and gradients on their way to their shard.
        activations: the most that forward and backward passes hold beside all that.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def state(self) -> int:
        """What a rank holds between steps."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The most at one time."""
        return sum(getattr(self, field.name) for field in fields(self))


def laid_out(shape: dict[str, Any], ops: Ops, mesh: Mesh, precision: str, **options: Any) -> dict[str, int]:
    """{name: elements} of this rank's parts of a model that is really laid over `mesh`, without storage.

    `options` as `parallelize` takes them. The process group has no peers (`trace.alone`).
    """
    with torch.device("meta"):
        model = Baichuan2(**shape, ops=ops)
    model = parallelize(model, mesh, precision=precision, **options).model
    return {name: local(parameter).numel() for name, parameter in model.named_parameters()}


def state_bytes(own: dict[str, int]) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and AdamW's state for this rank's parts of the parameters."""
    parameters = sum(own.values()) * FP32
    return parameters, parameters, 2 * parameters + FP32 * len(own)


def groups_of(whole: dict[str, int]) -> dict[str, int]:
    """{group: elements}: what FSDP2 gathers and reduces at once: the embedding, each layer, norm and head."""
    groups: dict[str, int] = {}
    for name, count in whole.items():
        group = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        group = "head" if group in ("norm", "lm_head") else group
        groups[group] = groups.get(group, 0) + count
    return groups


def memory_of(
    own: dict[str, int],
    whole: dict[str, int],
    mesh: Mesh,
    passes: Passes,
    *,
    precision: str,
    keep_gathered: bool,
    defer_reduction: bool,
    num_micro_batches: int,
) -> Memory:
    """The memory of the rank that `mesh` is seen from.

    Args:
        own: {name: elements} of its parts of the weights.
        whole: the same before they are cut into shards.
        keep_gathered, defer_reduction: see `Layout`.
    """
    groups = groups_of(whole)
    gathered = 0
    if needs_sharding(mesh, precision):
        size = 2 if precision == "bf16" else FP32
        gathered = _gathered(groups, size, keep=keep_gathered, defer=defer_reduction)
    num_layers = sum(group.startswith("layers.") for group in groups)
    return Memory(*state_bytes(own), gathered, _activations(mesh, passes, num_layers, num_micro_batches))


def _gathered(groups: dict[str, int], size: int, *, keep: bool, defer: bool) -> int:
    """FSDP2's working memory. A group is gathered in the computing type; its gradients wait in that type for
    the end of its backward pass, and are copied to fp32 to be reduced."""
    everything, largest = sum(groups.values()), max(groups.values())
    reduced = largest * (size + FP32) + (everything * FP32 if defer else 0)
    if keep:
        return everything * size + reduced
    layers = sorted((count for group, count in groups.items() if group.startswith("layers.")), reverse=True)
    held = max(sum(layers[:GATHERED_AHEAD]) + groups.get("head", 0), groups.get("embed_tokens", 0))
    return held * size + reduced


def _activations(mesh: Mesh, passes: Passes, num_layers: int, num_micro_batches: int) -> int:
    """The highest of the points at which a stage may hold most: in the last layer's forward or backward pass,
    in the head's, with everything that the micro batches in flight keep."""
    layer, head = passes.layer, passes.head
    first = passes.embedding.kept if mesh.first_stage else passes.hidden
    before_last = first + (num_layers - 1) * layer.kept
    kept = before_last + layer.kept
    # for the backward pass the gradient of the layer's output has come in, from the head or the stage behind
    points = [before_last + layer.forward_peak, before_last + layer.backward_peak]
    if mesh.last_stage:
        points += [kept + head.forward_peak, kept + head.backward_peak]
        kept += head.kept
    in_flight = min(num_micro_batches, mesh.pipeline - mesh.stage)
    return (in_flight - 1) * kept + max(points)
