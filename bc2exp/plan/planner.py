"""A plan: one layout of one model for one batch, judged; and the layouts near it.

Traces are shared: they depend on the tensor degree, on what is recomputed and on the samples of a micro
batch, and grow linearly in the last, so two sizes tell all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from bc2exp.hardware import HOST, get_backend, planning_constant, planning_ops
from bc2exp.hardware.base import Ops
from bc2exp.hardware.eager import with_twins
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.model.plan import span, stage_of, tensor_cut
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import casts_weights
from bc2exp.parallel.world import World
from bc2exp.plan.estimate import Rates, Time, recomputed, step_time
from bc2exp.plan.memory import Memory, groups_of, memory_of
from bc2exp.plan.trace import Pass, Passes, alone, trace
from bc2exp.plan.traffic import Exchange, traffic
from bc2exp.train.throughput import flops_per_token


@dataclass(frozen=True)
class Choice:
    """A layout and a micro batch; the names are those of the configuration's keys."""

    pipeline: int
    replicate: int
    shard: int
    tensor: int
    zero_stage: int
    sequence_parallel: bool
    recompute: str
    defer_reduction: bool
    micro_batch: int

    @property
    def num_data_ranks(self) -> int:
        """Ranks that compute on different samples."""
        return self.replicate * self.shard


@dataclass(frozen=True)
class Plan:
    """What a choice comes to on the rank that needs most memory.

    Attributes:
        stage: of that rank.
        num_micro_batches: of a data rank in a step.
        flops: of a device in a step, recomputation included; `useful_flops` without it.
        time: None without declared rates.
    """

    choice: Choice
    memory: Memory
    stage: int
    num_micro_batches: int
    exchanges: list[Exchange]
    flops: float
    useful_flops: float
    time: Time | None


@dataclass
class Planner:
    """Plans for one model, batch and kind of device.

    Args:
        shape: `Baichuan2.shape`.
        backend: name of the device's backend.
        precision: fp32 or bf16.
        length: tokens of a sample.
        global_batch: samples of a step.
        rates: of the device; None: no time is estimated.
        twins: operations that run as their eager twins.
    """

    shape: dict[str, Any]
    backend: str
    precision: str
    length: int
    global_batch: int
    rates: Rates | None
    twins: tuple[str, ...] = ()
    _traces: dict[tuple[Any, ...], Passes] = field(default_factory=dict)

    def plan(self, choice: Choice, *, exact: bool = False) -> Plan:
        """The plan of a choice that fits model and batch; `exact`: by a trace of its own micro batch."""
        size = prod((choice.pipeline, choice.replicate, choice.shard, choice.tensor))
        num_micro_batches = self.global_batch // (choice.num_data_ranks * choice.micro_batch)
        casts = casts_weights(self._mesh(choice, 0, size), self.precision)
        narrow = casts and num_micro_batches == 1
        if exact:
            passes = self._trace(choice, choice.micro_batch, casts, narrow)
        else:
            one, two = (self._trace(choice, rows, casts, narrow) for rows in (1, 2))
            passes = _extrapolate(one, two, choice.micro_batch)
        keep = choice.zero_stage == 2 or choice.shard == 1
        constant = planning_constant(self.backend, self.twins)
        stages = []
        for stage in range(choice.pipeline):
            mesh = self._mesh(choice, stage * size // choice.pipeline, size)
            own, whole = self.parts(mesh)
            memory = memory_of(
                own,
                whole,
                mesh,
                passes,
                precision=self.precision,
                keep_gathered=keep,
                defer_reduction=choice.defer_reduction,
                num_micro_batches=num_micro_batches,
                narrow_gradients=narrow,
            )
            memory = replace(memory, activations=memory.activations + constant)
            stages.append((memory.total, stage, memory, mesh, whole))
        _, stage, memory, mesh, whole = max(stages, key=lambda found: found[:2])
        exchanges = traffic(
            mesh,
            passes,
            groups_of(whole),
            num_layers=len({name.split(".")[1] for name in whole if name.startswith("layers.")}),
            num_micro_batches=num_micro_batches,
            compute_bytes=2 if self.precision == "bf16" else 4,
            keep_gathered=keep,
            defer_reduction=choice.defer_reduction,
        )
        useful, flops = self._flops(choice, size)
        time = None
        if self.rates is not None:
            time = step_time(mesh, exchanges, self.rates, flops=flops, num_micro_batches=num_micro_batches)
        return Plan(choice, memory, stage, num_micro_batches, exchanges, flops, useful, time)

    def parts(self, mesh: Mesh) -> tuple[dict[str, int], dict[str, int]]:
        """{name: elements} of the weights of a rank's stage: its own parts, and those before sharding."""
        own, whole = {}, {}
        for name, shape in self._shapes.items():
            if stage_of(name, self.shape["num_layers"], mesh.pipeline) != mesh.stage:
                continue
            sizes = list(shape)
            dim = tensor_cut(name).dim
            if dim is not None:
                sizes[dim] = _length(span(sizes[dim], mesh.tensor, mesh.tensor_rank))
            whole[name] = prod(sizes)
            sizes[0] = _length(span(sizes[0], mesh.shard, mesh.shard_rank))
            own[name] = prod(sizes)
        return own, whole

    @cached_property
    def ops(self) -> Ops:
        """What the model is traced with."""
        return with_twins(planning_ops(self.backend), self.twins)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = Baichuan2(**self.shape, ops=self.ops)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def _mesh(self, choice: Choice, rank: int, size: int) -> Mesh:
        world = World(rank, size, 0, 1, get_backend(HOST))
        return Mesh(world, choice.pipeline, choice.replicate, choice.shard, choice.tensor)

    def _trace(self, choice: Choice, rows: int, wide: bool, narrow: bool) -> Passes:
        key = choice.tensor, choice.sequence_parallel, choice.recompute, rows, wide, narrow
        if key not in self._traces:
            with alone(0, choice.tensor):
                world = World(0, choice.tensor, 0, choice.tensor, get_backend(HOST))
                self._traces[key] = trace(
                    self.shape,
                    self.ops,
                    Mesh(world, tensor=choice.tensor),
                    rows=rows,
                    length=self.length,
                    dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32,
                    wide=wide,
                    narrow_gradients=narrow,
                    sequence_parallel=choice.sequence_parallel,
                    recompute=choice.recompute,
                )
        return self._traces[key]

    def _flops(self, choice: Choice, size: int) -> tuple[float, float]:
        """Operations of a device in a step, without and with what is computed again."""
        shape, tokens = self.shape, self.global_batch * self.length
        head = 6.0 * shape["vocab_size"] * shape["hidden_size"]
        feed_forward = 6.0 * 3 * shape["hidden_size"] * shape["intermediate_size"] * shape["num_layers"]
        useful = flops_per_token(
            num_parameters=sum(prod(sizes) for sizes in self._shapes.values()),
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            num_layers=shape["num_layers"],
            sequence_length=self.length,
        )
        again = recomputed(choice.recompute, flops=useful, head_flops=head, feed_forward_flops=feed_forward)
        return useful * tokens / size, (useful + again) * tokens / size


def _length(part: slice) -> int:
    return part.stop - part.start


def _extrapolate(one: Passes, two: Passes, rows: int) -> Passes:
    """The passes of `rows` samples from those of one and of two: what all share, and what each adds."""

    def line(first: int, second: int) -> int:
        return first + (rows - 1) * (second - first)

    def passes(first: Pass, second: Pass) -> Pass:
        return replace(
            first,
            kept=line(first.kept, second.kept),
            forward_peak=line(first.forward_peak, second.forward_peak),
            backward_peak=line(first.backward_peak, second.backward_peak),
            backward_peak_and_gradients=max(
                line(first.backward_peak_and_gradients, second.backward_peak_and_gradients),
                line(first.backward_peak, second.backward_peak),
            ),
            gradients=line(first.gradients, second.gradients),
            sent={kind: line(first.sent[kind], second.sent[kind]) for kind in first.sent},
            calls={kind: line(first.calls[kind], second.calls[kind]) for kind in first.calls},
        )

    return Passes(
        embedding=passes(one.embedding, two.embedding),
        layer=passes(one.layer, two.layer),
        head=passes(one.head, two.head),
        hidden=line(one.hidden, two.hidden),
        casts=one.casts,
    )
