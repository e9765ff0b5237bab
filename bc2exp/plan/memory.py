"""Bytes on one rank: parameters, gradients, moments, gathered copies, activations.

State is counted from the model as `parallelize` really lays it out, on tensors without storage. Activations
are put together from traces of one layer, the embedding and the head (`trace`).

Legend: P stages, m micro batches of a step, f of them in flight in a stage, L layers of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from bc2exp.hardware.base import Ops
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import local, needs_sharding
from bc2exp.plan.trace import FP32, Pass, Passes


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: fp32.
        gradients: those that are there at the highest moment of a step, fp32, or as they are computed.
        optimizer: both moments of AdamW, and the counters of its steps.
        gathered: copies of parameters in the type of computing, and gradients on their way to their shard.
        activations: what forward and backward passes hold beside all that.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

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
    narrow_gradients: bool,
) -> Memory:
    """The memory of the rank that `mesh` is seen from, at the moment of a step when it is highest.

    Args:
        own: {name: elements} of its parts of the weights.
        whole: the same before they are cut into shards.
        keep_gathered, defer_reduction: see `Layout`.
        narrow_gradients: see `Baichuan2.hold_gradients`; `passes` are then of such.
    """
    groups = groups_of(whole)
    gradients = {group: count * FP32 for group, count in groups_of(own).items()}
    if narrow_gradients:
        known = {"embed_tokens": passes.embedding, "head": passes.head}
        gradients = {group: known.get(group, passes.layer).gradients for group in groups}
    step = _Step(
        mesh=mesh,
        passes=passes,
        whole=groups,
        gradients=gradients,
        num_layers=sum(group.startswith("layers.") for group in groups),
        num_micro_batches=num_micro_batches,
        compute=2 if precision == "bf16" else FP32,
        shards=needs_sharding(mesh, precision),
        keep=keep_gathered,
        defer=defer_reduction,
    )
    parameters, _, optimizer = state_bytes(own)
    highest = max(step.moments(), key=sum)
    gathered = highest.gathered + passes.casts
    return Memory(parameters, highest.gradients, optimizer, gathered, highest.activations)


class Moment(NamedTuple):
    """What a rank holds beside parameters and AdamW's state at a moment of a step, bytes."""

    gradients: int
    gathered: int
    activations: int


@dataclass(frozen=True)
class _Step:
    """One optimizer step of a stage, with as many micro batches in flight as it comes to hold.

    Where it accumulates, every gradient is there from the first micro batch on; else each comes with the
    backward pass of its group, while the activations of the groups behind are gone already. FSDP2 gathers a
    group in the computing type, and from backward its gradients wait in that type for the end of the group's
    pass, are copied to fp32 and reduced; this copy lies there until the next group's is made.

    Args:
        whole: {group: elements} of the stage before they are cut into shards.
        gradients: {group: bytes} of this rank's.
        compute: bytes of a number in the computing type.
        shards: whether FSDP2 is used.
    """

    mesh: Mesh
    passes: Passes
    whole: dict[str, int]
    gradients: dict[str, int]
    num_layers: int
    num_micro_batches: int
    compute: int
    shards: bool
    keep: bool
    defer: bool

    def moments(self) -> Iterator[Moment]:
        """The moments of which one is the highest: the head and the last layer at work, forward and backward,
        the first layer and the embedding on the way back, and the optimizer's step."""
        layer, head, embedding = self.passes.layer, self.passes.head, self.passes.embedding
        base = embedding.kept if self.mesh.first_stage else self.passes.hidden
        before_last = base + (self.num_layers - 1) * layer.kept
        kept = before_last + layer.kept + (head.kept if self.mesh.last_stage else 0)
        others = (self._in_flight - 1) * kept
        layers = [group for group in self.whole if group.startswith("layers.")]
        done = []
        if self.mesh.last_stage:
            yield self._forward("head", others + before_last + layer.kept + head.forward_peak)
            yield self._backward("head", [], others + before_last + layer.kept, head)
            done = ["head"]
        yield self._forward(layers[-1], others + before_last + layer.forward_peak)
        yield self._backward(layers[-1], done, others + before_last, layer)
        done += layers[:0:-1]
        yield self._backward(layers[0], done, others + base, layer)
        if self.mesh.first_stage:
            yield self._backward("embed_tokens", [*done, layers[0]], others, embedding)
        yield Moment(sum(self.gradients.values()), 0, others)

    @property
    def _in_flight(self) -> int:
        return min(self.num_micro_batches, self.mesh.pipeline - self.mesh.stage)

    @property
    def _accumulated(self) -> bool:
        """Whether earlier micro batches have left their gradients when most are in flight."""
        return self.num_micro_batches > self._in_flight

    def _forward(self, group: str, activations: int) -> Moment:
        """The moment at which `group` is at work on its output."""
        gradients = sum(self.gradients.values()) if self._accumulated else 0
        gathered = self._gathered(group, []) * self.compute + self._deferred if self.shards else 0
        return Moment(gradients, gathered, activations)

    def _backward(self, group: str, done: list[str], activations: int, passed: Pass) -> Moment:
        """The moment at which `group` is on the way back; the backward pass of those in `done` has ended."""
        there = self.gradients if self._accumulated else done
        gradients = sum(self.gradients[name] for name in there)
        if not self.shards:
            # a gradient that is there is added to
            peak = passed.backward_peak if self._accumulated else passed.backward_peak_and_gradients
            return Moment(gradients, 0, activations + peak)
        gathered = self._gathered(group, done) * self.compute + self._deferred
        reduced = self.whole[done[-1]] * FP32 if done else 0
        return Moment(gradients, gathered + reduced, activations + passed.backward_peak_and_gradients)

    @property
    def _deferred(self) -> int:
        """Whole gradients that wait for the last micro batch."""
        return sum(self.whole.values()) * FP32 if self.defer and self._accumulated else 0

    def _gathered(self, group: str, done: list[str]) -> int:
        """Elements of the parameters that are whole while `group` works: the next one is fetched by then."""
        if self.keep:
            freed = () if self._accumulated else done  # only in the last micro batch
            return sum(count for name, count in self.whole.items() if name not in freed)
        ahead = next((name for name in reversed(self.whole) if name not in (*done, group)), None)
        return self.whole[group] + (self.whole[ahead] if ahead is not None else 0)
